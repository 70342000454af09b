"""The demo: three questions that come with the package, answered one after the other.

Goes in: an engine. Comes out: its replies, sound files of what it says, and one picture of it all.
The first question is English, the second Mandarin, each about a picture; the third is noise, which
a trained model knows from a question and does not answer. Read next: `infer/engine.py`, `plot.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vita_jax.data.audio import SAMPLE_RATE_HZ, read_audio, write_wav
from vita_jax.data.image import read_image
from vita_jax.infer.engine import AudioChunk, Engine, Reply
from vita_jax.plot import answers

SAMPLES = Path(__file__).parent / "samples"
MAX_NEW_TOKENS = 40
TIMES = ("first token", "first sound", "done")  # of `Reply.times_s`, to be told


@dataclasses.dataclass(frozen=True)
class Question:
    """A spoken question.

    Attributes:
      lang: "en", "zh", or "noise" for what asks nothing.
      text: what is said.
      audio: the clip.
      image: the picture that it is about, or None.
    """

    lang: str
    text: str
    audio: Path
    image: Path | None


QUESTIONS = (
    Question("en", "Which animal is this?", SAMPLES / "cat_en.flac", SAMPLES / "cat.png"),
    Question("zh", "有几个苹果？", SAMPLES / "apples_zh.flac", SAMPLES / "apples.png"),
    Question("noise", "(noise: nobody asks anything)", SAMPLES / "noise.flac", None),
)


def run(
    engine: Engine, folder: str | Path, questions: tuple[Question, ...] = QUESTIONS
) -> Iterator[tuple[Question, Reply, Path | None]]:
    """Asks the questions, each in a conversation of its own.

    Every question is asked once before, up to the first sound, so that nothing is compiled any more
    when it is timed.

    Args:
      engine: with a voice.
      folder: where a reply with sound is written, `1_en.wav` and so on, and, when all are answered,
        `demo.png`; made if it is not there.
      questions: to ask.

    Yields:
      each question as it is answered, the reply, and the sound file (None: nothing was said).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for question in questions:
        for event in engine.stream(**_given(question)):
            if isinstance(event, AudioChunk):
                break
    rows = []
    for number, question in enumerate(questions, 1):
        reply = engine.chat(**_given(question))
        file = folder / f"{number}_{question.lang}.wav" if len(reply.audio) else None
        if file:
            write_wav(file, reply.audio, reply.sample_rate_hz)
        rows.append(_row(question, reply))
        yield question, reply, file
    answers(rows, folder / "demo.png")


def _given(question):
    """A question as `Engine.stream` takes it."""
    images = [question.image] if question.image else []
    return {"images": images, "audio": question.audio, "max_new_tokens": MAX_NEW_TOKENS}


def _row(question, reply):
    """A question and its reply as `plot.answers` takes them."""
    times = [f"{k} after {reply.times_s[k]:.2f} s" for k in TIMES if k in reply.times_s]
    note = ", ".join(["state: " + (reply.state or "none"), *times])
    return {
        "image": np.asarray(read_image(question.image)) if question.image else None,
        "question": read_audio(question.audio),
        "question_rate_hz": SAMPLE_RATE_HZ,
        "asked": question.text,
        "answer": reply.audio,
        "answer_rate_hz": reply.sample_rate_hz,
        "replied": reply.text or "(nothing is said)",
        "note": note,
    }
