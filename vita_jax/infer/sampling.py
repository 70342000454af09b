"""From logits to a token: greedy, temperature, top-k, top-p, repetition penalty. Pure functions, on
the device.

The settings are arrays, so that another setting compiles nothing.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

MAX_WINDOW = 64  # codes that the speech decoder's penalty can look back at


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How the next token is drawn.

    Attributes:
      temperature: 0 is greedy.
      top_k: only the k likeliest tokens; 0 is all.
      top_p: only the likeliest tokens that together have this probability.
      penalty: strength of the repetition penalty, 1 is off. Text: `penalize_seen`. Speech:
        `penalize`.
      penalty_window: codes that the speech decoder's penalty looks back at, at most 64; 0 is off.
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
            and 0 <= self.penalty_window <= MAX_WINDOW
        )
        if not good:
            raise ValueError(
                f"{self}: expected temperature >= 0, top_k >= 0, 0 < top_p <= 1, penalty > 0 "
                f"and penalty_window 0 to {MAX_WINDOW}"
            )

    def arrays(self) -> dict:
        """The settings as arrays for `sample` and the penalties."""
        return {
            "temperature": np.float32(self.temperature),
            "top_k": np.int32(self.top_k),
            "top_p": np.float32(self.top_p),
            "penalty": np.float32(self.penalty),
            "window": np.int32(self.penalty_window),
        }


def penalize_seen(logits, seen, penalty):
    """Logits of `seen` tokens made less likely: divided by `penalty` if positive, multiplied if
    negative.

    Args:
      logits: float32[B, V].
      seen: bool[B, V].
      penalty: float32[B], 1 changes nothing.

    Returns:
      float32[B, V]. Source: CTRL (arXiv 1909.05858), as Qwen2.5's generation settings mean it.
    """
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def penalize(logits, recent, penalty, window):
    """Logits divided by `penalty` once for each occurrence of their token in `recent`.

    A negative logit is divided too and so rises: the release's rule, off by default there.

    Args:
      logits: float32[B, V].
      recent: int32[B, R] the last tokens, newest last, -1 where there is none.
      penalty: float32[B].
      window: int32[B] how many of the newest count.

    Returns:
      float32[B, V]. Source: the release's speech decoder.
    """
    b, r = recent.shape
    counted = (recent >= 0) & (jnp.arange(r) >= r - window[:, None])
    rows = jnp.arange(b)[:, None]
    counts = jnp.zeros_like(logits).at[rows, jnp.maximum(recent, 0)].add(counted)
    return logits / penalty[:, None] ** counts


def sample(keys, logits, sampling):
    """Draws a token for each row by the settings and the key of the row.

    Args:
      keys: PRNG keys [B].
      logits: float32[B, V]; -inf is never drawn.
      sampling: of `Sampler.arrays()`, [B] each: temperature, 0 takes the likeliest; top_k, 0 keeps
        all; top_p.

    Returns:
      int32[B].
    """
    temperature, top_k, top_p = (
        sampling[name][:, None] for name in ("temperature", "top_k", "top_p")
    )
    likeliest = logits.argmax(axis=-1)

    def draw():
        order = jnp.argsort(-logits, axis=-1)
        ranked = jnp.take_along_axis(logits, order, axis=-1)
        ranked = ranked / jnp.where(temperature > 0, temperature, 1)
        rank = jnp.arange(logits.shape[-1])
        ranked = jnp.where((top_k > 0) & (rank >= top_k), -jnp.inf, ranked)
        probability = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability  # of everything likelier
        ranked = jnp.where(before < top_p, ranked, -jnp.inf)
        chosen = jax.vmap(jax.random.categorical)(keys, ranked)
        drawn = jnp.take_along_axis(order, chosen[:, None], axis=-1)[:, 0]
        return jnp.where(temperature[:, 0] > 0, drawn, likeliest)

    return jax.lax.cond((temperature > 0).any(), draw, lambda: likeliest).astype(jnp.int32)
