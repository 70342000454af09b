"""A checkpoint folder at a quarter of its size: weights as int8, a scale for each output channel.

Goes in: a checkpoint folder. Comes out: another that everything reads as it does the first
(`checkpoint.opened`). A weight of 8 bits is a tensor NAME, I8, and NAME.scale, F32, which has 1
along the axes that share a scale: the inputs of a weight, the columns of a table.
Kept as they are: biases, norms, statistics, codebooks and small tensors. The weights of the codec
become bfloat16 at the least: int8 leaves its waveform 38 dB above the error, bfloat16 50 dB
(`vita_nano`, random weights, a spoken question encoded and decoded).
Read next: `checkpoint.py`.
"""

from __future__ import annotations

import math
from pathlib import Path

import jax
import numpy as np

from vita_jax import checkpoint
from vita_jax import params as trees
from vita_jax.models import vita

_SMALL = 1024  # of fewer numbers nothing is won


def quantize(folder, target) -> dict:
    """Writes a checkpoint again with weights of 8 bits, a layer or a table at a time.

    Args:
      folder: checkpoint folder.
      target: folder to write; must not exist, or be empty.

    Returns:
      The provenance as written: that of `folder`, and how it was quantized.

    Raises:
      FileNotFoundError, ValueError: as `checkpoint.open_folder`; a folder that is quantized, a
        weight that is not finite, a target in use.
    """
    folder = Path(folder)
    config, files = checkpoint.open_folder(folder)
    boxed = trees.flatten(vita.boxed_shapes(config))
    sharing = {path: _sharing(path, box) for path, box in boxed.items()}
    tensors = {}
    for part, file in files.items():
        with checkpoint.opened(file) as held:
            if any(isinstance(values, checkpoint.Scaled) for values in held.values()):
                raise ValueError(f"{folder}: quantized already; give the folder it was made from")
        for name, entry in checkpoint.header(file).items():
            path, dtype = f"{part}/{name}", checkpoint.DTYPES[entry.dtype]
            if sharing[path]:
                dtype, shape = np.dtype(np.int8), np.array(entry.shape)
                shape[list(sharing[path])] = 1
                scales = jax.ShapeDtypeStruct(tuple(shape.tolist()), np.float32)
                tensors[path + checkpoint.SCALE] = scales
            elif part == "codec" and boxed[path].num_inputs and dtype == np.float32:
                dtype = checkpoint.DTYPES["BF16"]
            tensors[path] = jax.ShapeDtypeStruct(entry.shape, dtype)

    def values():
        for path, box in boxed.items():
            part, name = path.split("/", 1)
            with checkpoint.opened(files[part]) as held:
                for layer in range(box.value.shape[0]) if "layers" in box.names else (None,):
                    value = held[name][slice(None) if layer is None else layer]
                    if sharing[path]:
                        value, scales = to_int8(value, sharing[path], f"{folder}: {path}")
                        yield path + checkpoint.SCALE, layer, scales
                    yield path, layer, value

    made = {
        "made_by": "vita quantize",
        "from": folder.resolve().name,
        "int8": f"{sum(map(bool, sharing.values()))} weights, a scale for each output channel",
        "bfloat16": "weights of the codec",
    }
    return checkpoint.rewrite(folder, target, config, tensors, values(), {"quantized": made})


def to_int8(values, axes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The nearest `int8 * scale`: at most half a scale from each value.

    Args:
      values: dtype[...].
      axes: that share a scale.
      name: of the tensor, for the error.

    Returns:
      int8[...] in [-127, 127], and float32 scales, of 1 along `axes`.

    Raises:
      ValueError: NaN or infinity among the values.
    """
    values = values.astype(np.float32)
    scale = np.abs(values).max(axis=tuple(axes), keepdims=True) / np.float32(127)
    if not np.isfinite(scale).all():
        raise ValueError(f"{name}: NaN or infinity among its values, which int8 cannot hold")
    scale = np.maximum(scale, np.finfo(np.float32).tiny)  # zeros stay zeros
    return np.rint(values / scale).astype(np.int8), scale


def _sharing(path: str, box) -> tuple[int, ...]:
    """The axes of a parameter, counted from its end, that share a scale; none if it is not int8.

    What is drawn at random is a weight, if it has inputs, or a table; all else starts constant.
    """
    axes = len(box.value.shape) - box.names.count("layers")
    if axes < 2 or math.prod(box.value.shape) < _SMALL or not box.std or path.startswith("codec/"):
        return ()
    return tuple(range(-axes, box.num_inputs - axes)) or (-1,)
