"""The training loop, to be read from top to bottom: config -> mesh -> loader -> model -> state ->
compiled step -> loop.

Goes in: a `TrainConfig` and a folder. Comes out, in that folder:

    config.json      the stage as it runs
    metrics.jsonl    one object a line: step, loss, ... (`vita plot` draws them)
    rejects.jsonl    samples that could not be used
    saves/           states to go on from
    model/           the trained model, for `vita chat` and `init_from`: with held-out samples that
                     of the step that did best on them, else the last

A run that was stopped or killed goes on when it is started again in the same folder.
Read next: `feed.py`, `objectives.py`, `optim.py`, `train_state.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
import signal
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from vita_jax import config as configs
from vita_jax import lora, train_state
from vita_jax import params as trees
from vita_jax.batch import Batch
from vita_jax.config import TrainConfig
from vita_jax.data import synthetic
from vita_jax.evaluate import Listener
from vita_jax.feed import (
    load_captions,
    load_tokenizer,
    make_loaders,
    make_processor,
    of_all,
    same_size,
    state_of,
    used_parts,
    with_tokens,
    with_voice,
    work_of,
)
from vita_jax.losses import state_targets
from vita_jax.objectives import make_loss, means, settle
from vita_jax.optim import make_optimizer, muon_weights, schedule
from vita_jax.sharding import batch_sharding, make_mesh, rules
from vita_jax.train_log import RunLog
from vita_jax.train_state import State

log = logging.getLogger(__name__)

CODEWORDS = "codec/codebooks/code"
# What may differ when a run goes on: where it is computed and what is kept, not the numbers.
_MAY_CHANGE = (
    "mesh", "remat", "log_every", "save_every", "validate_every", "keep", "max_skipped",
    "data/num_workers", "data/held_out",
)  # fmt: skip


def train(config: TrainConfig, workdir, profile: tuple[int, int] | None = None) -> None:
    """Runs a stage to its end, or until SIGTERM; goes on from the last save in `workdir`.

    Args:
      config: the stage.
      workdir: folder of the run.
      profile: first and last step of which a trace is written to `workdir`/profile.

    Raises:
      FileNotFoundError, ValueError: config, data or weights are not as they must be.
      FloatingPointError: the loss or a gradient was not finite `max_skipped` times in a row.
      OSError: a save could not be written; the one before is what the run goes on from.
    """
    workdir = Path(workdir)
    keep_config(config, workdir)
    if (workdir / "model").exists():
        log.info("%s is there: the run is over", workdir / "model")
        return
    mesh = make_mesh(config.mesh)
    rows = batch_sharding(mesh, config.data.batch_size // config.optim.accumulation)

    # Data. The first batch says which parts of the model it takes.
    config = with_tokens(config, workdir)
    tokenizer = load_tokenizer(config)
    loader, held_out = make_loaders(config, tokenizer, workdir)
    captions = load_captions(config, make_processor(config, tokenizer))
    start = loader.state()
    parts = used_parts(config, next(loader))
    loader.restore(start)

    # Parameters: those that train are float32, the others as they are computed with.
    origins = train_state.origins(config)
    trained, frozen = train_state.param_shapes(config, parts, mesh)
    paths = list(trees.flatten(trained))
    log.info("%s", table(config, trained, frozen))
    frozen = train_state.place(origins, frozen)

    # State: as it was saved, or from the start.
    optimizer = make_optimizer(config.optim, config.num_steps, paths, config.model)
    shapes = train_state.state_shapes(trained, optimizer, mesh)
    shardings = jax.tree.map(lambda shape: shape.sharding, shapes)
    saves = train_state.Saves(workdir / "saves", config.keep)
    saved = saves.restore(shapes)
    if saved is None:
        drawn = origins.get(CODEWORDS) is not None and origins[CODEWORDS].file is None
        begin = functools.partial(
            train_state.start, optimizer=optimizer, codebooks_use=0.0 if drawn else 1.0
        )
        state = jax.jit(begin, out_shardings=shardings)(train_state.place(origins, trained))
    else:
        state, loader_state = saved
        loader.restore(loader_state)
    done = int(state.step)
    log.info("from step %d to %d", done, config.num_steps)

    step = make_step(config, optimizer, tuple(tokenizer.state_ids.values()), captions)
    step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    score = jax.jit(make_loss(config, training=False, captions=captions))
    listen = make_listener(config, tokenizer)
    to_devices = functools.partial(jax.make_array_from_process_local_data, rows)
    with (
        contextlib.closing(RunLog(config, workdir, done)) as run_log,
        jax.set_mesh(mesh),
        rules(),
        stop_signal() as stop,
        contextlib.closing(saves),
        contextlib.closing(loader),
        tracer(profile, workdir / "profile") as trace,
    ):
        late = None  # the step before: its numbers are read while the devices work on this one
        while done < config.num_steps and not stop(done):
            trace(done + 1, state)
            with run_log.waiting():
                batch = next(loader)
            batch = same_size(batch)
            work = work_of(config, paths, batch)
            state, metrics = step(state, frozen, jax.tree.map(to_devices, batch))
            done += 1
            if late is not None:
                report(*late, run_log, config, workdir)
            late = done, metrics, work, batch
            loss = None  # on held-out samples
            if held_out and (done % config.validate_every == 0 or done == config.num_steps):
                report(*late, run_log, config, workdir)
                late = None
                with run_log.aside():
                    scores = validate(config, score, state.params, frozen, held_out(), to_devices)
                    scores |= listen(state.params, frozen)
                loss = scores["loss"]
                run_log.held_out(done, scores, saves.is_best(loss))
            if loss is not None or done % config.save_every == 0 and done < config.num_steps:
                saves.save(done, state, state_of(loader), loss)
        if late is not None:
            report(*late, run_log, config, workdir)
            saves.save(done, state, state_of(loader))

        if done < config.num_steps:
            log.info("%s: stopped and saved at step %d; start again to go on", workdir, done)
            return
        if (best := saves.best()) not in (None, done):
            log.info("held out, step %d was the best: it is the one in model/", best)
            state = None  # makes room
            state = saves.restore(shapes, best)[0]
    model = with_voice(config).model
    config = dataclasses.replace(config, model=model)
    train_state.export(workdir / "model", config, origins, state.params, tokenizer)
    log.info("%s: done. Try: vita chat %s", workdir, workdir / "model")


def make_step(
    config: TrainConfig, optimizer: optax.GradientTransformation, state_ids=(), captions=None
):
    """The function of one step, to be compiled.

    Args:
      config: the stage.
      optimizer: the Optax transformation.
      state_ids: the state tokens of query, noise and text, for a model with `llm.num_states`.
      captions: as in `make_loss`.

    Returns:
      function of (State, frozen parameters, Batch) to (State, metrics); metrics are scalars: those
      of `means`, grad_norm, learning_rate, skipped, skipped_now.
    """
    rate = schedule(config.optim, config.num_steps)
    gradients = jax.value_and_grad(make_loss(config, captions=captions), has_aux=True)
    has_states = config.model.llm.num_states and config.objective == "next_token"

    def in_pieces(function, params, frozen, whole):
        """Sums over pieces, divided later: a target weighs the same in whatever piece it is."""
        if config.optim.accumulation == 1:
            return function(params, frozen, *whole)

        def add(sums, piece):
            return jax.tree.map(jnp.add, sums, function(params, frozen, *piece)), None

        pieces = jax.tree.map(lambda x: split_rows(x, config.optim.accumulation), whole)
        shapes = jax.eval_shape(function, params, frozen, *jax.tree.map(lambda x: x[0], pieces))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(add, zeros, pieces)[0]

    def step(state: State, frozen, batch: Batch):
        whole = (batch,)
        if has_states:  # weighed here, as a piece does not know the replies of the others
            whole += (state_targets(batch.tokens, batch.segment_ids, batch.loss_mask, state_ids),)
        (nats, sums), grads = in_pieces(gradients, state.params, frozen, whole)
        found = sums.pop("settle", None)  # of a codec, in one piece
        grads = jax.tree.map(lambda g: g / jnp.maximum(sums["targets"], 1), grads)
        norm = optax.tree.norm(grads)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params, use, metrics = optax.apply_updates(state.params, updates), state.use, {}
        if found is not None:
            params, use, metrics = settle(config, params, use, found, state.step)
        finite = jnp.isfinite(nats) & jnp.isfinite(norm)
        params, opt_state, use = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state, use),
            (state.params, state.opt_state, state.use),
        )
        after = State(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            skipped=state.skipped + ~finite,
            skipped_now=jnp.where(finite, 0, state.skipped_now + 1),
            use=use,
        )
        return after, {
            **means(nats, sums),
            **metrics,
            "grad_norm": norm,
            "learning_rate": rate(state.step - state.skipped),
            "skipped": after.skipped,
            "skipped_now": after.skipped_now,
        }

    return step


def validate(config, score, params, frozen, batches, to_devices) -> dict[str, float]:
    """The metrics of `means` over held-out samples.

    Args:
      config: the stage.
      score: what `make_loss` makes, compiled.
      params: tree of what trains.
      frozen: tree of what does not.
      batches: this process's rows of each batch, at least of one; other processes may have more.
      to_devices: puts an array of this process's rows on the mesh.

    Raises:
      ValueError: no held-out sample can be used, or they need parts that the stage has not loaded.
    """
    sums = empty = None
    while of_all(int((batch := next(batches, None)) is not None)).any():
        batch = empty if batch is None else batch
        empty = jax.tree.map(np.zeros_like, batch)
        used = {path.split("/")[0] for path in used_parts(config, batch)}
        if unknown := used - {*params, *frozen}:
            raise ValueError(f"data.held_out: goes through {unknown}, data.mixture does not")
        new = score(params, frozen, jax.tree.map(to_devices, same_size(batch)))
        sums = new if sums is None else jax.tree.map(jnp.add, sums, new)
    scores = {name: value.item() for name, value in means(*jax.device_get(sums)).items()}
    if not scores["targets"]:
        raise ValueError("data.held_out: no sample can be used; the log says why")
    return scores


def make_listener(config: TrainConfig, tokenizer):
    """A function of what trains and what is frozen that gives what judges hear (see `Listener`):
    nothing, unless one process trains the voice and has recorded speech to validate with.
    """
    real = not any(name.startswith(synthetic.PREFIX) for name in config.data.held_out)
    voice = config.objective in ("codec", "speech")
    if voice and real and config.data.held_out and jax.process_count() == 1:
        listener = Listener(config, tokenizer)
        return lambda params, frozen: listener(lora.merged(config, params, frozen))
    return lambda params, frozen: {}


def split_rows(x, number: int):
    """[B, ...] as [number, B / number, ...]: every piece has rows of every device."""
    return x.reshape(-1, number, *x.shape[1:]).swapaxes(0, 1)


def report(step, metrics, work, batch, run_log: RunLog, config, workdir: Path) -> None:
    """Hands the metrics of a step on; stops the run if too many updates in a row were not finite.

    Raises:
      FloatingPointError: they were; the batch is kept in a file.
    """
    metrics = {name: value.item() for name, value in jax.device_get(metrics).items()}
    if skipped := metrics.pop("skipped_now"):
        log.warning("step %d: loss or gradient not finite, update left out", step)
    if skipped >= config.max_skipped:
        held = {name: value for name, value in vars(batch).items() if value is not None}
        several = jax.process_count() > 1  # then each has rows of its own
        file = workdir / ("bad_batch" + f".{jax.process_index()}" * several + ".npz")
        np.savez(file, **held)
        raise FloatingPointError(
            f"step {step}: the loss or a gradient was not finite {skipped} times in a row; the "
            f"batch is in {file}; try a lower optim.learning_rate"
        )
    run_log.train(step, metrics, *work)


def keep_config(config: TrainConfig, workdir: Path) -> None:
    """Writes config.json; what the folder holds already must come from the same numbers.

    Raises:
      ValueError: there are saves or a model of others, the first number is named; or of nobody
        knows which.
    """
    file, tree = workdir / "config.json", configs.to_json(config)
    if (workdir / "model").exists() or any((workdir / "saves").glob("[0-9]*")):
        if not file.exists():
            raise ValueError(f"{workdir}: has no config.json to its saves; name another --workdir")
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


def table(config: TrainConfig, trained, frozen) -> str:
    """What trains, by part, and the memory of a device that parameters, gradients and moments take.

    Args:
      config: the stage.
      trained: tree of ShapeDtypeStruct with shardings.
      frozen: the same of what is frozen.
    """
    momentum = np.dtype(config.optim.momentum_dtype).itemsize
    weights = muon_weights(config.model) if config.optim.muon_rate else ()  # no second moment
    rows = {}
    for tree, trains in ((trained, True), (frozen, False)):
        for path, shape in trees.flatten(tree).items():
            part = "/".join(path.split("/")[: 1 if path.startswith("llm/") else 2])
            row = rows.setdefault(part, {"all": 0, "trains": 0, "bytes": 0})
            moments = momentum + 4 * (path not in weights)
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


@contextlib.contextmanager
def tracer(profile, folder: Path):
    """A function of the step to come and the state that starts and ends a trace of some steps."""
    if profile is None:
        yield lambda step, state: None
        return
    first, last = profile
    running = False

    def trace(step, state):
        nonlocal running
        if running and step > last:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            running = False
            log.info("steps up to %d are in %s", last, folder)
        elif not running and first <= step <= last:
            jax.profiler.start_trace(folder)
            running = True

    yield trace
    if running:
        jax.profiler.stop_trace()
