"""The use of codewords: how many of a codebook are used, and what becomes of those that are not.

Goes in: codewords and the vectors that were quantized. Comes out: figures, and the codebook with
codewords that are out of use moved to where vectors are. Read next: `objectives.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

# Ours: a codeword that has had under 5% of a fair share, averaged over about 20 steps, is dead; one
# that is never taken is dead after 59 steps.
DECAY = 0.95
DEAD = 0.05


def perplexity(counts):
    """float32[...] how many codewords would be used as evenly: e to the entropy.

    Args:
      counts: float[..., V] how often each codeword was taken.
    """
    share = counts / jnp.maximum(counts.sum(axis=-1, keepdims=True), 1)
    return jnp.exp(-jax.scipy.special.xlogy(share, share).sum(axis=-1))


def reseed(codebook, use, indices, vectors, key):
    """Moves codewords that are out of use to vectors of this batch.

    Args:
      codebook: float32[V, D] codewords.
      use: float32[V] running use of each, 1 for a fair share; 0 lets a codeword start from data.
      indices: int32[N] codewords that were taken.
      vectors: float32[N, D] what they were taken for.
      key: which vectors.

    Returns:
      float32[V, D] codebook, float32[V] use (a codeword that was moved starts at 1) and float32[V]
      counts of this batch. Source: Jukebox (arXiv 2005.00341), section 3.1; the rule is ours.
    """
    size = len(codebook)
    counts = jnp.zeros(size).at[indices].add(1.0)
    use = DECAY * use + (1 - DECAY) * counts * size / len(indices)
    dead = use < DEAD
    fresh = vectors[jax.random.randint(key, (size,), 0, len(vectors))]
    return jnp.where(dead[:, None], fresh, codebook), jnp.where(dead, 1.0, use), counts


def report(counts: np.ndarray) -> dict[str, float]:
    """`perplexity` and share of `dead` codewords, never taken, of one or several codebooks.

    Args:
      counts: int[..., V] how often each codeword was taken.
    """
    return {
        "perplexity": float(np.mean(perplexity(counts.astype(np.float32)))),
        "dead": float((counts == 0).mean()),
    }
