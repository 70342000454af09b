"""From logits to a token: greedy, temperature, top-k, top-p, repetition penalty. Pure functions, on the device.

The settings are arrays, so that another setting compiles nothing.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How the next token is drawn.

    Attributes:
      temperature: 0 is greedy.
      top_k: only the k likeliest tokens; 0 is all.
      top_p: only the likeliest tokens that together have this probability.
      penalty: logits are divided by it once for each time the token occurs among the last `penalty_window`
        (the release's rule: also when negative, where it raises them). 1 is off.
      penalty_window: 0 or less is off.
      banned: ids that are never drawn.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    penalty: float = 1.0
    penalty_window: int = 0
    banned: tuple[int, ...] = ()

    def __post_init__(self):
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or self.penalty <= 0:
            raise ValueError(
                f"{self}: expected temperature >= 0, top_k >= 0, 0 < top_p <= 1 and penalty > 0"
            )


def penalize(logits, recent, penalty):
    """Logits divided by `penalty` for each occurrence of their token in `recent`.

    Args:
      logits: float32[B, V].
      recent: int32[B, R] the last tokens, -1 where there is none.
      penalty: float.

    Returns:
      float32[B, V]. Source: the release's speech decoder.
    """
    rows = jnp.arange(logits.shape[0])[:, None]
    counts = jnp.zeros_like(logits).at[rows, jnp.maximum(recent, 0)].add(recent >= 0)
    return logits / jnp.float32(penalty) ** counts


def sample(key, logits, temperature, top_k, top_p):
    """Draws a token from each row.

    Args:
      key: PRNG key.
      logits: float32[B, V]; -inf is never drawn.
      temperature: float; 0 takes the likeliest.
      top_k: int; 0 keeps all.
      top_p: float in (0, 1].

    Returns:
      int32[B].
    """

    def draw():
        order = jnp.argsort(-logits, axis=-1)
        ranked = jnp.take_along_axis(logits, order, axis=-1) / temperature
        rank = jnp.arange(logits.shape[-1])
        ranked = jnp.where((top_k > 0) & (rank >= top_k), -jnp.inf, ranked)
        probability = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability  # of everything likelier
        ranked = jnp.where(before < top_p, ranked, -jnp.inf)
        chosen = jax.random.categorical(key, ranked, axis=-1)
        return jnp.take_along_axis(order, chosen[:, None], axis=-1)[:, 0]

    return jax.lax.cond(temperature > 0, draw, lambda: logits.argmax(axis=-1)).astype(jnp.int32)
