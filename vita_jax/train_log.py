"""What a run says while it goes on: lines of metrics, a bar on a terminal, TensorBoard events.

Goes in: metrics of steps and of validations. Comes out: `metrics.jsonl`, one object a line, each
with its `step`. Training lines have `loss`, those of validations `held_out_loss`. Read next:
`plot.py`, which draws them.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import math
import os
import time
from pathlib import Path

import jax
import rich
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from vita_jax.config import TrainConfig
from vita_jax.flops import matmul_flops_per_s

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


class RunLog:
    """The metrics of a run, and how fast it is. Only the first process writes anything."""

    def __init__(self, config: TrainConfig, workdir: Path, done: int):
        """Opens `metrics.jsonl`; lines of steps after `done`, which are run again, go away.

        Args:
          config: the stage.
          workdir: folder of the run.
          done: steps.
        """
        self._config, self._last = config, done
        self._flops_per_s = matmul_flops_per_s(config.dtype)
        self._clear()
        with contextlib.ExitStack() as stack:
            file = Path(os.devnull) if jax.process_index() else workdir / METRICS
            if file.exists() and not jax.process_index():
                kept = [x for x in file.read_text("utf-8").splitlines(True) if _step(x) <= done]
                file.write_text("".join(kept), "utf-8")
            self._lines = stack.enter_context(open(file, "a", encoding="utf-8"))
            self._events = stack.enter_context(_events(workdir))
            self._bar = stack.enter_context(_bar())
            self._stack = stack.pop_all()
        self._task = self._bar.add_task(
            workdir.name, total=config.num_steps, completed=done, figures=""
        )

    def close(self) -> None:
        """Closes what is open."""
        self._stack.close()

    @contextlib.contextmanager
    def waiting(self):
        """Counts the time of its block as waiting for data."""
        start_s = time.monotonic()
        yield
        self._waited_s += time.monotonic() - start_s

    @contextlib.contextmanager
    def aside(self):
        """Leaves the time of its block out of the speed of training."""
        start_s = time.monotonic()
        yield
        self._aside_s += time.monotonic() - start_s

    def train(self, step: int, metrics: dict[str, float], tokens: float, flops: float) -> None:
        """Takes a step's metrics and work, that of all processes. Writes them every `log_every`
        steps, with the speed since then: `tokens_per_s`, `mfu` (share of the measured rate of
        matrix products), `data_wait` (share of time) and `seconds`.
        """
        self._tokens += tokens
        self._flops += flops
        self._bar.update(self._task, completed=step)
        if step % self._config.log_every and step != self._config.num_steps:
            return
        seconds = time.monotonic() - self._since_s
        busy_s = seconds - self._aside_s
        speed = {
            "tokens_per_s": self._tokens / busy_s,
            "mfu": self._flops / busy_s / self._flops_per_s,
            "data_wait": self._waited_s / busy_s,
            "seconds": seconds,
        }
        left_s = (self._config.num_steps - step) * seconds / max(step - self._last, 1)
        self._last = step
        self._clear()
        self._write(step, metrics | speed)
        figures = (
            f"loss {metrics['loss']:.4f}  {speed['tokens_per_s']:.0f} tokens/s  "
            f"MFU {speed['mfu']:.0%}  data wait {speed['data_wait']:.0%}"
        )
        if self._bar.disable and not jax.process_index():
            left = datetime.timedelta(seconds=round(left_s))
            log.info("step %d/%d  %s  left %s", step, self._config.num_steps, figures, left)
        self._bar.update(self._task, figures=figures)

    def held_out(self, step: int, metrics: dict[str, float], is_best: bool) -> None:
        """Takes the metrics of a validation."""
        self._write(step, {f"held_out_{name}": value for name, value in metrics.items()})
        shown = ("loss", "error", "exact", "stoi", "heard_error")
        figures = "  ".join(f"{name} {metrics[name]:.4f}" for name in shown if name in metrics)
        log.info("step %d, held out: %s%s", step, figures, "  (best so far)" * is_best)

    def _write(self, step, values):
        values = {k: v if math.isfinite(v) else None for k, v in values.items()}  # no NaN in JSON
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        self._lines.flush()
        self._events(step, values)

    def _clear(self):
        self._tokens = self._flops = self._waited_s = self._aside_s = 0.0
        self._since_s = time.monotonic()


def read_metrics(workdir: Path) -> list[dict]:
    """The lines of a run.

    Raises:
      FileNotFoundError: there are none.
    """
    file = Path(workdir) / METRICS
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; give the --workdir of a `vita train`")
    lines = file.read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines if _step(line) < math.inf]


def _step(line):
    """The step of a line, beyond all for one that was cut off."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def _bar():
    """A bar that counts steps, drawn by the first process on a terminal."""
    console = rich.get_console()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        console=console,
        disable=bool(jax.process_index()) or not console.is_terminal,
        speed_estimate_period=600,
    )


@contextlib.contextmanager
def _events(workdir):
    """A function of a step and values that writes TensorBoard events, if the package is there."""
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ModuleNotFoundError:
        yield lambda step, values: None
        return
    if jax.process_index():
        yield lambda step, values: None
        return
    writer = EventFileWriter(str(workdir))

    def write(step, values):
        scalars = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in values.items()
            if value is not None
        ]
        writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))

    try:
        yield write
    finally:
        writer.close()
