"""A checkpoint with more layers that computes the same: what it learned, and room for more.

Goes in: a checkpoint folder. Comes out: another in which some layers are followed by copies whose
outputs are zero, so that they add nothing until they are trained.
Read next: `average.py`.
Source: arXiv 2401.02415 (block expansion).
"""

from __future__ import annotations

import dataclasses
import re

import jax
import numpy as np

from vita_jax import checkpoint
from vita_jax import params as trees
from vita_jax.models import vita

PARTS = ("vision", "audio", "llm")
_OUTPUTS = re.compile(r".*/blocks/(attn/out|mlp/down)(_bias)?")


def deepen(folder, target, num_layers) -> None:
    """Writes a checkpoint with more layers, a layer at a time, in float32.

    Args:
      folder: checkpoint folder.
      target: folder to write; must not exist, or be empty.
      num_layers: {part of `PARTS`: layers that it shall have}, at most twice those that it has.

    Raises:
      FileNotFoundError, ValueError: as `checkpoint.open_folder`; another part, too few or too many
        layers, a target in use.
    """
    config, files = checkpoint.open_folder(folder)
    deeper, sources = config, {}
    for part, new in num_layers.items():
        if part not in PARTS:
            raise ValueError(f"{part}: no part to deepen; one of {', '.join(PARTS)}")
        old = getattr(config, part).num_layers
        if not old < new <= 2 * old:
            raise ValueError(f"{part}={new}: it has {old} layers; give {old + 1} to {2 * old}")
        sources[part] = [layer * old // new for layer in range(new)]  # each once, or twice
        sizes = dataclasses.replace(getattr(config, part), num_layers=new)
        deeper = dataclasses.replace(deeper, **{part: sizes})
    boxed = trees.flatten(vita.boxed_shapes(deeper))
    tensors = {p: jax.ShapeDtypeStruct(box.value.shape, np.float32) for p, box in boxed.items()}

    def values():
        for path, box in boxed.items():
            part, name = path.split("/", 1)
            with checkpoint.opened(files[part]) as held:
                if "layers" not in box.names:
                    yield path, None, held[name][:].astype(np.float32)
                    continue
                layers = sources.get(part, range(box.value.shape[0]))
                for layer, source in enumerate(layers):
                    value = held[name][source].astype(np.float32)
                    copied = layer and source == layers[layer - 1]
                    zero = copied and _OUTPUTS.fullmatch(path)
                    yield path, layer, np.zeros_like(value) if zero else value

    made = {"made_by": "vita deepen", "from": str(folder), "num_layers": num_layers}
    checkpoint.rewrite(folder, target, deeper, tensors, values(), {"deepened": made})
