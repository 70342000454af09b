"""The voice: embeddings of the reply's text -> NAR decoder -> AR decoder -> codec tokens.

Goes in: rows of the LLM's input table, each cut into pieces of the decoders' width
(`Vita.text_pieces`). Comes out: codec tokens, one at a time with a cache, or hidden states for all
of them when they are given (training).
Source: VITA-1.5 paper section 3.1 and the release's speech decoder. Read next: `codec.py`.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from vita_jax.batch import TEXT_TOKEN
from vita_jax.config import SpeechConfig
from vita_jax.models.attention import Segments
from vita_jax.models.layers import (
    Cache,
    GatedBlock,
    RMSNorm,
    bias,
    init_cache,
    product,
    stack,
    weight,
)


class Speech(nn.Module):
    """NAR decoder over the text and AR decoder over [BOS, text, SOS, codes]."""

    config: SpeechConfig

    def setup(self):
        c = self.config
        self.embedding = bias(
            self, "embedding", (c.vocab_size, c.embed_dim), ("vocab", "table_embed"), std=0.02
        )
        self.nar = stack(GatedBlock, c, c.num_nar_layers, "nar")
        self.ar = stack(GatedBlock, c, c.num_layers, "ar")
        self.norm = RMSNorm(c.norm_eps)
        self.head = weight(self, "head", (c.embed_dim, c.vocab_size), ("embed", "vocab"))
        self.head_bias = bias(self, "head_bias", (c.vocab_size,), ("vocab",))

    def embed(self, codes):
        """dtype[B, T, D] from int32[B, T] codes and special ids."""
        return self.embedding[codes].astype(self.config.dtype)

    def read_text(self, text, segment_ids):
        """NAR pass: dtype[B, T, D] from pieces of text embeddings; those of an utterance see each
        other both ways.

        Args:
          text: dtype[B, T, D].
          segment_ids: int32[B, T] 1, 2, ... for the utterances of a row, 0 is padding.
        """
        index = jnp.arange(text.shape[1])
        first = jnp.diff(segment_ids, axis=1, prepend=-1) != 0
        positions = index - jax.lax.cummax(jnp.where(first, index, 0), axis=1)
        mask = Segments(segment_ids, order=jnp.zeros_like(segment_ids))
        layers = jnp.arange(self.config.num_nar_layers)
        (x, _), _ = self.nar((text.astype(self.config.dtype), None), layers, positions, mask)
        return x

    def __call__(self, text, text_segment_ids, tokens, positions, segment_ids):
        """Teacher forcing of utterances packed in rows: dtype[B, T, D], which `logits` takes.

        Args:
          text: dtype[B, P, D] pieces of text embeddings, in the order of the utterances.
          text_segment_ids: int32[B, P] as `read_text` takes them.
          tokens: int32[B, T] of each utterance BOS, a TEXT_TOKEN a piece, SOS, codes, EOS.
          positions: int32[B, T] index in the utterance.
          segment_ids: int32[B, T] 1, 2, ... for the utterances of a row, 0 is padding.
        """
        read = self.read_text(text, text_segment_ids)
        return self.read_codes(read, tokens, positions, segment_ids)

    def read_codes(self, text, tokens, positions, segment_ids):
        """AR pass: dtype[B, T, D] after the last block, from text that was read dtype[B, P, D].

        BOS and text see each other both ways; SOS and codes see these and the codes before them.
        """
        at = tokens == TEXT_TOKEN
        index = jnp.clip(jnp.cumsum(at, axis=1) - 1, 0, text.shape[1] - 1)
        text = jnp.take_along_axis(text, index[..., None], axis=1)
        x = jnp.where(at[..., None], text, self.embed(jnp.maximum(tokens, 0)))
        order = jnp.where(at | (tokens == self.config.bos_id), 0, positions)
        layers, mask = jnp.arange(self.config.num_layers), Segments(segment_ids, order)
        (x, _), _ = self.ar((x, None), layers, positions, mask)
        return x

    def prefill(self, text, text_mask, cache: Cache) -> Cache:
        """The cache with BOS and the text in it: they see each other both ways.

        Args:
          text: dtype[B, T, D] pieces of text embeddings.
          text_mask: bool[B, T] True where a piece is real; these come first.
          cache: empty.
        """
        c = self.config
        start = self.embed(jnp.full((text.shape[0], 1), c.bos_id))
        text = self.read_text(text, text_mask.astype(jnp.int32))
        x = jnp.concatenate([start, text], axis=1)
        num_real = 1 + text_mask.sum(axis=1)
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        mask = (jnp.arange(cache.k.shape[2]) < num_real[:, None])[:, None, None, :]
        (_, cache), _ = self.ar((x, cache), jnp.arange(c.num_layers), positions, mask)
        return cache.replace(length=num_real)

    def step(self, codes, cache: Cache, num_seen: int | None = None):
        """float32[B, V] logits of what follows int32[B] codes (first `sos_id`), and the cache one
        longer. Only the first `num_seen` slots are looked at (None: all).
        """
        c = self.config
        (x, cache), _ = self.ar(
            (self.embed(codes[:, None]), cache),
            jnp.arange(c.num_layers),
            cache.length[:, None],
            cache.causal_mask(1, num_seen),
        )
        return self.logits(x)[:, 0], cache.replace(length=cache.length + 1)

    def logits(self, x):
        """float32[..., V] from the last block's output dtype[..., D]."""
        y = product(self, "head", "...D,DV->...V", self.norm(x), self.head, jnp.float32)
        return y + self.head_bias.astype(jnp.float32)


def init_speech_cache(config: SpeechConfig, batch_size: int, num_slots: int) -> Cache:
    """An empty cache for BOS, text pieces, SOS and codes: `num_slots` of them together."""
    return init_cache(config.num_layers, batch_size, num_slots, config)
