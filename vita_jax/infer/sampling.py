"""From logits to a token: greedy, temperature, top-k, top-p, repetition penalty. Pure functions, on
the device.

The settings are arrays, so that another setting compiles nothing.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How the next token is drawn.

    Attributes:
      temperature: 0 is greedy.
      top_k: only the k likeliest tokens; 0 is all.
      top_p: only the likeliest tokens that together have this probability.
      penalty: strength of the repetition penalty, 1 is off. Text: `penalize_seen`. Speech:
        `penalize`.
      penalty_window: codes that the speech decoder's penalty looks back at; 0 is off.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    penalty: float = 1.0
    penalty_window: int = 0

    def __post_init__(self):
        good = (
            self.temperature >= 0
            and self.top_k >= 0
            and 0 < self.top_p <= 1
            and self.penalty > 0
            and self.penalty_window >= 0
        )
        if not good:
            raise ValueError(
                f"{self}: expected temperature >= 0, top_k >= 0, 0 < top_p <= 1, penalty > 0 "
                "and penalty_window >= 0"
            )

    def arrays(self) -> dict:
        """The settings as arrays for `sample` and the penalties."""
        return {
            "temperature": np.float32(self.temperature),
            "top_k": np.int32(self.top_k),
            "top_p": np.float32(self.top_p),
            "penalty": np.float32(self.penalty),
        }


def penalize_seen(logits, seen, penalty):
    """Logits of `seen` tokens made less likely: divided by `penalty` if positive, multiplied if
    negative.

    Args:
      logits: float32[B, V].
      seen: bool[B, V].
      penalty: float, 1 changes nothing.

    Returns:
      float32[B, V]. Source: CTRL (arXiv 1909.05858), as Qwen2.5's generation settings mean it.
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def penalize(logits, recent, penalty):
    """Logits divided by `penalty` once for each occurrence of their token in `recent`.

    A negative logit is divided too and so rises: the release's rule, off by default there.

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
