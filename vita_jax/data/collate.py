"""Examples to a batch: stacked and padded to one of few sizes, so that little is compiled.

Goes in: examples, or a batch whose rows are shorter than its arrays. Comes out: a `Batch`.
Read next: `models/vita.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vita_jax.batch import Batch
from vita_jax.data.processor import Example

_AXES = {  # behind the rows; of all other arrays it is "tokens"
    "tiles": ("tiles",),
    "tile_mask": ("tiles",),
    "audio": ("clips", "frames"),
    "audio_mask": ("clips", "frames"),
    "text": ("text",),
    "text_segment_ids": ("text",),
    "waveform": (),
}
# Into how many parts the limit of an axis may be cut, and the least that must be left: of fewer
# than 7 frames the audio encoder makes nothing.
_CUTS = {"tokens": (4, 1), "tiles": (4, 1), "clips": (4, 1), "frames": (8, 7), "text": (8, 1)}


def bucket(n: int, smallest: int = 1) -> int:
    """The least of `smallest` times 1, 2, 3, 4, 6, 8, 12, 16, ... that is not less than `n`.

    Few sizes make few compilations.
    """
    size = smallest
    while size < n:
        size *= 2
    middle = size // 4 * 3
    return middle if n <= middle and size > 2 * smallest else size


def collate(
    examples: Sequence[Example],
    num_tokens: int | None = None,
    num_tiles: int | None = None,
    num_clips: int | None = None,
    num_frames: int | None = None,
) -> Batch:
    """Stacks examples, each padded at its end; the arrays stay NumPy's.

    Args:
      examples: one or more.
      num_tokens: padded size T; for this and the next three, None takes a `bucket`.
      num_tiles: padded size I.
      num_clips: padded size U.
      num_frames: padded size A.

    Raises:
      ValueError: an example is larger than a size given.
    """
    lengths = [len(example.tokens) for example in examples]
    num_tokens = _size("tokens", num_tokens, lengths, 128)
    batch = Batch(
        tokens=_pad([example.tokens for example in examples], num_tokens),
        positions=_pad([np.arange(n, dtype=np.int32) for n in lengths], num_tokens),
        segment_ids=_pad([np.ones(n, np.int32) for n in lengths], num_tokens),
        loss_mask=_pad([example.loss_mask for example in examples], num_tokens),
    )
    some = next((example.tiles for example in examples if example.tiles is not None), None)
    if some is not None:
        tiles = [some[:0] if example.tiles is None else example.tiles for example in examples]
        num_tiles = _size("tiles", num_tiles, map(len, tiles), 1)
        masks = [np.ones(len(row), bool) for row in tiles]
        batch = batch.replace(tiles=_pad(tiles, num_tiles), tile_mask=_pad(masks, num_tiles))
    clips = [clip for example in examples for clip in example.audio]
    if clips:
        counts = [len(example.audio) for example in examples]
        num_clips = _size("clips", num_clips, counts, 1)
        num_frames = _size("audio frames", num_frames, map(len, clips), 128)
        ends = np.cumsum(counts)[:-1]
        audio = np.split(_pad(clips, num_frames), ends)
        masks = np.split(_pad([np.ones(len(clip), bool) for clip in clips], num_frames), ends)
        batch = batch.replace(audio=_pad(audio, num_clips), audio_mask=_pad(masks, num_clips))
    if examples[0].text is not None:
        texts = [example.text for example in examples]
        ones = [np.ones(len(text), np.int32) for text in texts]
        batch = batch.replace(text=_pad(texts, num_tokens), text_segment_ids=_pad(ones, num_tokens))
    if examples[0].waveform is not None:
        batch = batch.replace(waveform=np.stack([example.waveform for example in examples]))
    return batch


def _size(what, given, needed, smallest):
    """The padded size: `given` if the largest of `needed` fits, a bucket if None is given."""
    largest = max(needed)
    if given is None:
        return bucket(largest, smallest)
    if largest > given:
        raise ValueError(f"an example has {largest} {what}, the batch takes {given}; raise that")
    return given


def _pad(rows, length):
    """Stacks arrays [n, ...] to [rows, length, ...] with zeros behind each."""
    out = np.zeros((len(rows), length, *rows[0].shape[1:]), rows[0].dtype)
    for padded, row in zip(out, rows):
        padded[: len(row)] = row
    return out


def sizes(batch: Batch) -> dict[str, int]:
    """How much of each axis is in use in the fullest row (in the longest clip, for frames).

    Returns:
      numbers of "tokens", and, if the batch has these arrays, of "tiles", "clips", "frames" and
      "text".
    """
    used = {"tokens": int((np.asarray(batch.segment_ids) > 0).sum(axis=1).max())}
    if batch.tiles is not None:
        used["tiles"] = int(np.asarray(batch.tile_mask).sum(axis=1).max())
    if batch.audio is not None:
        frames = np.asarray(batch.audio_mask).sum(axis=2)
        used |= {"clips": int((frames > 0).sum(axis=1).max()), "frames": int(frames.max())}
    if batch.text is not None:
        used["text"] = int((np.asarray(batch.text_segment_ids) > 0).sum(axis=1).max())
    return used


def cut(batch: Batch, used: Mapping[str, int]) -> Batch:
    """The batch with less padding; the loss stays what it was.

    Each axis shrinks to its limit (its length in `batch`), a half or a quarter of that, for frames
    also an eighth, whichever is the least that holds what is in use. Of tokens these are multiples
    of 128 if the limit is one, as kernels like it. Packed rows are nearly full along one axis at
    least, so that a stage meets few of the shapes there could be: in simulated mixtures of the
    stages at most 13 with two rows a batch, 8 with 8, 3 with 64.

    Args:
      batch: with its arrays as the loader made them.
      used: as `sizes` says, or more: of several processes, the largest of all.
    """

    def smaller(name, array):
        axes = _AXES.get(name, ("tokens",))
        ends = [_part(axis, limit, used[axis]) for axis, limit in zip(axes, array.shape[1:])]
        return array[(slice(None), *map(slice, ends))]

    held = {name: array for name, array in vars(batch).items() if array is not None}
    return Batch(**{name: smaller(name, array) for name, array in held.items()})


def _part(axis, limit, used):
    """The least part of `limit` that holds `used`."""
    most, least = _CUTS[axis]
    multiple = 128 if axis == "tokens" and limit % 128 == 0 else 1
    sizes = [-(-limit // (n * multiple)) * multiple for n in (1, 2, 4, 8) if n <= most]
    return min((size for size in sizes if size >= max(used, least)), default=limit)
