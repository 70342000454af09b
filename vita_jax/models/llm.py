"""The language model: embeddings -> hidden states -> logits, whole or step by step with a cache.

Source: Qwen2.5 technical report (arXiv 2412.15115), section 2.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from vita_jax.config import LlmConfig
from vita_jax.models.layers import (
    ACTIVATIONS,
    Cache,
    GatedBlock,
    RMSNorm,
    bias,
    init_cache,
    product,
    stack,
    weight,
)


class Llm(nn.Module):
    """Qwen2.5: pre-norm blocks, grouped queries, rotary positions, an output head of its own."""

    config: LlmConfig

    def setup(self):
        c = self.config
        self.embedding = bias(
            self, "embedding", (c.vocab_size, c.embed_dim), ("vocab", "table_embed"), std=0.02
        )
        self.head = weight(self, "head", (c.embed_dim, c.vocab_size), ("embed", "vocab"))
        self.blocks = stack(GatedBlock, c, c.num_layers, "blocks")
        self.norm = RMSNorm(c.norm_eps)
        if c.num_states:
            self.state_head = weight(
                self, "state_head", (c.embed_dim, c.num_states), ("embed", None)
            )
            self.state_bias = bias(self, "state_bias", (c.num_states,), (None,))

    def embed(self, tokens):
        """dtype[B, T, D] rows of the input table for int32[B, T] tokens; placeholders (below 0) get
        row 0.
        """
        rows = self.embedding[jnp.maximum(tokens, 0)].astype(self.config.dtype)
        return nn.with_logical_constraint(rows, ACTIVATIONS)

    def __call__(self, embeddings, positions, mask, cache: Cache | None = None):
        """Hidden states of a sequence, or of its next tokens when a cache holds what came before.

        Args:
          embeddings: dtype[B, T, D].
          positions: int32[B, T].
          mask: bool[B, 1, T, S] True where attention is allowed; S is T, or the cache's slots.
            Or Segments without a cache, Slots with one.
          cache: Cache or None.

        Returns:
          dtype[B, T, D] after the final norm, and the cache T tokens longer (None without one).
        """
        layers = jnp.arange(self.config.num_layers)
        (x, cache), _ = self.blocks((embeddings, cache), layers, positions, mask)
        if cache is not None:
            cache = cache.replace(length=cache.length + embeddings.shape[1])
        return self.norm(x), cache

    def logits(self, hidden):
        """float32[..., V] from dtype[..., D]."""
        return product(self, "head", "...D,DV->...V", hidden, self.head, jnp.float32)

    def state_logits(self, hidden):
        """float32[..., 3] from dtype[..., D]: query, noise, text; at the end of a prompt, what the
        reply answers. Source: VITA-1.5 paper, stage 2.2.
        """
        kernel = self.state_head.astype(hidden.dtype)
        logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
        return logits + self.state_bias.astype(jnp.float32)


def init_llm_cache(config: LlmConfig, batch_size: int, num_slots: int, int8: bool = False) -> Cache:
    """An empty cache of `num_slots` tokens a row; `int8` as in `init_cache`."""
    return init_cache(config.num_layers, batch_size, num_slots, config, int8)
