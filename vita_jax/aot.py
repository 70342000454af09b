"""Ahead of time: a stage's real step compiled for a TPU pod that is not there, and whether it fits.

Goes in: a `TrainConfig` and the name of a pod. Comes out: a `Report` of the memory of one chip, as
the TPU's own compiler (package libtpu) plans it. Nothing is read and nothing runs. Read next:
`train.py`, whose step it is.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
import time

import jax
import numpy as np
from jax.experimental import topologies

from vita_jax import params as trees
from vita_jax import train_state
from vita_jax.batch import Batch
from vita_jax.config import TrainConfig
from vita_jax.models import vita
from vita_jax.optim import make_optimizer
from vita_jax.sharding import batch_sharding, make_mesh, rules
from vita_jax.train import make_step, used_parts

GIB = 2**30
_ENVIRONMENT = {  # libtpu is told what it would look for around it: it is to compile, not to run
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5e-4",  # any will do
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU.

    Attributes:
      hbm: bytes of memory that the compiler lets a program use.
      layout: libtpu's name for the way its cores are used.
      num_axes: of a pod's shape.
    """

    hbm: float
    layout: str
    num_axes: int


CHIPS = {
    "v4": Chip(31.75 * GIB, "megacore_dense", 3),
    "v5e": Chip(15.75 * GIB, "default", 2),
    "v5p": Chip(95.74 * GIB, "megacore", 3),
    "v6e": Chip(31.25 * GIB, "default", 2),
}


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler says about one chip; numbers of bytes.

    Attributes:
      topology: as asked for, "v5e:16x16".
      mesh: (data, fsdp, tensor).
      rows: of a batch, on each chip.
      arguments: parameters, moments and the batch; None, as the next three, if it does not fit.
      outputs: those that do not take the place of an argument.
      temporaries: activations, gradients, gathered parameters.
      code: of the program.
      total: all of these, or what the compiler wanted.
      hbm: what a chip has.
      seconds: that compiling took.
      refusal: the compiler's own words, if it does not fit.
    """

    topology: str
    mesh: tuple[int, int, int]
    rows: float
    total: float
    hbm: float
    seconds: float
    arguments: int | None = None
    outputs: int | None = None
    temporaries: int | None = None
    code: int | None = None
    refusal: str = ""

    @property
    def fits(self) -> bool:
        """Whether a chip has room for it."""
        return self.total <= self.hbm

    def __str__(self):
        """A few lines to print."""
        mesh, free = ",".join(map(str, self.mesh)), (self.hbm - self.total) / GIB
        lines = [
            f"{self.topology}: {math.prod(self.mesh)} chips, mesh data,fsdp,tensor = {mesh}, "
            f"{self.rows:g} rows a chip; compiled in {self.seconds:.0f} s"
        ]
        for name in ("arguments", "outputs", "temporaries", "code", "total", "hbm"):
            if (size := getattr(self, name)) is not None:
                lines.append(f"{name:<12}{size / GIB:>9.2f} GiB a chip")
        if self.fits:
            return "\n".join([*lines, f"fits: {free:.2f} GiB to spare"])
        return "\n".join([*lines, self.refusal, f"does not fit: {-free:.2f} GiB short"])


def compile_for(config: TrainConfig, topology: str) -> Report:
    """Compiles the step of a stage for a pod.

    Tiles and clips are taken to be in the batch, `max_tiles` and `max_clips` of them in each row,
    if the stage trains anything of the part that reads them; what data a stage has is not looked
    at. The process must have no JAX backend yet, or a CPU's: it is set to work on the CPU.

    Args:
      config: the stage.
      topology: such as "v5e:16x16"; `CHIPS` lists the kinds.

    Raises:
      ModuleNotFoundError: libtpu is not installed.
      ValueError: there is no such pod, or the mesh or the batch does not fit its chips.
    """
    chip, devices = pod(topology)
    mesh = make_mesh(config.mesh, devices)
    rows = batch_sharding(mesh, config.data.batch_size // config.optim.accumulation)
    batch = batch_shapes(config, rows)
    trained, frozen = train_state.param_shapes(config, used_parts(config, batch), mesh)
    paths = list(trees.flatten(trained))
    optimizer = make_optimizer(config.optim, config.num_steps, paths, config.model)
    state = train_state.state_shapes(trained, optimizer, mesh)
    shardings = jax.tree.map(lambda shape: shape.sharding, state)
    step = jax.jit(make_step(config, optimizer), donate_argnums=0, out_shardings=(shardings, None))
    about = {
        "topology": topology,
        "mesh": tuple(mesh.shape.values()),
        "rows": config.data.batch_size / mesh.shape["data"] / mesh.shape["fsdp"],
        "hbm": chip.hbm,
    }
    start_s = time.monotonic()
    with jax.set_mesh(mesh), rules():
        lowered = step.lower(state, frozen, batch)
        try:
            memory = lowered.compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            seconds, refusal = time.monotonic() - start_s, str(error)
            return Report(**about, total=_wanted(refusal), seconds=seconds, refusal=refusal)
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    return Report(**about, **sizes, total=sum(sizes.values()), seconds=time.monotonic() - start_s)


def pod(topology: str):
    """The kind of chip and the devices of a pod; they can be compiled for and nothing else.

    Errors as `compile_for`.
    """
    kind, _, shape = topology.partition(":")
    sizes = shape.split("x")
    if kind not in CHIPS or not all(re.fullmatch("[1-9][0-9]{0,2}", size) for size in sizes):
        raise ValueError(
            f"pod {topology!r}: expected one of {', '.join(CHIPS)} and its shape in chips, such as "
            "v5e:16x16, v6e:8x8, v5p:4x4x4 (64 chips, sold as v5p-128) or v4:4x4x8"
        )
    chip = CHIPS[kind]
    if len(sizes) != chip.num_axes:
        example = "x".join("4" * chip.num_axes)
        raise ValueError(f"pod {topology}: {kind} has {chip.num_axes} axes, as in {kind}:{example}")
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError("libtpu is not installed: pip install 'vita_jax[tpu-aot]'")
    os.environ.update(_ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, chip_config_name=chip.layout
        )
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"pod {topology}: {str(error).splitlines()[0]}") from None
    return chip, found.devices


def batch_shapes(config: TrainConfig, sharding) -> Batch:
    """The batch of a stage as ShapeDtypeStructs, with the modalities that `compile_for` says."""
    data, model = config.data, config.model
    paths = trees.flatten(vita.param_shapes(model))
    trains = {path.split("/")[0] for path in trees.match(config.trainable, paths)}

    def struct(*shape, dtype=np.float32):
        return jax.ShapeDtypeStruct((data.batch_size, *shape), dtype, sharding=sharding)

    token = struct(data.max_tokens, dtype=np.int32)
    batch = Batch(token, token, token, struct(data.max_tokens))
    if config.objective == "codec":
        samples = data.max_tokens * model.codec.samples_per_token
        return batch.replace(waveform=struct(2, samples))
    if config.objective == "speech":
        text = struct(data.max_tokens // model.speech_frames_per_token, dtype=np.int32)
        return batch.replace(text=text, text_segment_ids=text)
    if "vision" in trains:
        tiles = data.max_tiles, model.vision.tile_px, model.vision.tile_px, 3
        batch = batch.replace(tiles=struct(*tiles), tile_mask=struct(tiles[0], dtype=bool))
    if "audio" in trains:
        clips = data.max_clips, data.max_audio_frames
        audio = struct(*clips, model.audio.num_mel_bins)
        batch = batch.replace(audio=audio, audio_mask=struct(*clips, dtype=bool))
    return batch


def _wanted(message):
    """Bytes that the compiler said it could not have; any other complaint of its is raised."""
    found = re.search(r"(?:Used |temporaries \()([\d.]+)([KMGT])", message)
    if not found:
        raise RuntimeError(message)
    return float(found[1]) * 2.0 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[2]]
