"""Samples made of nothing: coloured shapes with captions and questions, notes with names, sums.

Goes in: the name of a kind and a seed. Comes out: samples in the release's format whose pictures
and sounds are arrays, and a `Loader` of them for `--tiny` runs and tests. Read next: `loader.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
import PIL.Image
import PIL.ImageDraw

from vita_jax.batch import Batch
from vita_jax.config import HEARING, DataConfig
from vita_jax.data import utterance
from vita_jax.data.audio import SAMPLE_RATE_HZ
from vita_jax.data.collate import collate
from vita_jax.data.processor import Example, Processor

PREFIX = "synthetic:"
HELD_OUT = 1_000_003  # added to the seed for samples to validate with
COLOURS = {"red": "#d03030", "green": "#30a040", "blue": "#3050d0", "yellow": "#e0c030"}
SHAPES = ("square", "disc", "triangle")
NOTES_HZ = {"do": 262, "re": 294, "mi": 330, "fa": 349, "sol": 392, "la": 440, "si": 494}


def samples(kind: str, number: int, seed: int) -> list[dict]:
    """`number` samples in the release's format.

    Args:
      kind: "text", "captions", "qa", "speech" (transcribe), "spoken_qa", "noise" or "codec_tokens"
        (text with codec tokens).
      number: how many.
      seed: the same seed gives the same samples.

    Raises:
      ValueError: another kind.
    """
    if kind not in _KINDS:
        raise ValueError(f"{PREFIX}{kind}: expected one of {', '.join(_KINDS)}")
    rng = np.random.default_rng(seed)
    return [{"id": f"{kind} {i}", **_KINDS[kind](rng)} for i in range(number)]


class Loader:
    """Batches of synthetic samples, one sample a row, without end.

    The samples are drawn by the mixture's weights once; each epoch goes through them in an order of
    its own. All is in memory.
    """

    def __init__(
        self,
        data: DataConfig,
        processor: Processor,
        process_index: int = 0,
        process_count: int = 1,
        objective: str = "next_token",
        num_samples: int = 64,
    ):
        """Makes the samples.

        Args:
          data: its mixture is of {"synthetic:KIND": weight}.
          processor: of the model that is trained.
          process_index: which rows of a batch this process gets.
          process_count: into how many parts a batch is cut.
          objective: "next_token", or "ctc": `tokens` are then what a sample's clip says, alone.
          num_samples: of an epoch, at least; whole batches.
        """
        self.data, self.num_rejects = data, 0
        num_rows = data.batch_size // process_count
        self._rows = slice(process_index * num_rows, (process_index + 1) * num_rows)
        total = max(num_samples // data.batch_size, 1) * data.batch_size
        self._examples = _examples(data, processor, objective, total, data.seed)
        self._step = 0

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        size, data = self.data.batch_size, self.data
        epoch, start = divmod(self._step * size, len(self._examples))
        order = np.random.default_rng([data.seed, epoch]).permutation(len(self._examples))
        rows = [self._examples[i] for i in order[start : start + size]][self._rows]
        self._step += 1
        return _batch(rows, self._examples, data)

    @property
    def epoch(self) -> int:
        """Times that all samples have been gone through."""
        return self._step * self.data.batch_size // len(self._examples)

    def close(self) -> None:
        """Ends nothing: there are no workers."""

    def state(self) -> dict:
        """Where the next batch starts."""
        return {"step": self._step}

    def restore(self, state: dict) -> None:
        """Goes on where `state` was taken."""
        self._step = state["step"]


def held_out(
    data: DataConfig,
    processor: Processor,
    process_index: int = 0,
    process_count: int = 1,
    objective: str = "next_token",
    num_samples: int = 32,
) -> Iterator[Batch]:
    """One pass over samples of another seed than a `Loader` of the same `data` takes, one a row.

    Row r takes samples r, r + B, ...; rows that have run out are all padding. Arguments are as for
    `Loader`; `num_samples` is exact. Every process gives as many batches.
    """
    size, num_rows = data.batch_size, data.batch_size // process_count
    mine = slice(process_index * num_rows, (process_index + 1) * num_rows)
    examples = _examples(data, processor, objective, num_samples, data.seed + HELD_OUT)
    nothing = dataclasses.replace(
        examples[0], tokens=np.zeros(0, np.int32), loss_mask=np.zeros(0, np.float32), tiles=None,
        audio=(),
    )  # fmt: skip
    for start in range(0, num_samples, size):
        rows = examples[start : start + size]
        rows += [nothing] * (size - len(rows))
        yield _batch(rows[mine], examples, data)


def _examples(data, processor, objective, number, seed):
    """`number` examples, of each kind by its weight in the mixture."""
    weights = np.array(list(data.mixture.values())) / sum(data.mixture.values())
    counts = np.diff(np.round(np.cumsum([0, *weights]) * number).astype(int))
    rng = np.random.default_rng(seed)  # where pieces of clips start
    examples = [
        utterance.example(objective, processor, sample, data.max_tokens, rng)
        for (source, number) in zip(data.mixture, counts)
        for sample in samples(source.removeprefix(PREFIX), number, seed)
    ]
    if objective in HEARING:
        examples = [_transcript(example, processor.tokenizer) for example in examples]
    return examples


def _batch(rows, examples, data):
    """A batch of some of `examples`. With one of each kind in it, all have the same arrays."""
    fullest = [
        max(examples, key=lambda example: example.tiles is not None),
        max(examples, key=lambda example: len(example.audio)),
    ]
    batch = collate(
        [*rows, *fullest],
        data.max_tokens,
        data.max_tiles,
        data.max_clips,
        data.max_audio_frames,
    )
    return jax.tree.map(lambda x: x[: len(rows)], batch)


def _transcript(example, tokenizer):
    """The words of the reply in place of the conversation."""
    outside = (*tokenizer.state_ids.values(), tokenizer.eos_id)
    words = example.tokens[(example.loss_mask > 0) & ~np.isin(example.tokens, outside)]
    return Example(words, np.ones(len(words), np.float32), None, example.audio)


def _shape(rng):
    """A picture of a coloured shape, and the words for both."""
    colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    picture = PIL.Image.new("RGB", (28, 28), "white")
    draw = PIL.ImageDraw.Draw(picture)
    x, y = (int(v) for v in rng.integers(1, 9, 2))
    box, fill = (x, y, x + 18, y + 18), COLOURS[colour]
    if shape == "square":
        draw.rectangle(box, fill)
    elif shape == "disc":
        draw.ellipse(box, fill)
    else:
        draw.polygon([(x, y + 18), (x + 18, y + 18), (x + 9, y)], fill)
    return picture, colour, shape


def _tones(rng):
    """Two struck notes of 0.4 s and a little noise: ((samples, rate in Hz), their names).

    They die away because the audio encoder sees no more of time than changes: the frames of an even
    tone are all alike to it, so it could not spell a name over them.
    """
    names = rng.choice(list(NOTES_HZ), 2)
    seconds = np.arange(int(0.4 * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    loudness = 0.5 * np.exp(-8 * seconds)
    waves = [loudness * np.sin(2 * np.pi * NOTES_HZ[name] * seconds) for name in names]
    wave = np.concatenate(waves) + 0.001 * rng.standard_normal(2 * len(seconds))
    return (wave.astype(np.float32), SAMPLE_RATE_HZ), " ".join(names)


def _talk(question, reply, **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": reply}]
    return {"conversations": turns, **more}


def _text(rng):
    a, b = rng.integers(0, 10, 2)
    return _talk(f"{a} + {b} = ?", str(a + b))


def _caption(rng):
    picture, colour, shape = _shape(rng)
    return _talk("<image>Describe it.", f"a {colour} {shape}", image=picture)


def _question(rng):
    picture, colour, shape = _shape(rng)
    question, reply = (("What colour?", colour), ("What shape?", shape))[rng.integers(2)]
    return _talk(f"<image>{question}", reply, image=picture)


def _speech(rng):
    sound, names = _tones(rng)
    return _talk("Write down what you hear.<audio>", names, audio=[sound])


def _spoken_question(rng):
    (picture, colour, _), (sound, names) = _shape(rng), _tones(rng)
    return _talk("<image><audio>", f"{names}: {colour}", image=picture, audio=[sound])


def _noise(rng):
    sound = (0.1 * rng.standard_normal(SAMPLE_RATE_HZ)).astype(np.float32), SAMPLE_RATE_HZ
    return _talk("<audio>", "", audio=[sound], inserted_id=1)


def _codec_tokens(rng):
    """Each note a run of three codec tokens that grow with its pitch."""
    names = rng.choice(list(NOTES_HZ), 2)
    first = [4 * list(NOTES_HZ).index(name) for name in names]
    return {"text": " ".join(names), "codes": [code + i for code in first for i in range(3)]}


_KINDS = {
    "text": _text,
    "captions": _caption,
    "qa": _question,
    "speech": _speech,
    "spoken_qa": _spoken_question,
    "noise": _noise,
    "codec_tokens": _codec_tokens,
}
