"""An examination: a model answers held-out samples, in text, and what it says is scored.

Goes in: an engine and the samples of a set. Comes out of each scoring function, `score(exam, name,
samples)`: a value by figure, and a record a sample. A value is a number; a list of one a sample, of
which the mean counts, None left out; or the reason why there is none. Read next: `exam_voice.py`,
which scores what is heard, then `eval_nano.py`, which says what set is scored how.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from vita_jax import evaluate
from vita_jax.data.processor import Turn
from vita_jax.data.shard import spoken
from vita_jax.infer.engine import Engine
from vita_jax.infer.likelihood import Candidates

BATCH_SIZE = 16  # turns, segments or clips at a time
MAX_NEW_TOKENS = {"answer": 48, "transcript": 160, "state": 1}
CANDIDATES = "candidates.json"  # in the folder of a set: what to choose from


class Unmeasured(Exception):
    """Why a set cannot be scored here."""


@dataclasses.dataclass
class Exam:
    """What the scoring functions share.

    Attributes:
      engine: the model that is examined.
      before: the model before its speech stages, or None.
      checkpoint: folder of `engine`.
      dtype: in which it computes.
      data: folder of the sets.
      out: folder where results go.
      progress: whether to draw bars.
    """

    engine: Engine
    before: Engine | None
    checkpoint: str
    dtype: str
    data: Path
    out: Path
    progress: bool = False
    _right: dict = dataclasses.field(default_factory=dict)

    def ask(self, turns, kind="answer", what="", engine=None) -> list[tuple[str | None, str]]:
        """(state, text) of the reply to each turn."""
        write = functools.partial(
            (engine or self.engine).write, max_new_tokens=MAX_NEW_TOKENS[kind]
        )
        return list(itertools.chain(*(write(few)[:n] for few, n in self.batches(turns, what))))

    def batches(self, items, what):
        """(BATCH_SIZE of `items`, how many of them count): the last ones are filled up, as another
        number would compile anew.
        """
        for start in self.track(range(0, len(items), BATCH_SIZE), what):
            few = items[start : start + BATCH_SIZE]
            yield [*few, *[few[-1]] * (BATCH_SIZE - len(few))], len(few)

    def track(self, items, what):
        """`items`, with a bar on the terminal if there are to be bars."""
        console = Console(stderr=True)
        return track(items, what, console=console, disable=not self.progress, transient=True)

    def right(self, name, samples, engine=None):
        """Whether the reply to each sample is the expected one, and records. Asked once."""
        key = name, engine is not None
        if key not in self._right:
            what = name + (" before" if engine else "")
            said = self.ask([turn(sample) for sample in samples], what=what, engine=engine)
            records = [record(x, got=text, state=state) for x, (state, text) in zip(samples, said)]
            self._right[key] = [is_right(x) for x in records], records
        return self._right[key]


def turn(sample: dict, recording: int | None = None) -> Turn:
    """The turn of a user that a sample stands for; with `recording`, a number, its words as one of
    its `recordings`.
    """
    if recording is not None:
        sample = spoken(sample, np.random.default_rng(recording))
    sounds = sample.get("audio") or [None]
    return Turn(
        text=sample["conversations"][0]["value"],
        images=sample.get("image") or (),
        audio=sounds[0] if isinstance(sounds, list) else sounds,
        video=sample.get("video"),
    )


def record(sample: dict, **got) -> dict:
    """A line of SET.jsonl: the sample's id, question, expected answer, and what was got."""
    question, expected = (message["value"] for message in sample["conversations"][:2])
    return {"id": sample.get("id"), "question": question, "expected": expected, **got}


def is_right(line: dict) -> bool:
    """Whether what was got is what was expected, to the character."""
    return line["got"].strip() == line["expected"].strip()


def majority(answers: list[str]) -> float:
    """Percent right of who always gives the most frequent answer."""
    return 100 * collections.Counter(answers).most_common(1)[0][1] / len(answers)


def place_of(scores: np.ndarray, index: int) -> int:
    """How many of float[n] `scores` are not below that of `index`: 1 is the first place."""
    return int((scores >= scores[index]).sum())


def exact(exam, name, samples):
    """Replies that are the expected ones to the character."""
    right, records = exam.right(name, samples)
    return {"exact %": percent(right)}, records


def with_floor(exam, name, samples):
    """As `exact`, beside who always gives the most frequent answer."""
    values, records = exact(exam, name, samples)
    return values | {"majority floor %": majority([x["expected"] for x in records])}, records


def together(exam, name, held):
    """As `exact`, of several sets."""
    right = [x for part, samples in held.items() for x in exam.right(part, samples)[0]]
    return {"exact %": percent(right)}, []


def ranked(exam, name, samples):
    """Places of the expected answers among all candidates by their likelihood."""
    file = exam.data / name / CANDIDATES
    texts = json.loads(file.read_text("utf-8")) if file.is_file() else None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{file}: expected a list of the answers to choose from")
    candidates, index = Candidates(exam.engine, texts), {text: i for i, text in enumerate(texts)}
    places, records = [], []
    for sample in exam.track(samples, name):
        line = record(sample)
        if line["expected"] not in index:
            raise ValueError(f"{file}: lacks {line['expected']!r}, which {line['id']} expects")
        scores = candidates.log_probabilities(turn(sample))
        places.append(place_of(scores, index[line["expected"]]))
        best = [texts[i] for i in np.argsort(-scores)[:5]]
        records.append(line | {"got": best[0], "place": places[-1], "best": best})
    return {f"top-{n} %": percent(place <= n for place in places) for n in (1, 5)}, records


def aloud(exam, name, samples):
    """The same questions written and spoken."""
    if silent := [sample.get("id") for sample in samples if not sample.get("recordings")]:
        raise ValueError(f"{name}: sample {silent[0]} has no recordings")
    written, records = exam.right(name, samples)
    said = exam.ask([turn(x, i) for i, x in enumerate(samples)], what=f"{name} aloud")
    records = [
        line | {"written": line["got"], "got": text, "state": state}
        for line, (state, text) in zip(records, said)
    ]
    heard = [is_right(line) for line in records]
    lost = 100 * (np.mean(written) - np.mean(heard))
    return {
        "written: right %": percent(written),
        "spoken: right %": percent(heard),
        "points lost": float(lost),
    }, records


def transcribed(lang):
    """A scoring function: word errors of English ("en"), character errors of Mandarin ("zh"), of
    what the model transcribes, and of what it writes if it is asked to. If it does not transcribe
    (`AudioConfig.aligned`), what it writes counts as both.
    """
    figure, split = {
        "en": ("WER %", evaluate.spelt_words),
        "zh": ("CER %", evaluate.characters),
    }[lang]

    def score(exam, name, samples):
        turns = [turn(sample) for sample in samples]
        said = [text for _, text in exam.ask(turns, "transcript", name)]
        read = exam.engine.config.audio.aligned
        got = [exam.engine.transcribe(x.audio) for x in exam.track(turns, name)] if read else said
        records = [record(x, got=a, asked=b) for x, a, b in zip(samples, got, said)]
        return {
            figure: errors(records, split),
            f"asked: {figure}": errors([x | {"got": x["asked"]} for x in records], split),
        }, records

    return score


def state_token(expected):
    """A scoring function: replies that begin with the state token `expected`."""

    def score(exam, name, samples):
        turns = [turn(x, i) for i, x in enumerate(samples)]
        records = [
            record(sample, got=state) | {"expected": expected}
            for sample, (state, _) in zip(samples, exam.ask(turns, "state", name))
        ]
        return {"state token right %": percent(x["got"] == expected for x in records)}, records

    return score


def lost(exam, name, held):
    """Points that each set of pictures has lost in the speech stages, and all of them together."""
    if exam.before is None:
        raise Unmeasured("give --before CKPT")
    points, records = {}, []
    for part, samples in held.items():
        now, lines = exam.right(part, samples)
        then, earlier = exam.right(part, samples, exam.before)
        points[part] = np.array(then, float) - np.array(now, float)
        records += [
            x | {"set": part, "before": old["got"]}
            for x, old in zip(lines, earlier)
            if x["got"] != old["got"]
        ]
    points["together"] = np.concatenate(list(points.values()))
    return {f"{part}: points lost": (100 * x).tolist() for part, x in points.items()}, records


def percent(flags) -> list[float]:
    """100.0 and 0.0 for true and false."""
    return [100.0 * bool(flag) for flag in flags]


def errors(records: list[dict], split) -> float:
    """Units of the expected texts got wrong, in percent; `split` as for `evaluate.error_rate`."""
    said, texts = ([line[key] for line in records] for key in ("got", "expected"))
    return 100 * evaluate.error_rate(said, texts, split)
