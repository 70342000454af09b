"""The voice: embeddings of the reply's text -> NAR decoder -> AR decoder -> codec tokens.

Goes in: rows of the LLM's input table, each cut into pieces of the decoder's width
(`cut_embeddings`). Comes out: codec tokens, one at a time with a cache, or logits for all of them
when they are given (training).
Source: VITA-1.5 paper section 3.1 and the release's speech decoder. Read next: `codec.py`.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from vita_jax.config import SpeechConfig
from vita_jax.models.layers import Cache, GatedBlock, RMSNorm, bias, init_cache, stack, weight


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

    def read_text(self, text, text_mask):
        """NAR pass: dtype[B, T, D] from pieces of text embeddings, each seeing all real ones of its
        row.

        Args:
          text: dtype[B, T, D].
          text_mask: bool[B, T] True where a piece is real.
        """
        positions = jnp.broadcast_to(jnp.arange(text.shape[1]), text.shape[:2])
        layers = jnp.arange(self.config.num_nar_layers)
        mask = text_mask[:, None, None, :]
        (x, _), _ = self.nar((text.astype(self.config.dtype), None), layers, positions, mask)
        return x

    def prefix(self, text, text_mask):
        """dtype[B, 1 + T, D]: BOS and the read text, the start of the AR decoder's sequence."""
        start = self.embed(jnp.full((text.shape[0], 1), self.config.bos_id))
        return jnp.concatenate([start, self.read_text(text, text_mask)], axis=1)

    def __call__(self, text, text_mask, codes):
        """Teacher forcing: logits for each code and for what follows the last.

        Args:
          text: dtype[B, T, D] pieces of text embeddings, right-padded.
          text_mask: bool[B, T].
          codes: int32[B, S], right-padded with `pad_id`.

        Returns:
          float32[B, 1 + S, V]: entry i predicts code i, the one past the end predicts EOS.
        """
        x = self.read_codes(self.prefix(text, text_mask), text_mask, codes)
        return self.logits(x[:, text.shape[1] + 1 :])

    def read_codes(self, prefix, text_mask, codes):
        """AR pass over [prefix, SOS, codes]: dtype[B, 1 + T + 1 + S, D] after the last block.

        The prefix sees itself both ways; SOS and codes see it and the codes before them.
        """
        c = self.config
        (b, t), s = text_mask.shape, codes.shape[1]
        start = self.embed(jnp.full((b, 1), c.sos_id))
        x = jnp.concatenate([prefix, start, self.embed(codes)], axis=1)
        in_prefix = jnp.concatenate([jnp.ones((b, 1), bool), text_mask], axis=1)
        sees_prefix = jnp.pad(in_prefix, ((0, 0), (0, 1 + s)))[:, None, :]
        row, column = jnp.arange(t + s + 2)[:, None], jnp.arange(t + s + 2)
        sees_codes = (column > t) & (column <= row)
        positions = jnp.broadcast_to(column, (b, t + s + 2))
        mask = (sees_prefix | sees_codes)[:, None]
        (x, _), _ = self.ar((x, None), jnp.arange(c.num_layers), positions, mask)
        return x

    def prefill(self, text, text_mask, cache: Cache) -> Cache:
        """The cache with BOS and the text in it: they see each other both ways. Real pieces come
        first.
        """
        c = self.config
        x = self.prefix(text, text_mask)
        num_real = 1 + text_mask.sum(axis=1)
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        mask = (jnp.arange(cache.k.shape[2]) < num_real[:, None])[:, None, None, :]
        (_, cache), _ = self.ar((x, cache), jnp.arange(c.num_layers), positions, mask)
        return cache.replace(length=num_real)

    def step(self, codes, cache: Cache):
        """float32[B, V] logits of what follows int32[B] codes (first `sos_id`), and the cache one
        longer.
        """
        c = self.config
        (x, cache), _ = self.ar(
            (self.embed(codes[:, None]), cache),
            jnp.arange(c.num_layers),
            cache.length[:, None],
            cache.causal_mask(1),
        )
        return self.logits(x)[:, 0], cache.replace(length=cache.length + 1)

    def logits(self, x):
        """float32[..., V] from the last block's output dtype[..., D]."""
        y = jnp.matmul(self.norm(x), self.head.astype(x.dtype), preferred_element_type=jnp.float32)
        return y + self.head_bias.astype(jnp.float32)


def cut_embeddings(embeddings, config: SpeechConfig):
    """Each text embedding dtype[B, T, D_llm] as consecutive pieces of the decoder's width, dtype[B,
    T * n, D].
    """
    return embeddings.reshape(embeddings.shape[0], -1, config.embed_dim)


def init_speech_cache(config: SpeechConfig, batch_size: int, num_slots: int) -> Cache:
    """An empty cache for BOS, text pieces, SOS and codes: `num_slots` of them together."""
    return init_cache(config.num_layers, batch_size, num_slots, config)
