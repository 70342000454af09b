"""The optimizer of a stage: AdamW or Muon, warm-up and cosine, a rate and a decay for each path.

Goes in: an `OptimConfig` and the paths of what trains. Comes out: an Optax transformation. It is
given trainable parameters only, so frozen ones have no state.
"""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from vita_jax import params as trees
from vita_jax.config import OptimConfig, VitaConfig
from vita_jax.models.vita import boxed_shapes


def schedule(config: OptimConfig, num_steps: int):
    """Learning rate of a step: up in a line from 0, then down half a cosine to 0.

    Returns:
      function of int32[] step, counted from 0, to float32[]. Source: transformers'
      `get_cosine_schedule_with_warmup`, as in the release's scripts.
    """
    warmup = math.ceil(config.warmup_ratio * num_steps)

    def rate(step):
        up = step / max(warmup, 1)
        progress = jnp.clip((step - warmup) / max(num_steps - warmup, 1), 0, 1)
        down = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return config.learning_rate * jnp.where(step < warmup, up, down)

    return rate


def make_optimizer(
    config: OptimConfig, num_steps: int, paths, model: VitaConfig | None = None
) -> optax.GradientTransformation:
    """AdamW for parameters at `paths`, or Muon for those that are weights.

    Muon makes what a step adds to a matrix orthogonal, so that all directions are learnt and not
    only those of the largest gradients. Source: Jordan et al. 2024; its size as in Moonlight
    (arXiv 2502.16982).

    Args:
      config: rates, decay and clipping.
      num_steps: of the whole run.
      paths: parameter paths of what trains.
      model: its sizes; only Muon asks, for which parameters are weights.

    Raises:
      ValueError: a pattern in `config.rates` matches nothing that trains.
    """
    factors = dict.fromkeys(paths, 1.0)
    for pattern, factor in config.rates.items():
        factors |= dict.fromkeys(trees.match((pattern,), paths), factor)
    decays = {p: not any(re.fullmatch(n, p) for n in config.no_decay) for p in paths}

    def scale_by_path(updates, params=None):
        del params
        return jax.tree.map(lambda u, factor: u * factor, updates, trees.unflatten(factors))

    scale = optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=config.momentum_dtype)
    if config.muon_rate:
        weights = muon_weights(model)
        labels = {path: "muon" if path in weights else "adam" for path in paths}
        muon = _muon(weights, config.muon_rate / config.learning_rate, config.momentum_dtype)
        scale = optax.partition({"muon": muon, "adam": scale}, trees.unflatten(labels))
    return optax.chain(
        optax.stateless(functools.partial(_clip, config.clip_norm)),
        scale,
        optax.add_decayed_weights(config.weight_decay, trees.unflatten(decays)),
        optax.stateless(scale_by_path),
        optax.scale_by_learning_rate(schedule(config, num_steps)),
    )


def muon_weights(model: VitaConfig) -> dict[str, tuple[int, int]]:
    """Number of axes of layers, and of inputs behind these, by path of each parameter for Muon:
    matrices inside. Heads are tables of tokens, and the codec's kernels have lengths of their own.
    """
    return {
        path: (box.names.count("layers"), box.num_inputs)
        for path, box in trees.flatten(boxed_shapes(model)).items()
        if box.num_inputs and not path.startswith("codec/") and not path.endswith("head")
    }


def _muon(weights, factor, dtype):
    """Orthogonal updates of weights: their root mean square is 0.2 times `factor`, about that of
    Adam's.
    """

    def by_path(function, updates):
        return jax.tree.map_with_path(
            lambda keys, x: function(x, *weights["/".join(key.key for key in keys)]), updates
        )

    def dimensions(x, layers, inputs):
        ends = layers + inputs
        return MuonDimensionNumbers(tuple(range(layers, ends)), tuple(range(ends, x.ndim)))

    def resize(x, layers, inputs):
        ends = layers + inputs
        longer = max(math.prod(x.shape[layers:ends]), math.prod(x.shape[ends:]))
        return 0.2 * factor * longer**0.5 * x

    return optax.chain(
        scale_by_muon(
            mu_dtype=dtype,
            weight_dimension_numbers=functools.partial(by_path, dimensions),
        ),
        optax.stateless(lambda updates, params=None: by_path(resize, updates)),
    )


def _clip(longest, updates, params=None):
    """Clips the gradient of discriminators, if there are any, and that of all else, each by itself:
    they are those of two losses.
    """
    del params
    clip = optax.clip_by_global_norm(longest)
    judges = {name: updates[name] for name in updates if name == "discriminators"}
    rest = {name: updates[name] for name in updates if name not in judges}
    return {name: tree for x in (judges, rest) for name, tree in clip.update(x, None)[0].items()}
