"""Low-rank adapters: a weight W stays as it is and what trains is a thin pair, W + alpha/rank A B.

Goes in: a `LoraConfig` and a model. Comes out: the pairs, parameters as all others, at
`lora/PATH/a` and `lora/PATH/b` for the weight at PATH; what a model is applied to; and the weights
with their pairs merged. The sum is made where a weight is used: `models/layers.py: weight`.
Source: LoRA (arXiv 2106.09685), section 4.1. Read next: `train_state.py`.
"""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from vita_jax import params as trees
from vita_jax.config import LoraConfig, TrainConfig

PARTS = ("llm/", "speech/")  # whose weights may be targets


def boxed_shapes(config: TrainConfig, model: dict) -> dict:
    """The pairs of all targets, {} without any.

    A is drawn as its weight would be, B is zero, so that the start is the model itself. A has the
    input axes of the weight and B the output axes, so each lies on the mesh as the weight does.

    Args:
      config: the stage.
      model: `vita.boxed_shapes`, or some parts of it.

    Returns:
      A tree as `vita.boxed_shapes` gives: {"lora": ...}; of a stack of L layers a is [L, inputs,
      rank] and b [L, rank, outputs].

    Raises:
      ValueError: a pattern of `lora.targets` matches nothing, no weight, or another part than
        those in `PARTS`; or a target trains itself.
    """
    if config.lora is None:
        return {}
    boxes = trees.flatten(model)
    pairs = {}
    for pattern in config.lora.targets:
        found = trees.match((pattern,), boxes)
        for path in found:
            if not path.startswith(PARTS):
                raise ValueError(
                    f"lora.targets: {pattern!r} matches {path}; only weights of the LLM and the "
                    "speech decoders can be targets, as in llm/blocks/.* or speech/ar/.*"
                )
        weights = [path for path in found if boxes[path].num_inputs]
        if not weights:
            raise ValueError(
                f"lora.targets: {pattern!r} matches no weight that is multiplied with, only "
                f"{', '.join(found)}; train those as they are (trainable)"
            )
        for path in weights:
            if any(re.fullmatch(p, path) for p in config.trainable):
                raise ValueError(
                    f"lora.targets: {path} is in trainable, too; leave it out of one of them"
                )
            pairs[f"lora/{path}/a"], pairs[f"lora/{path}/b"] = _pair(boxes[path], config.lora.rank)
    return trees.unflatten(pairs)


def _pair(box, rank: int):
    """The boxes of A and B for that of a weight."""
    num_layer_axes = box.names.count("layers")
    ends = num_layer_axes + box.num_inputs  # of the inputs
    shape, names, dtype = box.value.shape, box.names, box.value.dtype
    return (
        box.replace(
            value=jax.ShapeDtypeStruct((*shape[:ends], rank), dtype),
            names=(*names[:ends], None),
        ),
        box.replace(
            value=jax.ShapeDtypeStruct((*shape[:num_layer_axes], rank, *shape[ends:]), dtype),
            names=(*names[:num_layer_axes], None, *names[ends:]),
            std=0.0,
        ),
    )


def variables(config: TrainConfig, params, frozen) -> dict:
    """What the model of a stage is applied to.

    Args:
      config: the stage.
      params: tree of what trains.
      frozen: tree of what does not.

    Returns:
      The collections `params` and, with `config.lora`, `lora`: the pairs, A times alpha/rank.
    """
    tree = trees.merge(params, frozen)
    if config.lora is None:
        return {"params": tree}
    pairs = trees.flatten(tree.pop("lora"))
    scaled = {p: x * config.lora.scale if p.endswith("/a") else x for p, x in pairs.items()}
    return {"params": tree, "lora": trees.unflatten(scaled)}


def merged(config: TrainConfig, params, frozen) -> dict:
    """The parameters of a stage's model with its pairs merged, each in its dtype; all are in memory
    then. Arguments as for `variables`.
    """
    found = variables(config, params, frozen)
    flat, pairs = trees.flatten(found["params"]), trees.flatten(found.get("lora", {}))
    for path in [path[:-2] for path in pairs if path.endswith("/a")]:
        a, b, values = pairs[path + "/a"], pairs[path + "/b"], flat[path]
        product = functools.partial(jnp.tensordot, axes=1, precision="highest")
        if a.ndim + b.ndim - 2 > values.ndim:  # a stack
            product = jax.vmap(product)
        flat[path] = (values.astype(jnp.float32) + product(a, b)).astype(values.dtype)
    return trees.unflatten(flat)


def merge(config: LoraConfig, box, values, a: np.ndarray, b: np.ndarray):
    """A weight and its pair as one, a layer at a time.

    Args:
      config: the pair's.
      box: the weight's entry of `vita.boxed_shapes`.
      values: of the weight, dtype[L, inputs, outputs] or dtype[inputs, outputs], or a slice of a
        file; `values[layer]` is read when its turn comes.
      a, b: float32 pair, as `boxed_shapes` says.

    Yields:
      layer and float32[inputs, outputs]; layer is None for a weight that is in no stack.
    """
    layers = range(box.value.shape[0]) if "layers" in box.names else (None,)
    for layer in layers:
        at = slice(None) if layer is None else layer
        update = np.tensordot(np.float32(config.scale) * a[at], b[at], 1)
        yield layer, values[at].astype(np.float32) + update
