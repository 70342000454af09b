"""Speech: filter banks -> streaming encoder -> adapter -> embeddings for the LLM.

Goes in: log-mel filter banks float32[B, A, M], 10 ms a frame. Comes out: dtype[B, U, D_llm], 80 ms
each. A clip is encoded whole, or in pieces with an explicit `AudioState`; with a chunk mask both
give the same numbers.
Source: the VITA-1.5 release's audio encoder ("whale"). Read next: `vita.py`.
"""

from __future__ import annotations

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from vita_jax.config import AudioConfig
from vita_jax.models.layers import (
    ACTIVATIONS,
    Cache,
    LayerNorm,
    bias,
    gelu,
    init_cache,
    product,
    stack,
    weight,
)
from vita_jax.models.vision import two_layers

MASKED_SCORE = -65504.0  # the release fills with the least float16, whatever the dtype


@flax.struct.dataclass
class AudioState:
    """What a stream keeps between calls.

    Attributes:
      frames: float32[B, a, M] filter-bank frames that a later convolution still needs.
      cache: keys and values of the encoder frames so far.
      tail: dtype[B, t, D] encoder frames that a later adapter output still needs.
    """

    frames: jax.Array
    cache: Cache
    tail: jax.Array


def init_audio_state(config: AudioConfig, batch_size: int, num_slots: int) -> AudioState:
    """The state before the first frame; `num_slots` is the most encoder frames (40 ms) the stream
    may have.
    """
    return AudioState(
        frames=jnp.zeros((batch_size, 0, config.num_mel_bins), jnp.float32),
        cache=init_cache(config.num_layers, batch_size, num_slots, config),
        tail=jnp.zeros((batch_size, 0, config.embed_dim), config.dtype),
    )


class Audio(nn.Module):
    """Clips to embeddings."""

    config: AudioConfig

    def setup(self):
        c = self.config
        self.encoder = AudioEncoder(c)
        self.adapter = Adapter(c)
        if c.num_prompts:
            self.prompts = bias(
                self, "prompts", (c.num_prompts, c.out_dim), (None, "act_embed"), std=0.02
            )
        if c.num_units:
            self.ctc = weight(self, "ctc", (c.embed_dim, c.num_units), ("embed", "vocab"))
            self.ctc_bias = bias(self, "ctc_bias", (c.num_units,), ("vocab",))

    def __call__(self, frames, num_frames):
        """Embeddings of whole clips.

        Args:
          frames: float32[B, A, M] before CMVN, right-padded.
          num_frames: int32[B] real frames.

        Returns:
          dtype[B, U, D_llm], of which the first `config.num_embeddings(num_frames)` of each row are
          real.
        """
        c = self.config
        x, _ = self.encoder(frames, num_frames)
        real = jnp.arange(x.shape[1]) < c.encoder_frames(num_frames)[:, None]
        x = self.adapter(_pad_right(jnp.where(real[:, :, None], x, 0), c.adapter_kernel - 1))
        if c.num_prompts:
            x = jnp.concatenate([self.prompt_embeddings(x.shape[0]), x], axis=1)
        return x

    def unit_logits(self, frames, num_frames):
        """float32[B, T, num_units] logits of the CTC units (0 is the blank) of each encoder frame.

        Arguments as for `__call__`; the first `config.encoder_frames(num_frames)` are real.
        """
        x, _ = self.encoder(frames, num_frames)
        kernel = self.ctc.astype(x.dtype)
        logits = jnp.matmul(x, kernel, preferred_element_type=jnp.float32)
        return logits + self.ctc_bias.astype(jnp.float32)

    def stream(self, frames, state: AudioState, final: bool):
        """Embeddings that the next frames of a stream complete.

        The pieces may be of any length whose encoder frames fill whole chunks; `stream_frames` says
        how many to wait for. Prompts are not put in front: `prompt_embeddings` gives them once.

        Args:
          frames: float32[B, A, M] the next frames.
          state: what the stream kept.
          final: True for the last piece; the adapter's look-ahead is then filled with zeros.

        Returns:
          dtype[B, u, D_llm], perhaps of length 0, and the next state.
        """
        c = self.config
        assert c.chunk_size > 0, "only a model with a chunk mask can be streamed exactly"
        frames = jnp.concatenate([state.frames, frames], axis=1)
        num_new = max(c.encoder_frames(frames.shape[1]), 0)
        assert final or num_new % c.chunk_size == 0, (
            f"{num_new} encoder frames do not fill chunks of {c.chunk_size}"
        )
        cache, tail = state.cache, state.tail
        if num_new:
            x, cache = self.encoder(frames, None, cache)
            tail = jnp.concatenate([tail, x], axis=1)
        padded = _pad_right(tail, c.adapter_kernel - 1) if final else tail
        num_out = max((padded.shape[1] - c.adapter_kernel) // 2 + 1, 0)
        out = (
            self.adapter(padded)
            if num_out
            else jnp.zeros((tail.shape[0], 0, c.out_dim), tail.dtype)
        )
        return out, AudioState(
            frames=frames[:, 4 * num_new :], cache=cache, tail=tail[:, 2 * num_out :]
        )

    def prompt_embeddings(self, batch_size: int):
        """dtype[B, num_prompts, D_llm]: the trained embeddings in front of every clip."""
        rows = jnp.broadcast_to(self.prompts, (batch_size, *self.prompts.shape))
        return rows.astype(self.config.dtype)


def stream_frames(config: AudioConfig, num_kept: int) -> int:
    """New filter-bank frames that complete one more chunk when a stream keeps `num_kept` frames."""
    return 4 * config.chunk_size + 3 - num_kept


class AudioEncoder(nn.Module):
    """Filter banks to encoder frames of 40 ms: CMVN, two strided convolutions, blocks."""

    config: AudioConfig

    def setup(self):
        c = self.config
        self.cmvn = Cmvn(c)
        self.subsampling = Subsampling(c)
        self.embed = InputLayer(c)
        self.embed_norm = LayerNorm(c.norm_eps)
        self.blocks = stack(AudioBlock, c, c.num_layers, "blocks")
        self.norm = LayerNorm(c.norm_eps)

    def __call__(self, frames, num_frames, cache: Cache | None = None):
        """Encoder frames of whole clips, or of the next piece of a stream.

        Args:
          frames: float32[B, A, M] before CMVN.
          num_frames: int32[B] real frames, or None when all are.
          cache: Cache of a stream, or None.

        Returns:
          dtype[B, T, D] with T = encoder_frames(A), and the cache T frames longer (None without
          one).
        """
        x = self.embedded(self.subsampled(frames))
        x, cache = self.transform(x, self.mask(x.shape[1], num_frames, cache), cache)
        return self.norm(x), cache

    def subsampled(self, frames):
        """dtype[B, T, D]: normalised frames after both convolutions."""
        return self.subsampling(self.cmvn(frames).astype(self.config.dtype))

    def embedded(self, x):
        """dtype[B, T, D]: the input of the first block. The norm comes before the activation, as
        published.
        """
        return nn.relu(self.embed_norm(self.embed(x))) * self.config.embed_dim**0.5

    def transform(self, x, mask, cache: Cache | None = None):
        """All blocks, without the final norm; positions count from the start of the stream."""
        c = self.config
        num_keys = x.shape[1] if cache is None else cache.k.shape[2]
        table = jnp.asarray(sinusoids(num_keys, c.embed_dim), x.dtype)
        (x, cache), _ = self.blocks((x, cache), jnp.arange(c.num_layers), table, mask)
        if cache is not None:
            cache = cache.replace(length=cache.length + x.shape[1])
        return x, cache

    def mask(self, num_queries: int, num_frames, cache: Cache | None):
        """bool[B, 1, T, S]: real keys, within the chunks a query may see."""
        c = self.config
        if cache is None:
            keys = jnp.arange(num_queries)
            real = jnp.array([num_queries]) if num_frames is None else c.encoder_frames(num_frames)
            queries = keys[None, :, None]
        else:
            keys = jnp.arange(cache.k.shape[2])
            real = cache.length + num_queries
            queries = cache.length[:, None, None] + jnp.arange(num_queries)[:, None]
        allowed = keys < real[:, None, None]
        if c.chunk_size > 0:
            chunk = queries // c.chunk_size
            allowed &= keys < (chunk + 1) * c.chunk_size
            if c.left_chunks >= 0:
                allowed &= keys >= (chunk - c.left_chunks) * c.chunk_size
        return jnp.broadcast_to(allowed, (allowed.shape[0], num_queries, keys.shape[0]))[:, None]


class Cmvn(nn.Module):
    """Global mean and variance normalisation with fixed statistics, in float32.

    They come with a checkpoint. A model that is built from nothing takes the same for every bin,
    about those of recorded speech: as they are, filter banks are so large that training stalls.
    """

    config: AudioConfig

    @nn.compact
    def __call__(self, frames):
        bins = (self.config.num_mel_bins,)
        mean = bias(self, "mean", bins, (None,), mean=12.0)
        istd = bias(self, "istd", bins, (None,), mean=1 / 6)
        return (frames.astype(jnp.float32) - mean.astype(jnp.float32)) * istd.astype(jnp.float32)


class Subsampling(nn.Module):
    """Two unpadded 3x3 convolutions of stride 2 over time and mel, then one linear layer without
    activation.
    """

    config: AudioConfig

    @nn.compact
    def __call__(self, x):
        d = self.config.embed_dim
        x = x[..., None]
        for name, channels in (("conv1", 1), ("conv2", d)):
            kernel = weight(
                self, name, (3, 3, channels, d), (None, None, None, "embed"), num_inputs=3
            )
            convolve = _halved_by_taps if channels > 1 else _halved
            x = jax.lax.platform_dependent(x, kernel.astype(x.dtype), cpu=convolve, default=_halved)
            x = nn.relu(x + bias(self, name + "_bias", (d,), ("act_embed",)).astype(x.dtype))
        out = weight(self, "out", (x.shape[2], d, d), (None, None, "embed"), num_inputs=2)
        y = jnp.einsum("BTFC,FCD->BTD", x, out.astype(x.dtype))
        return y + bias(self, "out_bias", (d,), ("act_embed",)).astype(x.dtype)


def _halved(x, kernel):
    """An unpadded 3x3 convolution of stride 2: dtype[B, T, F, C] to dtype[B, t, f, D]."""
    return jax.lax.conv_general_dilated(
        x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _halved_by_taps(x, kernel):
    """The same as a sum of matrix products, whose gradients CPUs are faster at."""
    t, f = ((size - 1) // 2 for size in x.shape[1:3])
    products = (
        jnp.matmul(
            x[:, i : i + 2 * t - 1 : 2, j : j + 2 * f - 1 : 2],
            kernel[i, j],
            preferred_element_type=jnp.float32,
        )
        for i in range(3)
        for j in range(3)
    )
    return sum(products).astype(x.dtype)


class InputLayer(nn.Module):
    """One linear layer in front of the blocks."""

    config: AudioConfig

    @nn.compact
    def __call__(self, x):
        d = self.config.embed_dim
        kernel = weight(self, "kernel", (d, d), ("embed", None))
        return x @ kernel.astype(x.dtype) + bias(self, "bias", (d,), ("act_embed",)).astype(x.dtype)


class AudioBlock(nn.Module):
    """Pre-norm attention and ReLU MLP."""

    config: AudioConfig

    @nn.compact
    def __call__(self, carry, layer, table, mask):
        x, cache = carry
        c = self.config
        y, cache = AudioAttention(c, name="attn")(
            LayerNorm(c.norm_eps, name="attn_norm")(x), table, mask, cache, layer
        )
        x = x + y
        x = x + AudioMlp(c, name="mlp")(LayerNorm(c.norm_eps, name="mlp_norm")(x))
        return (nn.with_logical_constraint(x, ACTIVATIONS), cache), None


class AudioMlp(nn.Module):
    """Two layers with ReLU."""

    config: AudioConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        return two_layers(self, x, (c.embed_dim, c.mlp_dim, c.embed_dim), nn.relu)


class AudioAttention(nn.Module):
    """Self-attention with a term for the key's absolute position.

    score(i, j) = ((q_i + u) . k_j + (q_i + v) . p_j) / sqrt(H), p_j a projection of the sinusoid of
    position j. It is Transformer-XL's form (arXiv 1901.02860) without its relative shift: what the
    release was trained with.
    """

    config: AudioConfig

    @nn.compact
    def __call__(self, x, table, mask, cache, layer):
        d, n, h = self.config.embed_dim, self.config.num_heads, self.config.head_dim

        def project(name, y):
            kernel = weight(self, name, (d, n, h), ("embed", "heads", "head_dim"))
            return product(self, name, "...TD,DNH->...TNH", y, kernel)

        def shift(name):
            return bias(self, name, (n, h), ("heads", "head_dim")).astype(x.dtype)

        q = project("q", x) + shift("q_bias")
        keys = project("k", x) + shift("k_bias")
        values = project("v", x) + shift("v_bias")
        if cache is not None:
            cache = cache.write(layer, keys, values)
            keys, values = cache.read(layer, mask.shape[-1])
        positions = project("position", table)
        scores = jnp.einsum(
            "BTNH,BSNH->BNTS",
            q + shift("content_bias"),
            keys.astype(x.dtype),
            preferred_element_type=jnp.float32,
        ) + jnp.einsum(
            "BTNH,SNH->BNTS",
            q + shift("position_bias"),
            positions,
            preferred_element_type=jnp.float32,
        )
        # A row that may see nothing gives exactly zero, hence the second mask.
        probabilities = jax.nn.softmax(jnp.where(mask, scores * h**-0.5, MASKED_SCORE), axis=-1)
        probabilities = jnp.where(mask, probabilities, 0).astype(x.dtype)
        y = jnp.einsum("BNTS,BSNH->BTNH", probabilities, values.astype(x.dtype))
        out = weight(self, "out", (n, h, d), ("heads", "head_dim", "embed"), num_inputs=2)
        y = product(self, "out", "BTNH,NHD->BTD", y, out)
        return y + bias(self, "out_bias", (d,), ("act_embed",)).astype(x.dtype), cache


class Adapter(nn.Module):
    """Strided convolution, norm, GELU and a linear layer: encoder frames of 40 ms to embeddings of
    80 ms.
    """

    config: AudioConfig

    @nn.compact
    def __call__(self, x):
        """dtype[B, U, D_llm] from dtype[B, T, D], which the caller has padded on the right by
        kernel - 1 zeros.
        """
        c = self.config
        kernel = weight(
            self,
            "conv",
            (c.adapter_kernel, c.embed_dim, c.adapter_dim),
            (None, "embed", "mlp"),
            num_inputs=2,
        )
        y = jax.lax.conv_general_dilated(
            x, kernel.astype(x.dtype), (2,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )
        y = y + bias(self, "conv_bias", (c.adapter_dim,), ("mlp",)).astype(x.dtype)
        y = gelu(LayerNorm(c.adapter_norm_eps, name="norm")(y))
        out = weight(self, "out", (c.adapter_dim, c.out_dim), ("mlp", "embed"))
        return y @ out.astype(x.dtype) + bias(
            self, "out_bias", (c.out_dim,), ("act_embed",)
        ).astype(x.dtype)


def sinusoids(num_positions: int, dim: int) -> np.ndarray:
    """float32[num_positions, dim]: sine in the even, cosine in the odd columns. Source: arXiv
    1706.03762.
    """
    frequency = np.exp(np.arange(0, dim, 2, dtype=np.float32) * -(np.log(1e4) / dim)).astype(
        np.float32
    )
    angle = np.arange(num_positions, dtype=np.float32)[:, None] * frequency
    return np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(num_positions, dim)


def _pad_right(x, num: int):
    return jnp.pad(x, ((0, 0), (0, num), (0, 0)))
