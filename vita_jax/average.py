"""The mean of checkpoints of which one was trained on from the other: often better than either.

Goes in: checkpoint folders of one model. Comes out: a folder whose weights are the means of theirs.
Read next: `checkpoint.py`.
Source: arXiv 2203.05482 (model soups).
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import jax
import numpy as np

from vita_jax import checkpoint
from vita_jax import params as trees
from vita_jax.models import vita


def average(folders, target, only: str = ".*") -> None:
    """Writes the mean of checkpoints, a layer at a time, in float32.

    Args:
      folders: checkpoint folders, two or more; all but the means is taken from the first.
      target: folder to write; must not exist, or be empty.
      only: of the paths of parameters that are averaged.

    Raises:
      FileNotFoundError, ValueError: as `checkpoint.open_folder`; a single folder, one of other
        sizes than the first, an `only` that is no regular expression or matches no parameter, a
        target in use.
    """
    first, *others = folders = [Path(folder) for folder in folders]
    if not others:
        raise ValueError(f"{first}: a single checkpoint is its own mean; give two or more")
    opened = [checkpoint.open_folder(folder) for folder in folders]
    config = opened[0][0]
    boxed = trees.flatten(vita.boxed_shapes(config))
    tensors = {p: jax.ShapeDtypeStruct(box.value.shape, np.float32) for p, box in boxed.items()}
    for folder, (other, _) in zip(folders, opened):
        found = {p: s.shape for p, s in trees.flatten(vita.param_shapes(other)).items()}
        if found != {p: s.shape for p, s in tensors.items()}:
            raise ValueError(f"{folder}: other sizes than {first}; give checkpoints of one model")
    try:
        chosen = {path for path in boxed if re.fullmatch(only, path)}
    except re.error as error:
        raise ValueError(f"--only {only}: no regular expression ({error}); mend it") from error
    if not chosen:
        raise ValueError(f"--only {only}: matches no parameter; one is named {next(iter(boxed))}")

    def values():
        for path, box in boxed.items():
            part, name = path.split("/", 1)
            with contextlib.ExitStack() as stack:
                files = [files[part] for _, files in opened[: None if path in chosen else 1]]
                held = [stack.enter_context(checkpoint.opened(file))[name] for file in files]
                for layer in range(box.value.shape[0]) if "layers" in box.names else (None,):
                    at = slice(None) if layer is None else layer
                    # In float64 the mean of equal numbers is that number.
                    mean = np.mean([values[at].astype(np.float64) for values in held], axis=0)
                    yield path, layer, mean

    made = {"made_by": "vita average", "from": [str(folder) for folder in folders], "only": only}
    checkpoint.rewrite(first, target, config, tensors, values(), {"averaged": made})
