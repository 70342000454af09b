"""What a run holds: parameters that train, their optimizer, where they come from, and its saves.

Goes in: a `TrainConfig`. Comes out: arrays on the mesh, saved and restored with Orbax, and in the
end a checkpoint folder. Read next: `train.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import re
from pathlib import Path

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from vita_jax import checkpoint, lora
from vita_jax import config as configs
from vita_jax import params as trees
from vita_jax.config import TrainConfig
from vita_jax.data import units as ctc
from vita_jax.models import vita
from vita_jax.models.discriminators import Discriminators
from vita_jax.sharding import param_shardings

log = logging.getLogger(__name__)

_OWN_LICENCE = (
    "These weights were trained with vita_jax from random numbers. They may be used under the\n"
    "Apache License 2.0, as vita_jax itself; the data they were trained on may set other terms.\n"
)


@flax.struct.dataclass
class State:
    """All that a step changes.

    Attributes:
      step: int32[] steps done, skipped ones included.
      params: float32 tree of what trains.
      opt_state: Optax's state for `params`.
      skipped: int32[] updates left out because they were not finite.
      skipped_now: int32[] how many of them since the last finite one.
      use: running use of the codewords that train, by codebook (see `codebooks.reseed`); mostly {}.
    """

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    skipped: jax.Array
    skipped_now: jax.Array
    use: dict


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a parameter comes from.

    Attributes:
      file: safetensors file of its part; None if it is drawn.
      dtype: in which it is stored, float32 if that is int8 with scales.
      box: its entry of `boxed_shapes`.
      seed: it is drawn with.
    """

    file: Path | None
    dtype: np.dtype
    box: object
    seed: int

    @contextlib.contextmanager
    def open(self, path: str):
        """The values of the parameter `path`: `values[at]` of a file is read when asked for."""
        if self.file is None:
            yield vita.draw(path, self.box, self.seed)
            return
        with checkpoint.opened(self.file) as tensors:
            yield tensors[path.split("/", 1)[1]]


def origins(config: TrainConfig) -> dict[str, Origin]:
    """Where each parameter starts, adapters included: in a folder of `init_from`, or drawn.

    With folders given, only what trains may be drawn (new prompts, say), and it is named in the
    log.

    Raises:
      FileNotFoundError: a folder is no checkpoint.
      ValueError: a folder does not fit the model or has nothing that its pattern matches, or
        something frozen is in none.
    """
    boxed = trees.flatten(boxed_shapes(config))
    drawn = functools.partial(Origin, None, np.dtype(np.float32), seed=config.seed)
    found = {path: drawn(box) for path, box in boxed.items()}
    for pattern, folder in init_folders(config):
        _, files = checkpoint.open_folder(folder)
        headers = {part: checkpoint.header(file) for part, file in files.items()}
        held = {f"{part}/{name}": e for part, names in headers.items() for name, e in names.items()}
        held = {path: held[path] for path in trees.match((pattern,), held)}
        expected = {path: boxed[path].value.shape for path in held if path in boxed}
        checkpoint.refuse(checkpoint.mismatches(held, expected), folder)
        for path, entry in held.items():
            file, dtype = files[path.split("/")[0]], checkpoint.DTYPES[entry.dtype]
            found[path] = Origin(file, dtype, boxed[path], config.seed)
    new = [path for path, origin in found.items() if origin.file is None]
    if config.init_from and new:
        patterns = (*config.trains, "discriminators/.*")
        frozen = [path for path in new if not any(re.fullmatch(p, path) for p in patterns)]
        checkpoint.refuse([f"missing: {path}" for path in frozen], ", ".join(config.init_from))
        log.info("in no folder of init_from, so drawn at random: %s", ", ".join(new))
    return found


def boxed_shapes(config: TrainConfig, parts=None) -> dict:
    """Shape of every parameter of the model, of the discriminators that its codec is trained with,
    and of adapters, boxed with its axis names.

    Args:
      config: the stage.
      parts: what is wanted, starts of paths, as "llm" or "llm/embedding"; None for all.

    Raises:
      ValueError: as `lora.boxed_shapes`, of these parts.
    """
    boxed = vita.boxed_shapes(config.model)
    if config.objective == "codec" and config.discriminator_channels:
        judges, waveform = Discriminators(config.discriminator_channels), jnp.zeros((1, 2400))
        init = functools.partial(judges.init, jax.random.key(0), waveform)
        boxed = boxed | {"discriminators": jax.eval_shape(init)["params"]}
    if parts is not None:
        flat = trees.flatten(boxed).items()
        starts = tuple(part + "/" for part in parts)
        boxed = trees.unflatten({p: box for p, box in flat if (p + "/").startswith(starts)})
    return boxed | lora.boxed_shapes(config, boxed)


def init_folders(config: TrainConfig) -> list[tuple[str, Path]]:
    """(path pattern, folder) of each word of `init_from`."""
    words = [word.rpartition("=") for word in config.init_from]
    return [(pattern or ".*", Path(folder)) for pattern, _, folder in words]


def folder_of(config: TrainConfig, path: str) -> Path | None:
    """The folder of `init_from` that the parameter `path` comes from, or None."""
    found = [folder for pattern, folder in init_folders(config) if re.fullmatch(pattern, path)]
    return found[-1] if found else None


def units_file(config: TrainConfig) -> str | None:
    """The list of units of the CTC head: `data.units`, or that of the head in `init_from`.

    Returns:
      the file; None if there is no head, or its units are the tokenizer's ids.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the head in `init_from` has other units than `data.units`, or there is no head.
    """
    file = config.data.units
    if not config.model.audio.num_units:
        if file is not None:
            raise ValueError(
                f"data.units={file}: the model has no CTC head to write with them; leave it out or "
                "set model.audio.num_units"
            )
        return None
    heads = [
        folder
        for pattern, folder in init_folders(config)
        if re.fullmatch(pattern, "audio/ctc")
        and configs.load(folder / "config.json").audio.num_units
    ]
    if not heads:
        return file
    held = heads[-1] / ctc.FILE
    held = str(held) if held.is_file() else None
    sums = {name and ctc.Units.load(name).checksum for name in (file, held)}
    if file is not None and len(sums) > 1:
        raise ValueError(
            f"data.units={file}: the CTC head in {heads[-1]} has other units; leave data.units out "
            "to go on with its, or name in init_from which parts to take, without audio/ctc"
        )
    return held


def param_shapes(config: TrainConfig, parts, mesh) -> tuple[dict, dict]:
    """What trains and what is frozen, as trees of ShapeDtypeStruct with shardings.

    Args:
      config: the stage.
      parts: what is wanted, as for `boxed_shapes`.
      mesh: the mesh.

    Raises:
      ValueError: a pattern of `config.trainable` or `config.lora` matches nothing in these parts.
    """
    boxed = boxed_shapes(config, parts)
    patterns = (*config.trains, *[r"discriminators/.*"] * ("discriminators" in boxed))
    shapes = trees.flatten(nn.unbox(boxed))
    trained, _ = trees.split(nn.unbox(boxed), patterns)
    exact = {path for path in shapes if path.rsplit("/", 1)[-1] in trees.STATISTICS}
    exact |= set(trees.flatten(trained)) | {path for path in shapes if path.startswith("codec/")}
    flat = {
        path: jax.ShapeDtypeStruct(
            shapes[path].shape, "float32" if path in exact else config.dtype, sharding=sharding
        )
        for path, sharding in trees.flatten(param_shardings(boxed, mesh)).items()
    }
    return trees.split(trees.unflatten(flat), patterns)


def place(origins: dict[str, Origin], shapes) -> dict:
    """Parameters on the mesh; a device reads its shard and no more of a file.

    Args:
      origins: as the function of that name gives them.
      shapes: tree of ShapeDtypeStruct with shardings: those wanted.

    Returns:
      Nested dict of jax.Array.
    """

    def read(path, shape):
        with origins[path].open(path) as values:
            return jax.make_array_from_callback(
                shape.shape, shape.sharding, lambda at: values[at].astype(shape.dtype)
            )

    return trees.unflatten({path: read(path, s) for path, s in trees.flatten(shapes).items()})


def start(params, optimizer, codebooks_use: float = 1.0) -> State:
    """The state before the first step; codewords that were drawn are of no use (0) yet."""
    zero = jnp.zeros((), jnp.int32)
    held = params.get("codec", {}).get("codebooks", {})
    use = {
        name: jnp.full(words.shape[:-1], codebooks_use, jnp.float32) for name, words in held.items()
    }
    return State(zero, params, optimizer.init(params), zero, zero, use)


def state_shapes(shapes, optimizer, mesh) -> State:
    """State of ShapeDtypeStruct with shardings: moments lie where their parameters do.

    Args:
      shapes: tree of ShapeDtypeStruct with shardings: what trains.
      optimizer: the Optax transformation.
      mesh: the mesh.
    """
    state = jax.eval_shape(functools.partial(start, optimizer=optimizer), shapes)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def masked(x):  # in the place of parameters that another optimizer has
        return isinstance(x, optax.MaskedNode)

    def at(shape, sharding):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    opt_state = optax.tree_map_params(
        optimizer,
        lambda moment, param: moment if masked(moment) else at(moment, param.sharding),
        state.opt_state,
        shapes,
        transform_non_params=lambda leaf: at(leaf, everywhere),
        is_leaf=masked,
    )
    scalar = at(state.step, everywhere)
    use = jax.tree.map(lambda leaf: at(leaf, everywhere), state.use)
    return State(scalar, shapes, opt_state, scalar, scalar, use)


def export(folder, config: TrainConfig, origins: dict[str, Origin], params, tokenizer) -> None:
    """Writes the model as a checkpoint folder: what trained in float32, all else as it came (int8
    as float32), but for adapters, which are merged into their weights.

    Every process must call this; the first one writes.

    Args:
      folder: to write; must not exist.
      config: the stage.
      origins: as the function of that name gives them; discriminators are not part of a model.
      params: tree of what trained.
      tokenizer: the model's.
    """
    origins = {p: o for p, o in origins.items() if not p.startswith("discriminators/")}
    trained = trees.flatten(params)
    tensors = {
        path: jax.ShapeDtypeStruct(o.box.value.shape, "float32" if path in trained else o.dtype)
        for path, o in origins.items()
        if not path.startswith("lora/")
    }

    def gather(path):
        return multihost_utils.process_allgather(trained[path], tiled=True)

    def values():
        for path in tensors:
            origin = origins[path]
            if path in trained:
                yield path, None, gather(path)
            elif f"lora/{path}/a" in trained:
                a, b = gather(f"lora/{path}/a"), gather(f"lora/{path}/b")
                if jax.process_index() == 0:
                    with origin.open(path) as held:
                        for layer, value in lora.merge(config.lora, origin.box, held, a, b):
                            yield path, layer, value
            elif jax.process_index() == 0:
                with origin.open(path) as held:
                    yield path, None, held[:]

    if jax.process_index():
        for _ in values():  # takes its part in gathering
            pass
        return
    texts = [(source / "LICENSE.txt").read_text() for _, source in init_folders(config)]
    licence = "\n".join(dict.fromkeys(texts)) or _OWN_LICENCE
    provenance = {"made_by": "vita train", "trained": True, "stage": configs.to_json(config)}
    file = units_file(config)
    units = None if file is None else ctc.Units.load(file)
    checkpoint.write(
        folder, config.model, tensors, values(), tokenizer, provenance, licence, units=units
    )


class Saves:
    """The last saves of a run and the best one, each whole or not there; written while training
    goes on.
    """

    def __init__(self, folder, keep: int):
        """Opens `folder`, made if need be; the latest `keep` saves and the best stay."""
        import orbax.checkpoint as orbax

        self._orbax, self._keep = orbax, keep
        self._losses = {}  # of saves that were validated, by step; each save holds those before it
        options = orbax.CheckpointManagerOptions(preservation_policy=self)
        self._manager = orbax.CheckpointManager(Path(folder).absolute(), options=options)

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Which saves stay: Orbax asks when it has written one."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*steps[-self._keep :], self._best_of(steps)}
        return [step in kept for step in steps]

    def save(self, step: int, state: State, loader_state: dict, loss: float | None = None) -> None:
        """Saves, in the background: the arrays may be given away once this returns.

        Args:
          step: of the state; one that is saved already is not saved again.
          state: all that a step changes.
          loader_state: where the data stands.
          loss: on held-out samples, if it was validated; the save with the least is the best.

        Raises:
          OSError: the save before failed.
        """
        if step == self._manager.latest_step():
            return
        if loss is not None and math.isfinite(loss):
            self._losses[step] = loss
        args, notes = (
            self._orbax.args,
            {"loader": loader_state, "losses": list(self._losses.items())},
        )
        args = args.Composite(state=args.StandardSave(state), notes=args.JsonSave(notes))
        with self._failing():
            self._manager.save(step, args=args)

    def restore(self, shapes, step: int | None = None):
        """The latest save that can be read, as (state, loader state), or None if there is none.

        Args:
          shapes: State of ShapeDtypeStructs with shardings, on any mesh.
          step: the save of this step instead.

        Raises:
          ValueError: there are saves and none can be read.
        """
        self._manager.wait_until_finished()
        args, errors = self._orbax.args, []
        steps = sorted(self._manager.all_steps(), reverse=True) if step is None else [step]
        for step in steps:
            wanted = args.Composite(state=args.StandardRestore(shapes), notes=args.JsonRestore())
            try:
                held = self._manager.restore(step, args=wanted)
            except Exception as error:  # torn files fail in many ways, each its own exception
                errors.append(f"step {step}: {_first_line(error)}")
                log.warning("the save of %s cannot be read; trying the one before", errors[-1])
                continue
            for torn in steps[: len(errors)]:
                self._manager.delete(torn)  # so that the step can be saved again
            self._losses = dict(held.notes["losses"])
            return held.state, held.notes["loader"]
        if errors:
            raise ValueError(f"{self._manager.directory}: no save can be read; {errors[0]}")
        return None

    def best(self) -> int | None:
        """Step of the save with the least loss on held-out samples; None if none was validated."""
        return self._best_of(self._manager.all_steps())

    def is_best(self, loss: float) -> bool:
        """Whether no save has a lower loss."""
        best = self.best()
        return math.isfinite(loss) and (best is None or loss < self._losses[best])

    def close(self) -> None:
        """Waits until all is on disk.

        Raises:
          OSError: a save failed.
        """
        with self._failing():
            self._manager.wait_until_finished()
        self._manager.close()

    def _best_of(self, steps):
        losses = {step: self._losses[step] for step in steps if step in self._losses}
        return min(losses, key=losses.get, default=None)

    @contextlib.contextmanager
    def _failing(self):
        """Says what to do when a save cannot be written. A part of one is never taken for one."""
        try:
            yield
        except Exception as error:  # from the file system, each its own exception
            raise OSError(
                f"{self._manager.directory}: a save could not be written ({_first_line(error)}); "
                "the saves before it are whole. Make room there and start again to go on"
            ) from error


def _first_line(error):
    return str(error).splitlines()[0] if str(error) else repr(error)
