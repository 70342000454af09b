"""A model as a folder: written slice by slice, checked before it is read, placed shard by shard.

Goes in: parameters, random or published. Comes out: a folder that needs nothing else,

    config.json        the sizes (`config.py`)
    llm.safetensors    one file a part: vision, audio, llm, speech, codec; names are parameter paths
    tokenizer.json     the vocabulary
    units.json         what the CTC head writes with, if that is not the vocabulary
    provenance.json    where the numbers come from
    LICENSE.txt        what may be done with them
    source/            small files of the published folder, byte for byte (after `vita convert`)

safetensors, because it is mapped into memory, runs no code and gives up slices: a device reads its
shard and no more. Weights of 8 bits (`quantize.py`) are read as the float32 they stand for, or kept
as they are where products take them so (`layers.product`).
States of training runs, with optimizer and step, are Orbax's.
Read next: `release.py`, then `infer/engine.py`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import math
import re
import shutil
from pathlib import Path

import jax
import ml_dtypes  # gives NumPy the bfloat16 that safetensors looks for
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import DownloadColumn, Progress
from safetensors import SafetensorError, safe_open

from vita_jax import config as configs
from vita_jax import params as trees
from vita_jax.config import VitaConfig
from vita_jax.data import units as ctc
from vita_jax.data.tokenizer import Tokenizer, load_bundled
from vita_jax.models import vita
from vita_jax.models.codec import fold_weight_norm
from vita_jax.models.layers import SCALE
from vita_jax.sharding import param_shardings

PARTS = ("vision", "audio", "llm", "speech", "codec")
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {np.dtype(np.int8): "I8"}
# The weights that may stay int8, all that `layers.product` multiplies by: how fast those of the
# decoders are read limits how fast a reply is given.
INT8 = re.compile(r"\w+/(.*(attn|mlp|projector)/(q|k|v|qkv|position|out|gate|up|down)|head)")
# Filter banks are around 16: bfloat16 would lose their second decimal.
_STATISTICS = "audio/encoder/cmvn/"
_OWN_LICENCE = (
    "These weights are random numbers made by vita_jax. They may be used under the Apache License\n"
    "2.0, as vita_jax itself.\n"
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a file says of a tensor.

    Attributes:
      shape: its shape.
      dtype: its dtype in the words of safetensors ("F32", "BF16", ...).
    """

    shape: tuple[int, ...]
    dtype: str


def initialize(
    preset, folder, seed: int = 0, overrides=(), tokenizer=None, dtype: str = "float32"
) -> VitaConfig:
    """Writes a checkpoint of seeded random weights.

    The largest parameter is in memory twice, as drawn and as written: 15 GB for `vita_7b`.

    Args:
      preset: "vita_7b", "vita_nano", "vita_tiny" or a VitaConfig.
      folder: folder to write; must not exist, or be empty.
      seed: the same seed gives the same numbers on any machine.
      overrides: words such as "llm.num_layers=2".
      tokenizer: folder with a tokenizer; None takes the one that comes with the preset.
      dtype: "float32", "bfloat16" or "float16", in which all is stored.

    Returns:
      The config.

    Raises:
      ValueError: no such preset, a bad override, a preset without a tokenizer, a target in use.
    """
    if isinstance(preset, str) and preset not in configs.PRESETS:
        raise ValueError(f"preset {preset!r}: expected one of {', '.join(configs.PRESETS)}")
    config = configs.PRESETS[preset]() if isinstance(preset, str) else preset
    config = configs.override(config, overrides)
    config.with_dtype(dtype)  # refuses any other word
    if tokenizer is None and config.name == "vita_7b":
        raise ValueError("vita_7b needs Qwen2's tokenizer: name its folder with --tokenizer DIR")
    tokenizer = load_bundled(config.name) if tokenizer is None else Tokenizer.load(tokenizer)
    boxed = trees.flatten(vita.boxed_shapes(config))
    tensors = {p: jax.ShapeDtypeStruct(box.value.shape, dtype) for p, box in boxed.items()}
    values = ((path, None, vita.draw(path, box, seed)) for path, box in boxed.items())
    provenance = {"made_by": "vita init", "trained": False, "seed": seed}
    write(folder, config, tensors, values, tokenizer, provenance, _OWN_LICENCE)
    return config


def save(folder, config: VitaConfig, params, tokenizer: Tokenizer, provenance, licence) -> None:
    """Writes a checkpoint of parameters that are in memory, each in its dtype.

    Args:
      folder: folder to write; must not exist, or be empty.
      config: the model's.
      params: nested dict of arrays.
      tokenizer: its vocabulary.
      provenance: dict of JSON values; `trained` says whether the weights mean anything.
      licence: text of LICENSE.txt.

    Raises:
      ValueError: parameters that are not the config's, a vocabulary too large, a target in use.
    """
    flat = trees.flatten(params)
    names = {path: _NAMES.get(np.dtype(a.dtype), str(a.dtype)) for path, a in flat.items()}
    check({path: Entry(a.shape, names[path]) for path, a in flat.items()}, config, folder)
    values = ((path, None, np.asarray(a)) for path, a in flat.items())
    write(folder, config, flat, values, tokenizer, provenance, licence)


def load(folder, mesh=None, dtype: str = "bfloat16", parts=PARTS, int8: bool = False):
    """Reads a checkpoint onto the devices; every tensor is checked before the first is read.

    The codec is float32 with its weight norm folded, the statistics of the audio encoder are
    float32, all else is `dtype`.

    Args:
      folder: checkpoint folder.
      mesh: each device gets its shard and reads only that; None is one device.
      dtype: "float32", "bfloat16" or "float16".
      parts: those of the model that are wanted.
      int8: keep weights of 8 bits, of attention, MLPs, projector and heads, as they are; their
        scales are beside them, NAME.scale.

    Returns:
      The config as it is computed with, and the parameters: nested dict of jax.Array.

    Raises:
      FileNotFoundError: the folder or a file of it is not there.
      ValueError: as `open_folder`, another dtype, or no weights of 8 bits to keep.
    """
    stored, files = open_folder(folder)
    config = stored.with_dtype(dtype)
    if config.codec is not None:
        codec = dataclasses.replace(config.codec, weight_norm=False)
        config = dataclasses.replace(config, codec=codec)
    if mesh is None:
        one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = collections.defaultdict(lambda: one_device)
    else:
        shardings = trees.flatten(param_shardings(vita.boxed_shapes(config), mesh))

    def place(values, sharding, to):
        shape = tuple(_shape(values))
        return jax.make_array_from_callback(shape, sharding, lambda at: values[at].astype(to))

    flat = {}
    for part, file in files.items():
        if part not in parts:
            continue
        with opened(file) as tensors:
            held = {f"{part}/{name}": values for name, values in tensors.items()}
            if part == "codec":
                held = fold_weight_norm(trees.unflatten({p: v[:] for p, v in held.items()}))
                held = trees.flatten(held)
            for path, values in held.items():
                sharding = shardings[path]
                if int8 and isinstance(values, Scaled) and INT8.fullmatch(path):
                    flat[path] = place(values.values, sharding, "int8")
                    sharding = _without_ones(sharding, values.scales.get_shape())
                    flat[path + SCALE] = place(values.scales, sharding, "float32")
                else:
                    to = "float32" if path.startswith(("codec/", _STATISTICS)) else dtype
                    flat[path] = place(values, sharding, to)
    if int8 and not any(path.endswith(SCALE) for path in flat):
        raise ValueError(f"{folder}: no weights of 8 bits in it; `vita quantize` makes them")
    return config, trees.unflatten(flat)


def _shape(values):
    """Of an array, or of a slice of a file."""
    return values.shape if isinstance(values, np.ndarray) else values.get_shape()


def _without_ones(sharding, shape):
    """A parameter's sharding for an array with the same axes, but for those of 1."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    axes = [None if size == 1 else axis for axis, size in zip(sharding.spec, shape)]
    return NamedSharding(sharding.mesh, PartitionSpec(*axes))


def open_folder(folder):
    """The config of a checkpoint folder and {part: file}, once every tensor is checked.

    Raises:
      FileNotFoundError: the folder or a file of it is not there.
      ValueError: a config that is none, a vocabulary or list of units that is too large, an
        unreadable file, or tensors that do not fit (`check`).
    """
    folder = Path(folder)
    config = configs.load(folder / "config.json")
    check_vocabulary(Tokenizer.load(folder), config, folder)
    if (folder / ctc.FILE).is_file():
        units = ctc.Units.load(folder / ctc.FILE)
        ctc.check_head(units, config.audio.num_units, folder / ctc.FILE)
    files = {part: folder / f"{part}.safetensors" for part in _parts(config)}
    found = {f"{part}/{name}": e for part in files for name, e in header(files[part]).items()}
    check(found, config, folder)
    return config, files


def part_counts(config: VitaConfig) -> dict[str, int]:
    """Parameters by part, statistics left out, weight norm folded; the main model has no voice."""
    groups = {
        "vision encoder": "vision/encoder/",
        "projector": "vision/projector/",
        "audio encoder": "audio/encoder/",
        "audio adapter": "audio/adapter/",
        "audio prompts": "audio/prompts",
        "CTC head": "audio/ctc",
        "LLM": "llm/",
        "main model": ("vision/", "audio/", "llm/"),
        "speech decoder": "speech/",
        "codec decoder": "codec/decoder/",
        "codec encoder": "codec/encoder/",
        "codebooks": "codec/codebooks/",
    }
    flat = trees.flatten(vita.param_shapes(config))
    counts = {
        name: trees.count({path: s for path, s in flat.items() if path.startswith(prefix)})
        for name, prefix in groups.items()
    }
    return {name: number for name, number in counts.items() if number}


def write(
    folder, config, tensors, values, tokenizer, provenance, licence, sources=(), units=None
) -> None:
    """Writes a checkpoint slice by slice; the folder takes its name only when it is whole.

    Args:
      folder: folder to write; must not exist, or be empty.
      config: VitaConfig.
      tensors: {parameter path: object with .shape and .dtype}, all of the config's.
      values: iterable of (path, layer or None, array) that fills them all.
      tokenizer: Tokenizer.
      provenance: dict of JSON values.
      licence: text of LICENSE.txt.
      sources: (path below source/, file to copy there) pairs.
      units: `data.units.Units` of the CTC head; None for none, or the tokenizer's ids.

    Raises:
      ValueError: the folder is in use, or the vocabulary too large.
    """
    check_vocabulary(tokenizer, config, folder)
    with new_folder(folder) as new:
        writers = {}
        for part in _parts(config):
            held = {path: t for path, t in tensors.items() if path.startswith(part + "/")}
            held = {path.removeprefix(part + "/"): t for path, t in held.items()}
            writers[part] = Writer(new / f"{part}.safetensors", held)
        num_bytes = sum(writer.num_bytes for writer in writers.values())
        with progress(folder, num_bytes) as advance:
            for path, layer, value in values:
                part, name = path.split("/", 1)
                advance(writers[part].fill(name, value, layer))
        for name, file in sources:
            (new / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, new / "source" / name)
        tokenizer.save(new)
        if units is not None:
            units.save(new / ctc.FILE)
        (new / "LICENSE.txt").write_text(licence, encoding="utf-8")
        (new / "provenance.json").write_text(json.dumps(provenance, indent=1), encoding="utf-8")
        sizes = json.dumps(configs.to_json(config), indent=1)
        (new / "config.json").write_text(sizes, encoding="utf-8")


def rewrite(folder, target, config, tensors, values, made) -> dict:
    """Writes a checkpoint folder again with other weights.

    Args:
      folder: what all else is taken from.
      target, config, tensors, values: as for `write`.
      made: what to add to the provenance.

    Returns:
      The provenance as written.
    """
    folder = Path(folder)
    provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8")) | made
    licence = (folder / "LICENSE.txt").read_text(encoding="utf-8")
    units = ctc.Units.load(folder / ctc.FILE) if (folder / ctc.FILE).is_file() else None
    source = folder / "source"
    small = [(f.relative_to(source), f) for f in source.rglob("*") if f.is_file()]
    parts = (Tokenizer.load(folder), provenance, licence, small, units)
    write(target, config, tensors, values, *parts)
    return provenance


@contextlib.contextmanager
def new_folder(folder):
    """A folder to write in. It is named `folder` when the block ends, removed if that is an error.

    Raises:
      ValueError: `folder` exists and is not an empty folder.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists already; remove it or choose another name")
    # A neighbour, because a folder cannot be renamed into another file system.
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    except BaseException:  # an interrupt, too
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


@contextlib.contextmanager
def progress(folder, num_bytes: int):
    """A function that adds bytes written to `folder` to a bar, drawn on a terminal only."""
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), DownloadColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(Path(folder).name, total=num_bytes)
        yield functools.partial(bar.advance, task)


class Writer:
    """A safetensors file: first the header, then the tensors, in any order, through a memory map.

    Attributes:
      num_bytes: of all tensors together.
    """

    def __init__(self, file, tensors: dict, metadata: dict | None = None):
        """Makes `file`, all zeros, for {name: object with .shape and .dtype}."""
        self._file, self._places, entries, end = file, {}, {}, 0
        dtypes = {name: np.dtype(t.dtype) for name, t in tensors.items()}
        # Wide types first, so that each tensor starts at a multiple of its element.
        for name in sorted(tensors, key=lambda name: (-dtypes[name].itemsize, name)):
            shape, dtype = tuple(tensors[name].shape), dtypes[name]
            start, end = end, end + math.prod(shape) * dtype.itemsize
            self._places[name] = start, shape, dtype
            entries[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
        if metadata:
            entries["__metadata__"] = metadata
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        self._start, self.num_bytes = 8 + len(text), end
        with open(file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(self._start + end)

    def fill(self, name: str, value, layer: int | None = None) -> int:
        """Writes a tensor, or its slice `layer`, cast to its dtype; returns the number of bytes.

        The map is opened for this write alone, so that written pages do not add up in memory.
        """
        start, shape, dtype = self._places[name]
        if layer is not None:
            shape = shape[1:]
            start += layer * math.prod(shape) * dtype.itemsize
        assert value.shape == shape, f"{name}: {value.shape} for {shape}"
        target = np.memmap(self._file, dtype, "r+", self._start + start, shape)
        target[...] = value
        return target.nbytes


def read(file, name: str, layer: int | None = None) -> np.ndarray:
    """A tensor of a safetensors file, or its slice `layer`; the map is opened for this alone."""
    with opened(file) as tensors:
        return tensors[name][:] if layer is None else tensors[name][layer]


class Scaled:
    """An I8 tensor and its scales, as a slice of float32: `values[at]` reads that part of both."""

    def __init__(self, values, scales):
        self.values, self.scales = values, scales

    def get_shape(self):
        """Of the tensor."""
        return self.values.get_shape()

    def get_dtype(self):
        """Of what is read."""
        return "F32"

    def __getitem__(self, at):
        at = at if isinstance(at, tuple) else (at,)
        # Where an axis has a single scale, that one; an index takes the axis away.
        ends = [
            (0 if isinstance(i, int) else slice(None)) if size == 1 else i
            for i, size in zip(at, self.scales.get_shape())
        ]
        return self.values[at].astype(np.float32) * self.scales[tuple(ends)].astype(np.float32)


@contextlib.contextmanager
def opened(file):
    """{name: values} of a safetensors file; `values[at]` is read when asked for.

    Of an I8 tensor with scales that fit, these are `Scaled` and the scales have no name. What does
    not fit is left as it is, for `mismatches`.
    """
    with safe_open(file, framework="np") as tensors:
        held = {name: tensors.get_slice(name) for name in tensors.keys()}
        for name in [name for name in held if name + SCALE in held]:
            values, scales = held[name], held[name + SCALE]
            shape, sizes = values.get_shape(), scales.get_shape()
            if values.get_dtype() == "I8" and scales.get_dtype() in DTYPES:
                if len(sizes) == len(shape) and all(n in (1, m) for n, m in zip(sizes, shape)):
                    held[name] = Scaled(values, held.pop(name + SCALE))
        yield held


def header(file) -> dict[str, Entry]:
    """{name: Entry} of a safetensors file, weights of 8 bits as F32; no tensor is read.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is cut off, or no safetensors file.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such file; copy the folder again, or make it again")
    try:
        with opened(file) as tensors:
            return {n: Entry(tuple(s.get_shape()), s.get_dtype()) for n, s in tensors.items()}
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error}); copy it again") from None


def check(found: dict[str, Entry], config: VitaConfig, where) -> None:
    """Compares {parameter path: Entry} with what the config needs.

    Raises:
      ValueError: as `refuse`.
    """
    flat = trees.flatten(vita.param_shapes(config))
    refuse(mismatches(found, {path: s.shape for path, s in flat.items()}), where)


def mismatches(found: dict[str, Entry], expected: dict[str, tuple]) -> list[str]:
    """One line for each tensor that is missing, extra, of another shape or not floating-point, or
    of 8 bits with other scales or none.
    """
    lines = [f"missing: {n} {list(shape)}" for n, shape in expected.items() if n not in found]
    told = {name + SCALE for name, entry in found.items() if entry.dtype == "I8"}
    for name, entry in found.items():
        shape = list(entry.shape)
        if name in told:  # in the line of its tensor
            continue
        if name not in expected:
            lines.append(f"extra: {name} {shape}")
        elif shape != list(expected[name]):
            lines.append(f"{name}: expected shape {list(expected[name])}, found {shape}")
        elif entry.dtype == "I8":
            scale = found.get(name + SCALE)
            scale = "none" if scale is None else f"{scale.dtype} {list(scale.shape)}"
            wanted = f"{name}{SCALE}, floating-point, {shape} or 1 where values share a scale"
            lines.append(f"{name}: I8 needs {wanted}; found {scale}")
        elif entry.dtype not in DTYPES:
            lines.append(f"{name}: expected {', '.join(DTYPES)}, found {entry.dtype}")
    return lines


def refuse(lines: list[str], where) -> None:
    """Raises ValueError with all of `lines`, if there are any."""
    if lines:
        listed = lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} tensors:", *lines])
        raise ValueError(f"{where}: weights and config do not fit; {listed}")


def check_vocabulary(tokenizer: Tokenizer, config: VitaConfig, where) -> None:
    """Raises ValueError if the tokenizer has ids that the LLM has no row for."""
    if tokenizer.vocab_size > config.llm.vocab_size:
        raise ValueError(
            f"{where}: the tokenizer's ids go up to {tokenizer.vocab_size - 1} and llm.vocab_size "
            f"is {config.llm.vocab_size}; use the tokenizer that belongs to these weights"
        )


def _parts(config):
    return [part for part in PARTS if getattr(config, part) is not None]
