"""The optimizer of a stage: AdamW, warm-up and cosine, a rate and a decay for each path.

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

from vita_jax import params as trees
from vita_jax.config import OptimConfig


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


def make_optimizer(config: OptimConfig, num_steps: int, paths) -> optax.GradientTransformation:
    """AdamW for parameters at `paths`.

    Args:
      config: rates, decay and clipping.
      num_steps: of the whole run.
      paths: parameter paths of what trains.

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

    return optax.chain(
        optax.stateless(functools.partial(_clip, config.clip_norm)),
        optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=config.momentum_dtype),
        optax.add_decayed_weights(config.weight_decay, trees.unflatten(decays)),
        optax.stateless(scale_by_path),
        optax.scale_by_learning_rate(schedule(config, num_steps)),
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
