"""One shard of the data: samples drawn, shuffled, processed and packed into rows.

Goes in: the sources, and how many samples of each the shard has drawn. Comes out: the next row, and
the new counts. Everything follows from the seed and the counts, so these are the whole state.
Read next: `loader.py`, which makes batches of the rows of many shards.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

from vita_jax.batch import Batch
from vita_jax.config import HEARING
from vita_jax.data import utterance
from vita_jax.data.augment import Augment
from vita_jax.data.processor import Example, Processor
from vita_jax.data.prompts import AUDIO, IMAGE, VIDEO
from vita_jax.data.units import Units, apart, check_head

MAX_SILENT = 16  # bad samples after which a row is over, so that they are reported
MIX, SHUFFLE, SAMPLE, HELD_OUT = range(4)  # which random stream


class Reader:
    """What shards have in common: sources, order, and how a sample becomes part of a row."""

    def __init__(self, data, processor, sources, objective):
        # The words of a clip are few; the conversation around them does not enter the row.
        limit = processor.max_tokens if objective in HEARING else data.max_tokens
        augment = None
        if data.augment_audio:
            augment = Augment.with_noises(data.noises) if data.noises else Augment()
        self.processor = Processor(
            processor.config, processor.tokenizer, limit, data.video_rate, augment
        )
        self.data, self.sources, self.objective = data, sources, objective
        self.units = Units.load(data.units) if data.units and objective == "ctc" else None
        if objective == "ctc":
            units, name = self.units or processor.tokenizer, data.units or "tokenizer"
            check_head(units, processor.config.audio.num_units, name)
        self.num_groups = math.gcd(data.batch_size, data.num_shards)
        self.weights = np.cumsum(list(data.mixture.values())) / sum(data.mixture.values())
        media = frozenset().union(*(source.media for source in sources))
        self.has_tiles = bool(media & {"image", "video"}) and objective in ("next_token", "match")
        heard = media & ({"audio", "recordings"} if data.spoken_share else {"audio"})
        self.has_audio = bool(heard) and objective in ("next_token", *HEARING)

    def identity(self):
        """What the stream of samples depends on; not where they lie."""
        data = dataclasses.asdict(self.data)
        for key in ("mixture", "held_out", "noises", "num_workers", "max_reject_share"):
            del data[key]
        weights, sizes = list(self.data.mixture.values()), [len(s) for s in self.sources]
        units = self.units and self.units.checksum
        return data | {
            "objective": self.objective, "weights": weights, "sizes": sizes, "units": units
        }  # fmt: skip

    def shard_of_row(self, step, row):
        """Shard that row `row` of batch `step` comes from. The greatest common divisor of rows and
        shards is a number of groups; a group of shards fills a group of rows by turns.
        """
        num_rows = self.data.batch_size // self.num_groups
        num_shards = self.data.num_shards // self.num_groups
        group, place = divmod(row, num_rows)
        return group * num_shards + (step * num_rows + place) % num_shards

    def group_of(self, shard):
        return shard * self.num_groups // self.data.num_shards

    def size(self, number, shard):
        """Samples of a source in a shard. One with fewer samples than shards is whole in each."""
        total, shards = len(self.sources[number]), self.data.num_shards
        return total if total < shards else len(range(shard, total, shards))

    def random(self, purpose, *key):
        return np.random.default_rng([purpose, self.data.seed, *key])

    def choose(self, shard, draw):
        """Number of the source of a shard's `draw`-th sample."""
        at = self.random(MIX, shard, draw).random()
        return min(int(np.searchsorted(self.weights, at, "right")), len(self.weights) - 1)

    def shuffled(self, number, shard, epoch):
        """Indices of a source's samples that are in a shard, in the order of one pass."""
        order = self.random(SHUFFLE, shard, number, epoch).permutation(self.size(number, shard))
        whole = len(self.sources[number]) < self.data.num_shards
        return order if whole else shard + order * self.data.num_shards

    def example(self, number, index, rng) -> Example:
        """One sample as arrays that fit into a row. ValueError or OSError: a bad sample."""
        with self.sources[number].open(index) as sample:
            if rng.random() < self.data.spoken_share:
                sample = spoken(sample, rng)
            example = utterance.example(
                self.objective, self.processor, sample, self.data.max_tokens, rng
            )
        if self.objective in HEARING:
            example = self._transcript(example)
        frames = max(map(len, example.audio), default=0)
        for what, size, limit in (
            ("tokens", len(example.tokens), "max_tokens"),
            ("tiles", _num_tiles(example), "max_tiles"),
            ("clips", len(example.audio), "max_clips"),
            ("frames in a clip", frames, "max_audio_frames"),
        ):
            if size > (most := getattr(self.data, limit)):
                raise ValueError(f"{size} {what}, over data.{limit}={most}")
        if not example.loss_mask[1:].any() and self.objective not in HEARING:
            raise ValueError("no target in it")
        return example

    def _transcript(self, example):
        """The words of a clip in place of the conversation about it."""
        tokenizer = self.processor.tokenizer
        outside = (*tokenizer.state_ids.values(), tokenizer.eos_id)
        words = example.tokens[(example.loss_mask > 0) & ~np.isin(example.tokens, outside)]
        text = tokenizer.decode(words)
        if self.units is None:  # a token of several Han characters is rare, each of these is not
            words = [token for piece in apart(text) for token in tokenizer.encode(piece)]
        else:
            words = self.units.encode(text)
        words = np.asarray(words, np.int32)
        if len(example.audio) != 1 or not len(words):
            raise ValueError(f"{len(example.audio)} clips, {len(words)} targets; expected one clip")
        audio, aligned = self.processor.config.audio, self.objective == "align"
        frames_of = audio.adapter_frames if aligned else audio.encoder_frames
        frames = frames_of(len(example.audio[0]))
        # Between two equal targets CTC needs a blank.
        needed = len(words) + int((words[1:] == words[:-1]).sum())
        if needed > frames:
            what = "embeddings" if aligned else "encoder frames"
            raise ValueError(f"targets need {needed} {what}, the clip has {frames}")
        return Example(words, np.ones(len(words), np.float32), None, example.audio)

    def fits(self, examples) -> bool:
        """Whether there is room for all of them in one row."""
        return (
            (self.objective != "codec" or len(examples) == 1)
            and sum(len(e.tokens) for e in examples) <= self.data.max_tokens
            and sum(map(_num_tiles, examples)) <= self.data.max_tiles
            and sum(len(e.audio) for e in examples) <= self.data.max_clips
        )

    def row(self, examples) -> dict[str, np.ndarray]:
        """The fields of `Batch` for one row of examples, perhaps of none, not padded yet."""
        lengths = [len(example.tokens) for example in examples]
        whole = not self.data.isolate and self.objective not in HEARING
        spans = [sum(lengths)] if whole else lengths  # the release lets packed samples see others
        config = self.processor.config
        out = {
            "tokens": _joined([e.tokens for e in examples], np.int32),
            "positions": _joined([np.arange(n) for n in spans], np.int32),
            "segment_ids": _joined([np.full(n, i) for i, n in enumerate(spans, 1)], np.int32),
            "loss_mask": _joined([e.loss_mask for e in examples], np.float32),
        }
        if self.has_tiles:
            px = config.vision.tile_px
            tiles = [e.tiles for e in examples if e.tiles is not None]
            out["tiles"] = _joined(tiles, np.float32, px, px, 3)
            out["tile_mask"] = np.ones(len(out["tiles"]), bool)
        if self.has_audio:
            clips = [clip for example in examples for clip in example.audio]
            frames = np.array([len(clip) for clip in clips], int)
            mask = np.arange(frames.max(initial=0)) < frames[:, None]
            audio = np.zeros((*mask.shape, config.audio.num_mel_bins), np.float32)
            for at, clip in enumerate(clips):
                audio[at, : len(clip)] = clip
            out |= {"audio": audio, "audio_mask": mask}
        if self.objective == "codec":
            out["waveform"] = _joined([e.waveform for e in examples], np.float32, self._num_samples)
        if self.objective == "speech":
            ids = [np.full(len(e.text), i) for i, e in enumerate(examples, 1)]
            out["text"] = _joined([e.text for e in examples], np.int32)
            out["text_segment_ids"] = _joined(ids, np.int32)
        return out

    @property
    def _num_samples(self):
        """Of a piece of a clip."""
        return self.data.max_tokens * self.processor.config.codec.samples_per_token

    def batch(self, rows) -> Batch:
        """A batch of rows as `row` makes them, padded to the limits."""
        c, config = self.data, self.processor.config
        px = config.vision.tile_px
        shapes = {
            "tiles": (c.max_tiles, px, px, 3),
            "tile_mask": (c.max_tiles,),
            "audio": (c.max_clips, c.max_audio_frames, config.audio.num_mel_bins),
            "audio_mask": (c.max_clips, c.max_audio_frames),
        }
        if self.objective == "codec":
            shapes["waveform"] = (2, self._num_samples)
        if self.objective == "speech":
            max_text = c.max_tokens // config.speech_frames_per_token
            shapes |= dict.fromkeys(("text", "text_segment_ids"), (max_text,))
        out = {}
        for name, first in rows[0].items():
            out[name] = np.zeros((len(rows), *shapes.get(name, (c.max_tokens,))), first.dtype)
            for place, row in zip(out[name], rows):
                place[tuple(map(slice, row[name].shape))] = row[name]
        return Batch(**out)


class Shard:
    """One shard: what it draws next, and the example that did not fit into the last row."""

    def __init__(self, reader, shard, state):
        self.reader, self.shard = reader, shard
        self.counts, self.num_rejects = list(state["counts"]), state["rejects"]
        self.left = None  # (number of its source, example); not counted until it is in a row
        self.order = {}  # by number of the source: pass, and indices in its order

    def next(self):
        """{"row", "state", "rejects"}; `row` is empty if only bad samples came by."""
        examples, rejects = [], []
        while len(rejects) < MAX_SILENT:
            self.left = self.left or self._read(rejects)
            if self.left is None:
                continue
            number, example = self.left
            if not self.reader.fits([*examples, example]):
                break
            examples.append(example)
            self.counts[number] += 1
            self.left = None
        state = {"counts": list(self.counts), "rejects": self.num_rejects}
        row = self.reader.row(examples) if examples else {}
        return {"row": row, "state": state, "rejects": rejects}

    def _read(self, rejects):
        """The next (source, example), or None and one more in `rejects`."""
        draw = sum(self.counts)
        number = self.reader.choose(self.shard, draw)
        epoch, at = divmod(self.counts[number], self.reader.size(number, self.shard))
        if self.order.get(number, (None,))[0] != epoch:
            self.order[number] = epoch, self.reader.shuffled(number, self.shard, epoch)
        index = int(self.order[number][1][at])
        try:
            rng = self.reader.random(SAMPLE, self.shard, draw)
            return number, self.reader.example(number, index, rng)
        except (ValueError, OSError) as error:
            source = self.reader.sources[number].name
            place = {"source": source, "index": index, "shard": self.shard, "draw": draw}
            rejects.append(place | {"reason": str(error)})
            self.counts[number] += 1
            self.num_rejects += 1
            return None


def one_pass(reader: Reader, start: int, step: int, rejects: list[str]) -> Iterator[dict]:
    """Rows of every `step`-th sample of all sources, one source behind the other, once each.

    Args:
      reader: of the sources.
      start: the first sample.
      step: from one sample to the next.
      rejects: gets the reason for each bad sample, which is left out.
    """
    samples = ((k, i) for k, source in enumerate(reader.sources) for i in range(len(source)))
    row = []
    for number, index in itertools.islice(samples, start, None, step):
        try:
            example = reader.example(number, index, reader.random(HELD_OUT, number, index))
        except (ValueError, OSError) as error:
            rejects.append(f"{reader.sources[number].name}, sample {index}: {error}")
            continue
        if not reader.fits([*row, example]):
            yield reader.row(row)
            row = []
        row.append(example)
    if row:
        yield reader.row(row)


def spoken(sample: Mapping, rng: np.random.Generator) -> Mapping:
    """The sample with one of the `recordings` of its first question in place of the words.

    Pictures and video stay. A sample without recordings stays as it is. Source: VITA-1.5 paper,
    stage 2.2 (about half of the text questions are spoken).
    """
    match sample:
        case {
            "recordings": [_, *_] as recordings,
            "conversations": [{"value": str(text)} as first, *others],
        } if AUDIO not in text:
            marks = "".join(re.findall(f"{IMAGE}|{VIDEO}", text))
            first = first | {"value": marks + ("\n" if marks else "") + AUDIO}
            later = sample.get("audio") or []
            sounds = [
                recordings[rng.integers(len(recordings))],
                *(later if isinstance(later, list) else [later]),
            ]
            return {**sample, "audio": sounds, "conversations": [first, *others]}
    return sample


def _num_tiles(example):
    return 0 if example.tiles is None else len(example.tiles)


def _joined(pieces, dtype, *shape):
    """Arrays [n, *shape] one behind the other; there may be none."""
    return np.concatenate([np.zeros((0, *shape), dtype), *pieces], dtype=dtype)
