"""`vita bench all`: every figure that has a bar, in one table.

Goes in: a checkpoint, whose figures are those of a CPU beside PyTorch; or a preset, with random
weights, whose figures are those of an accelerator beside its limits. Comes out: a report, and what
it was made of. Read next: `bench_programs.py`, `bench_chat.py`.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib.util
import multiprocessing
import os

import jax
import numpy as np
from rich.markup import escape
from rich.table import Table

from vita_jax import bench, bench_chat, bench_programs
from vita_jax import config as configs
from vita_jax.bench_chat import Question
from vita_jax.bench_programs import Work
from vita_jax.eval_nano import Bar

AHEAD = Bar(1.0)  # of the faster PyTorch
RACED = ("decode", "prefill", "speech", "codec")
NUM_TEXT = 1000  # tokens of the prompt of an accelerator's figures
CLIPS = 32  # heard at once
SOUND_S = 3.5
NO_PEER = "needs PyTorch and transformers: pip install 'vita_jax[convert]'"


def run(work: Work, num_slots: int | None = None, num_cores: int = 2) -> dict:
    """Measures all that there is a bar for.

    Args:
      work: the model; `num_tokens` and `num_rows` do not count.
      num_slots: most users at a time; None is 4 for a checkpoint, 16 for a preset.
      num_cores: cores of the CPU that a checkpoint's figures belong to.

    Returns:
      a report: `rows`, objects with where, what, bar, value, met and note; `parts`, the reports
      that they come from; dtype, model and machine.

    Raises:
      FileNotFoundError, ValueError: a model that cannot be used or has no voice.
    """
    if work.model in configs.PRESETS:
        where, (rows, parts) = jax.devices()[0].device_kind, _accelerator(work, num_slots or 16)
    else:
        where, (rows, parts) = f"{num_cores} CPU cores", _cpu(work, num_slots or 4, num_cores)
    about = {"model": work.model, "dtype": work.dtype, "machine": bench.machine()}
    return {"what": "all", "rows": [{"where": where} | row for row in rows], "parts": parts} | about


def table(report: dict) -> Table:
    """The report, to be printed."""
    machine = report["machine"]
    shown = Table(
        title=f"{report['model']}, {report['dtype']}",
        caption=f"{machine['processor']}, {machine['cores']} cores, {machine['device']}",
    )
    for name in ("where", "what", "bar", "figure", "met"):
        shown.add_column(name, justify="right" if name in ("bar", "figure") else "left")
    for row in report["rows"]:
        met = {True: "[green]yes", False: "[red]no", None: ""}[row["met"]]
        met += f"[yellow]{escape(row['note'])}" if row["note"] else ""
        value = "-" if row["value"] is None else f"{row['value']:.4g}"
        shown.add_row(row["where"], row["what"], row["bar"] or "", value, met)
    return shown


def _cpu(work, num_slots, num_cores):
    """Rows and parts of a small model on a CPU."""
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    parts, rows = {}, []
    if not missing:
        raced = bench_programs.measure_beside_torch(RACED, work, num_cores=num_cores)
        parts["programs"] = raced
    for i, name in enumerate(RACED):
        what = f"{name}: PyTorch's time to ours"
        found = {} if missing else parts["programs"]["rows"][i]
        note = NO_PEER if missing else found["note"]
        rows.append(_row(what, found.get("ratio"), AHEAD, note))
    cores = sorted(os.sched_getaffinity(0))[:num_cores]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn, _pin, (cores,)) as process:
        chat = process.submit(bench_chat.chat, work).result()
        many = process.submit(bench_chat.load_of_users, work, num_slots).result()
    fullest = many["rows"][-1]
    rows += [
        _row("end of question to first sound, p50 (s)", chat["clocks"]["engine"]["p50_s"],
             Bar(0.6, at_most=True)),
        _row("the same of the model clock (s)", chat["clocks"]["model"]["p50_s"]),
        _row("real-time factor", chat["real_time_factor"], Bar(0.5, at_most=True)),
        _row("fresh process to first sound, cache warm (s)", chat["fresh_s"]["warm cache"],
             Bar(6.0, at_most=True)),
        _row(f"{num_slots} users: p95 to first sound (s)", fullest["p95_s"]),
        _row(f"{num_slots} users: playback gaps", fullest["gaps"]),
    ]  # fmt: skip
    return rows, parts | {"chat": chat, "load": many}


def _accelerator(work, num_slots):
    """Rows and parts of a large model with random weights on this machine's first device."""
    sized = dataclasses.replace(work, num_tokens=NUM_TEXT)
    programs = bench_programs.measure(("decode", "encode", "prompt", "speech", "codec"), sized)
    found = {row["program"]: row for row in programs["rows"]}
    many = dataclasses.replace(work, num_rows=CLIPS)
    clips = bench_programs.measure(("clips",), many)
    int8 = bench_programs.measure(("decode",), dataclasses.replace(sized, int8=True))
    question = _question(work)
    engine = bench_chat.engine_of(work)
    chat = bench_chat.chat(work, (question,), fresh=False, engine=engine)
    del engine
    load = bench_chat.load_of_users(work, num_slots, (question,), (num_slots,))
    fullest = load["rows"][-1]
    faster = found["decode"]["p50_s"] / int8["rows"][0]["p50_s"]
    rows = [
        _row("decode, batch 1: share of copy bandwidth", found["decode"]["of_copy"], Bar(0.8)),
        _row("decode, batch 1: tokens a second", found["decode"]["per_s"]),
        _row("the same with int8 weights: times as fast", faster, Bar(1.7)),
        _row("prefill, 1,000 tokens, a tile, 3.5 s: share of matmul rate",
             found["prompt"]["of_matmul"], Bar(0.5)),
        _row("model clock, p50 (s)", chat["clocks"]["model"]["p50_s"], Bar(0.1, at_most=True)),
        _row("engine clock, p50 (s)", chat["clocks"]["engine"]["p50_s"], Bar(0.15, at_most=True)),
        _row(f"audio encoder, {CLIPS} clips: real-time factor", 1 / clips["rows"][0]["per_s"],
             Bar(0.0005, at_most=True)),
        _row("audio encoder, a clip of 3.5 s (s)", found["clip"]["p50_s"],
             Bar(0.005, at_most=True)),
        _row(f"{num_slots} slots: p95 of the engine clock (s)", fullest["p95_s"],
             Bar(0.5, at_most=True)),
        _row(f"{num_slots} slots: playback gaps", fullest["gaps"], Bar(0, at_most=True)),
    ]  # fmt: skip
    parts = {"programs": programs, "clips": clips, "int8": int8, "chat": chat, "load": load}
    return rows, parts


def _question(work):
    """3.5 s of sound about a tile, behind a history."""
    config = configs.override(configs.PRESETS[work.model](), work.overrides)
    px, sound = config.vision.tile_px, np.random.default_rng(0)
    image = np.full((px, px, 3), 128, np.uint8)
    samples = 0.1 * sound.standard_normal(int(SOUND_S * 16000), np.float32)
    return Question(samples, image, history=NUM_TEXT)


def _row(what, value, bar=None, note=""):
    return {
        "what": what,
        "bar": bar and str(bar),
        "value": value,
        "met": bar.met(value) if bar and value is not None else None,
        "note": note,
    }


def _pin(cores):
    """Keeps a process that has not computed anything yet, and those it starts, to CPU cores."""
    os.sched_setaffinity(0, cores)
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
