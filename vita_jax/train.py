"""The training loop, to be read from top to bottom: config -> mesh -> loader -> model -> state ->
compiled step -> loop.

Goes in: a `TrainConfig` and a folder. Comes out, in that folder:

    config.json      the stage as it runs
    metrics.jsonl    one object a line: step, loss, ...
    rejects.jsonl    samples that could not be used
    saves/           states to go on from
    model/           the trained model, for `vita chat` and `init_from`

A run that was stopped or killed goes on when it is started again in the same folder.
Read next: `losses.py`, `optim.py`, `train_state.py`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import signal
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from tqdm import tqdm

from vita_jax import config as configs
from vita_jax import params as trees
from vita_jax import train_state
from vita_jax.batch import Batch
from vita_jax.config import TrainConfig
from vita_jax.data import synthetic
from vita_jax.data.processor import Processor
from vita_jax.data.tokenizer import Tokenizer, load_bundled
from vita_jax.losses import ctc_loss, ctc_read, ctc_targets, next_token_loss, next_token_targets
from vita_jax.models.vita import Vita
from vita_jax.optim import make_optimizer, schedule
from vita_jax.sharding import batch_sharding, make_mesh, rules
from vita_jax.train_state import State

log = logging.getLogger(__name__)

# What may differ when a run goes on: where it is computed and what is kept, not the numbers.
_MAY_CHANGE = ("mesh", "log_every", "save_every", "keep", "max_skipped", "data/num_workers")


def train(config: TrainConfig, workdir) -> None:
    """Runs a stage to its end, or until SIGTERM; goes on from the last save in `workdir`.

    Args:
      config: the stage.
      workdir: folder of the run.

    Raises:
      FileNotFoundError, ValueError: config, data or weights are not as they must be.
      FloatingPointError: the loss or a gradient was not finite `max_skipped` times in a row.
    """
    workdir = Path(workdir)
    keep_config(config, workdir)
    if (workdir / "model").exists():
        log.info("%s is there: the run is over", workdir / "model")
        return
    mesh = make_mesh(config.mesh)
    rows = batch_sharding(mesh, config.data.batch_size // config.optim.accumulation)

    # Data. The first batch says which parts of the model it takes.
    tokenizer = load_tokenizer(config)
    loader = make_loader(config, tokenizer, workdir)
    first = loader.state()
    parts = used_parts(config, next(loader))
    loader.restore(first)

    # Parameters: those that train are float32, the others as they are computed with.
    origins = train_state.origins(config)
    trained, frozen = train_state.param_shapes(config, parts, mesh)
    log.info("%s", table(config, trained, frozen))
    frozen = train_state.place(origins, frozen)

    # State: as it was saved, or from the start.
    optimizer = make_optimizer(config.optim, config.num_steps, list(trees.flatten(trained)))
    shapes = train_state.state_shapes(trained, optimizer, mesh)
    shardings = jax.tree.map(lambda shape: shape.sharding, shapes)
    saves = train_state.Saves(workdir / "saves", config.keep)
    saved = saves.restore(shapes)
    if saved is None:
        start = functools.partial(train_state.start, optimizer=optimizer)
        state = jax.jit(start, out_shardings=shardings)(train_state.place(origins, trained))
    else:
        state, loader_state = saved
        loader.restore(loader_state)
    done = int(state.step)
    log.info("from step %d to %d", done, config.num_steps)

    step = make_step(config, optimizer)
    step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    to_devices = functools.partial(jax.make_array_from_process_local_data, rows)
    with (
        jax.set_mesh(mesh),
        rules(),
        stop_signal() as stop,
        metrics_file(workdir / "metrics.jsonl", done) as lines,
        progress_bar(config, done) as bar,
        contextlib.closing(saves),
        contextlib.closing(loader),
    ):
        late = None  # the step before: its numbers are read while the devices work on this one
        clock = Clock()
        while done < config.num_steps and not stop(done):
            with clock.waiting():
                batch = next(loader)
            state, metrics = step(state, frozen, jax.tree.map(to_devices, batch))
            done += 1
            if late is not None:
                report(config, *late, clock, lines, bar, workdir)
            late = done, metrics, batch
            if done % config.save_every == 0 and done < config.num_steps:
                saves.save(done, state, state_of(loader))
        if late is not None:
            report(config, *late, clock, lines, bar, workdir)
            saves.save(done, state, state_of(loader))

    if done == config.num_steps:
        train_state.export(workdir / "model", config, origins, state.params, tokenizer)
        log.info("%s: done. Try: vita chat %s", workdir, workdir / "model")
    else:
        log.info("%s: stopped and saved at step %d; start again to go on", workdir, done)


def make_step(config: TrainConfig, optimizer: optax.GradientTransformation):
    """The function of one step, to be compiled.

    Returns:
      function of (State, frozen parameters, Batch) to (State, metrics); metrics are scalars:
      loss (nats a target), accuracy, targets, grad_norm, learning_rate, skipped, skipped_now.
    """
    rate = schedule(config.optim, config.num_steps)
    loss = {"next_token": read_loss, "ctc": hear_loss}[config.objective]
    loss = functools.partial(loss, config, Vita(config.model.with_dtype(config.dtype)))

    def step(state: State, frozen, batch: Batch):
        def add(sums, piece):
            new = jax.value_and_grad(loss, has_aux=True)(state.params, frozen, piece)
            return jax.tree.map(jnp.add, sums, new), None

        # Sums over pieces, divided once: a target weighs the same in whatever piece it is.
        zeros = jax.tree.map(jnp.zeros_like, ((0.0, (0.0, 0.0)), state.params))
        pieces = jax.tree.map(lambda x: split_rows(x, config.optim.accumulation), batch)
        ((nats, (number, right)), grads), _ = jax.lax.scan(add, zeros, pieces)
        number = jnp.maximum(number, 1)
        grads = jax.tree.map(lambda g: g / number, grads)
        norm = optax.tree.norm(grads)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        finite = jnp.isfinite(nats) & jnp.isfinite(norm)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (optax.apply_updates(state.params, updates), opt_state),
            (state.params, state.opt_state),
        )
        after = State(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            skipped=state.skipped + ~finite,
            skipped_now=jnp.where(finite, 0, state.skipped_now + 1),
        )
        return after, {
            "loss": nats / number,
            "accuracy": right / number,
            "targets": number,
            "grad_norm": norm,
            "learning_rate": rate(state.step - state.skipped),
            "skipped": after.skipped,
            "skipped_now": after.skipped_now,
        }

    return step


def read_loss(config: TrainConfig, model: Vita, params, frozen, batch: Batch):
    """The next token of each conversation.

    Returns:
      sum of the loss over targets, float32[]; the number of targets, and how many of them were the
      likeliest token.
    """
    apply = functools.partial(model.apply, {"params": trees.merge(params, frozen)})
    targets, weights = next_token_targets(batch.tokens, batch.segment_ids, batch.loss_mask)
    hidden = apply(batch, method="hidden_states")
    logits_of = functools.partial(apply, method="logits")
    nats, right = next_token_loss(hidden, logits_of, targets, weights, config.loss_chunk)
    return nats, (weights.sum(), right)


def hear_loss(config: TrainConfig, model: Vita, params, frozen, batch: Batch):
    """What each clip says, by CTC. Returns as `read_loss`; right are the units of clips that are
    right as a whole.
    """
    params = trees.merge(params, frozen)
    logits, num_frames = model.apply(
        {"params": params}, batch.audio, batch.audio_mask, method="unit_logits"
    )
    labels, num_labels = ctc_targets(
        batch.tokens, batch.positions, batch.segment_ids, batch.audio.shape[1], logits.shape[1]
    )
    nats = jnp.where(num_labels > 0, ctc_loss(logits, num_frames, labels, num_labels), 0)
    right = (ctc_read(logits, num_frames) == labels).all(axis=-1)
    number = num_labels.astype(jnp.float32)
    return nats.sum(), (number.sum(), (number * right).sum())


def split_rows(x, number: int):
    """[B, ...] as [number, B / number, ...]: every piece has rows of every device."""
    return x.reshape(-1, number, *x.shape[1:]).swapaxes(0, 1)


def report(config, step, metrics, batch, clock, lines, bar, workdir):
    """Writes a line of metrics; stops the run if too many updates in a row were not finite."""
    metrics = {name: value.item() for name, value in jax.device_get(metrics).items()}
    bar.update()
    clock.tokens += int((batch.segment_ids > 0).sum()) * jax.process_count()
    if skipped := metrics.pop("skipped_now"):
        log.warning("step %d: loss or gradient not finite, update left out", step)
    if skipped >= config.max_skipped:
        held = {name: value for name, value in vars(batch).items() if value is not None}
        np.savez(workdir / "bad_batch.npz", **held)
        raise FloatingPointError(
            f"step {step}: the loss or a gradient was not finite {skipped} times in a row; the "
            f"batch is in {workdir / 'bad_batch.npz'}; try a lower optim.learning_rate"
        )
    if step % config.log_every == 0 or step == config.num_steps:
        line = {"step": step, **metrics, **clock.read()}
        line = {k: v if math.isfinite(v) else None for k, v in line.items()}  # JSON has no NaN
        lines.write(json.dumps(line) + "\n")
        lines.flush()
        bar.set_postfix(loss=f"{metrics['loss']:.4f}", tokens_s=f"{line['tokens_per_s']:.0f}")


class Clock:
    """Tokens a second and the share of time spent waiting for data, since they were last read."""

    def __init__(self):
        self.tokens, self._waited_s, self._since_s = 0, 0.0, time.monotonic()

    @contextlib.contextmanager
    def waiting(self):
        """Counts the time of its block as waiting for data."""
        start_s = time.monotonic()
        yield
        self._waited_s += time.monotonic() - start_s

    def read(self) -> dict[str, float]:
        """Both figures; starts anew."""
        seconds = time.monotonic() - self._since_s
        figures = {
            "tokens_per_s": self.tokens / seconds,
            "data_wait": self._waited_s / seconds,
        }
        self.__init__()
        return figures


def keep_config(config: TrainConfig, workdir: Path) -> None:
    """Writes config.json; what the folder holds already must come from the same numbers.

    Raises:
      ValueError: there are saves or a model of others; the first number is named.
    """
    file, tree = workdir / "config.json", configs.to_json(config)
    if (workdir / "model").exists() or any((workdir / "saves").glob("[0-9]*")):
        old, new = trees.flatten(json.loads(file.read_text())), trees.flatten(tree)
        for key in {**new, **old}:
            if key not in _MAY_CHANGE and old.get(key) != new.get(key):
                raise ValueError(
                    f"{file}: {key.replace('/', '.')} was {old.get(key)} and is {new.get(key)} "
                    "now; go on with the former, or name another --workdir"
                )
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(tree, indent=1))


def load_tokenizer(config: TrainConfig) -> Tokenizer:
    """That of the first folder of `init_from`; without one, that of the preset."""
    folders = train_state.init_folders(config)
    return Tokenizer.load(folders[0][1]) if folders else load_bundled(config.model.name)


def make_loader(config: TrainConfig, tokenizer: Tokenizer, workdir: Path):
    """The stage's batches, this process's rows of them.

    Raises:
      ValueError: the mixture has synthetic and real sources.
    """
    data = config.data
    processor = Processor(config.model, tokenizer, data.max_tokens, data.video_rate)
    share = {
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
        "objective": config.objective,
    }
    made_up = [source.startswith(synthetic.PREFIX) for source in data.mixture]
    if all(made_up):
        return synthetic.Loader(data, processor, **share)
    if any(made_up):
        raise ValueError(f"data.mixture: {synthetic.PREFIX}... does not mix with other sources")
    from vita_jax.data.loader import Loader

    return Loader(data, processor, workdir / "rejects.jsonl", **share)


def state_of(loader) -> dict:
    """The state of the loaders of all processes as one."""
    if jax.process_count() == 1 or isinstance(loader, synthetic.Loader):
        return loader.state()  # a synthetic one is the same everywhere
    from vita_jax.data.loader import merge_states

    text = np.frombuffer(json.dumps(loader.state()).encode(), np.uint8)
    length = multihost_utils.process_allgather(np.array(len(text))).max()
    padded = np.pad(text, (0, length - len(text)), constant_values=ord(" "))
    rows = multihost_utils.process_allgather(padded)
    return merge_states(json.loads(bytes(row)) for row in rows)


def used_parts(config: TrainConfig, batch: Batch) -> tuple[str, ...]:
    """The parts of the model that a batch goes through; the others are not loaded."""
    if config.objective == "ctc":
        return ("audio",)
    seen = ("vision",) * (batch.tiles is not None) + ("audio",) * (batch.audio is not None)
    return (*seen, "llm")


def table(config: TrainConfig, trained, frozen) -> str:
    """What trains, by part, and the memory of a device that parameters, gradients and moments take.

    Args:
      config: the stage.
      trained: tree of ShapeDtypeStruct with shardings.
      frozen: the same of what is frozen.
    """
    moments = np.dtype(config.optim.momentum_dtype).itemsize + 4
    rows = {}
    for tree, trains in ((trained, True), (frozen, False)):
        for path, shape in trees.flatten(tree).items():
            part = "/".join(path.split("/")[: 1 if path.startswith("llm/") else 2])
            row = rows.setdefault(part, {"all": 0, "trains": 0, "bytes": 0})
            size = shape.dtype.itemsize + (4 + moments) * trains
            row["all"] += math.prod(shape.shape)
            row["trains"] += math.prod(shape.shape) * trains
            row["bytes"] += math.prod(shape.sharding.shard_shape(shape.shape)) * size
    lines = [f"{'part':<18}{'parameters':>16}{'train':>16}{'MB a device':>14}"]
    lines += [
        f"{part:<18}{row['all']:>16,}{row['trains']:>16,}{row['bytes'] / 1e6:>14,.1f}"
        for part, row in rows.items()
    ]
    return "\n".join(lines)


@contextlib.contextmanager
def stop_signal():
    """A function of the step that says whether to stop: after SIGTERM, in every process at once."""
    if jax.process_count() > 1:  # JAX listens for SIGTERM itself and finds a step for all
        yield multihost_utils.reached_preemption_sync_point
        return
    stop = threading.Event()
    former = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield lambda step: stop.is_set()
    finally:
        signal.signal(signal.SIGTERM, former)


def progress_bar(config: TrainConfig, done: int):
    """A bar that counts steps: of the first process, on a terminal."""
    disable = True if jax.process_index() else None
    return tqdm(total=config.num_steps, initial=done, unit="step", disable=disable)


@contextlib.contextmanager
def metrics_file(file: Path, done: int):
    """The open file, without the lines of steps after `done`, which are run again.

    It is the first process's; what others write goes nowhere.
    """
    file = Path(os.devnull) if jax.process_index() else file
    if file.exists():
        kept = [line for line in file.read_text().splitlines(True) if _step(line) <= done]
        file.write_text("".join(kept))
    with open(file, "a", encoding="utf-8") as lines:
        yield lines


def _step(line):
    """The step of a line, beyond all for one that was cut off."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf
