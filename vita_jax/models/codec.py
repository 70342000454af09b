"""Speech codec: codec tokens -> waveform, and waveform -> codec tokens. Always float32.

Goes in: the codec tokens of an utterance (40 a second) and a few global tokens, the voice.
Comes out: its waveform. The other direction makes the targets that training needs.
Read next: `infer/chunks.py`, which decodes piece by piece while a reply is being spoken.
"""

from __future__ import annotations

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from vita_jax.config import CodecConfig
from vita_jax.models.conv import convolve
from vita_jax.models.layers import bias, drawn, weight

# Constants of the published weights that no configuration states.
LEAKY_SLOPE = 0.1
ENCODER_OUT_SLOPE = 0.01  # before the encoder's last convolution only
WAVEFORM_KERNEL = 7  # first and last convolution of the decoder, first one of the encoder
ENCODER_OUT_KERNEL = 3
TIMBRE_KERNEL = 3
GROUP_NORM_CHANNELS = 16  # in one group
GROUP_NORM_EPS = 1e-6
BATCH_NORM_EPS = 1e-5
BATCH_NORM_MOMENTUM = 0.1  # what a batch adds to the running statistics

KERNEL_AXES = (None, None, "channels")


@flax.struct.dataclass
class Latents:
    """What encoder and quantizers make of a waveform on its way to tokens.

    Attributes:
      encoded: float32[B, S, D] the encoder's output, a vector for each codec token.
      timbre: float32[B, E] the encoder's vector for the whole utterance.
      quantized: float32[B, S, D] nearest codewords; their gradient is that of `encoded`.
      quantized_timbre: float32[B, E] the same for `timbre`.
      loss: float32[B] quantizer loss, codec tokens and global tokens together, padding included.
    """

    encoded: jax.Array
    timbre: jax.Array
    quantized: jax.Array
    quantized_timbre: jax.Array
    loss: jax.Array


class Codec(nn.Module):
    """Waveform <-> codec tokens. Source: TiCodec (arXiv 2310.00014); the release's codec."""

    config: CodecConfig

    def setup(self):
        self.codebooks = Codebooks(self.config)
        self.decoder = Decoder(self.config)
        self.encoder = Encoder(self.config)

    def __call__(self, waveform):
        """Encodes, quantizes and decodes.

        Args:
          waveform: float32[B, W] 24 kHz, in [-1, 1].

        Returns:
          float32[B, W] reconstruction, as long as the codec tokens that fit into the waveform,
          and the Latents between the two.
        """
        _, _, latents = self.encode(waveform)
        return self.decoder(latents.quantized, latents.quantized_timbre), latents

    def decode(self, codes, global_tokens, num_tokens=None):
        """The waveform of codec tokens.

        Args:
          codes: int32[B, S] codec tokens.
          global_tokens: int32[B, G] the voice.
          num_tokens: int32[B] how many codec tokens of each row count, or None for all. What a row
            sounds like does not depend on the padding behind them; there it is silent.

        Returns:
          float32[B, W] waveform, 24 kHz, in [-1, 1]. W is S * samples_per_token; every stage whose
          kernel and rate differ by an odd number adds one sample, as in the release.
        """
        words, timbre = self.codebooks.codewords(codes), self.codebooks.timbre(global_tokens)
        return self.decoder(words, timbre, num_tokens)

    def encode(self, waveform, num_samples=None):
        """The codec tokens of a waveform.

        Args:
          waveform: float32[B, W] 24 kHz, in [-1, 1].
          num_samples: int32[B] how many samples of each row count, multiples of samples_per_token,
            or None for all. The tokens of a row do not depend on the padding behind them; codec
            tokens from num_samples / samples_per_token on mean nothing.

        Returns:
          int32[B, S] codec tokens, int32[B, G] global tokens, and the Latents they come from.
        """
        encoded, timbre = self.encoder(waveform, num_samples)
        codes, quantized, loss = quantize(encoded, self.codebooks.code, self.config)
        global_tokens, quantized_timbre, timbre_loss = self._quantize_timbre(timbre)
        loss += timbre_loss
        return codes, global_tokens, Latents(encoded, timbre, quantized, quantized_timbre, loss)

    def timbre(self, waveform, num_samples=None):
        """float32[B, E] the encoder's vector for a whole waveform, as in the Latents of `encode`.

        Args:
          waveform, num_samples: as for `encode`.
        """
        return self.encoder.timbre_of(waveform, num_samples)

    def global_tokens(self, timbre):
        """int32[B, G] the voice, for the encoder's vectors float32[B, E]."""
        return self._quantize_timbre(timbre)[0]

    def _quantize_timbre(self, timbre):
        c = self.config
        groups = timbre.reshape(-1, c.num_global_tokens, c.global_code_dim)
        tokens, quantized, losses = jax.vmap(
            lambda x, codebook: quantize(x, codebook, c), in_axes=(1, 0), out_axes=(1, 1, 0)
        )(groups, self.codebooks.global_code)
        return tokens, quantized.reshape(timbre.shape), losses.mean(axis=0)


class Codebooks(nn.Module):
    """The codewords of codec tokens and of global tokens."""

    config: CodecConfig

    def setup(self):
        c = self.config
        global_shape = (c.num_global_tokens, c.num_codes, c.global_code_dim)
        code = bias(self, "code", (c.num_codes, c.code_dim), (None, "channels"), std=1.0)
        global_code = bias(self, "global", global_shape, (None, None, "channels"), std=1.0)
        self.code = jnp.asarray(code, jnp.float32)
        self.global_code = jnp.asarray(global_code, jnp.float32)

    def codewords(self, codes):
        """float32[B, S, D] for codec tokens int32[B, S]."""
        return self.code[codes]

    def timbre(self, global_tokens):
        """float32[B, E] for global tokens int32[B, G]: their codewords side by side."""
        words = self.global_code[jnp.arange(self.config.num_global_tokens), global_tokens]
        return words.reshape(len(words), -1)


class Decoder(nn.Module):
    """Codewords -> waveform. Source: HiFi-GAN (arXiv 2010.05646), the generator; TiCodec."""

    config: CodecConfig

    def setup(self):
        c = self.config
        norm = c.weight_norm
        kinds = tuple(zip(c.resblock_kernels, c.resblock_dilations))
        self.conv_pre = Conv(c.channels, WAVEFORM_KERNEL, norm)
        self.ups = [
            Conv(c.channels // 2 ** (i + 1), kernel, norm, stride=rate, transposed=True)
            for i, (rate, kernel) in enumerate(zip(c.upsample_rates, c.upsample_kernels))
        ]
        self.resblocks = [ResBlock(*kind, norm) for _ in self.ups for kind in kinds]
        self.conv_post = Conv(1, WAVEFORM_KERNEL, norm)

    def __call__(self, x, timbre, num_tokens=None):
        """From float32[B, S, D] codewords and float32[B, E] to float32[B, W] waveform."""
        lengths = num_tokens
        x = self.conv_pre(x, lengths)
        count = len(self.config.resblock_kernels)
        for i, up in enumerate(self.ups):
            x = up(nn.leaky_relu(x, LEAKY_SLOPE), lengths)
            if lengths is not None:
                lengths = up.num_outputs(lengths)
            blocks = self.resblocks[i * count : (i + 1) * count]
            x = sum(block(x, lengths) for block in blocks) / count
            if x.shape[-1] == self.config.global_dim:
                x = x + timbre[:, None]
        x = self.conv_post(nn.leaky_relu(x, LEAKY_SLOPE), lengths)
        return _mask(jnp.tanh(x), lengths)[..., 0]


class Encoder(nn.Module):
    """Waveform -> a vector for each codec token, and one for the timbre. Source: TiCodec.

    Rates and kernels are the decoder's, from last to first.
    """

    config: CodecConfig

    def setup(self):
        c = self.config
        norm = c.weight_norm
        stages = tuple(zip(c.upsample_rates, c.upsample_kernels))[::-1]
        kinds = tuple(zip(c.resblock_kernels, c.resblock_dilations))[::-1]
        self.conv_pre = Conv(c.encoder_channels, WAVEFORM_KERNEL, norm)
        self.downs = [
            Conv(c.encoder_channels * 2 ** (i + 1), kernel, norm, stride=rate)
            for i, (rate, kernel) in enumerate(stages)
        ]
        self.resblocks = [ResBlock(*kind, norm) for _ in self.downs for kind in kinds]
        self.norms = [_group_norm(down.features) for down in self.downs for _ in kinds]
        self.conv_post = Conv(c.code_dim, ENCODER_OUT_KERNEL, weight_norm=False)
        self.timbre = TimbreEncoder(c)
        # The release's checkpoint holds this layer and its code never calls it.
        weight(self, "unused", (c.global_dim, c.global_dim), (None, "channels"))
        bias(self, "unused_bias", (c.global_dim,), ("channels",))

    def __call__(self, waveform, lengths=None):
        """From float32[B, W] waveform, valid up to int32[B] lengths, to float32[B, S, D] vectors
        and float32[B, E] timbre.
        """
        half = len(self.downs) // 2
        x, lengths = self._stages(range(half), *self._start(waveform, lengths))
        timbre = self.timbre(x, lengths)
        x, lengths = self._stages(range(half, len(self.downs)), x, lengths)
        return self.conv_post(nn.leaky_relu(x, ENCODER_OUT_SLOPE), lengths), timbre

    def timbre_of(self, waveform, lengths=None):
        """From float32[B, W] waveform, valid up to int32[B] lengths, to float32[B, E] timbre."""
        half = range(len(self.downs) // 2)
        return self.timbre(*self._stages(half, *self._start(waveform, lengths)))

    def _start(self, waveform, lengths):
        return self.conv_pre(waveform[..., None], lengths), lengths

    def _stages(self, stages, x, lengths):
        count = len(self.config.resblock_kernels)
        for i in stages:
            x = self.downs[i](nn.leaky_relu(x, LEAKY_SLOPE), lengths)
            if lengths is not None:
                lengths = self.downs[i].num_outputs(lengths)
            total = 0.0
            for j in range(i * count, (i + 1) * count):
                # The release normalises the running sum at every block, not once at the end.
                total = total + self.resblocks[j](x, lengths)
                total = self.norms[j](total, mask=_valid(total, lengths))
            x = total / count
        return x, lengths


class TimbreEncoder(nn.Module):
    """What does not change within an utterance, as one vector. Source: TiCodec."""

    config: CodecConfig

    @nn.compact
    def __call__(self, x, lengths=None):
        """From float32[B, T, C] halfway through the encoder, valid up to int32[B] lengths, to
        float32[B, E].
        """
        size = self.config.global_dim
        inputs, hidden, outputs = self.config.global_conv
        for i, shape in enumerate(((inputs, hidden), (hidden, hidden), (hidden, outputs))):
            kernel = weight(self, f"conv_{i}", (TIMBRE_KERNEL, *shape), KERNEL_AXES, num_inputs=2)
            x = convolve(_mask(x, lengths), kernel, padding=TIMBRE_KERNEL // 2)
            x = nn.leaky_relu(x, LEAKY_SLOPE)
        out = weight(self, "out", (outputs, size), (None, "channels"))
        shift = bias(self, "out_bias", (size,), ("channels",))
        x = x.mean(axis=1, where=_valid(x, lengths))
        x = jnp.einsum("BC,CE->BE", x, out.astype(jnp.float32)) + shift
        return BatchNorm(name="norm")(nn.leaky_relu(x, LEAKY_SLOPE))


class BatchNorm(nn.Module):
    """Batch norm with the statistics of the parameters, unless "batch_stats" is mutable: then with
    those of the batch, and the collection holds the running ones after it, by the parameters'
    names. Source: PyTorch's BatchNorm1d, whose running variance is the unbiased one.
    """

    @nn.compact
    def __call__(self, x):
        """From float32[B, E] to float32[B, E]."""
        size = x.shape[-1:]
        axes = ("channels",)
        scale = bias(self, "scale", size, axes, mean=1.0)
        shift = bias(self, "bias", size, axes)
        mean = bias(self, "running_mean", size, axes)
        var = bias(self, "running_var", size, axes, mean=1.0)
        if self.is_mutable_collection("batch_stats") and not self.is_initializing():
            running_mean = self.variable("batch_stats", "running_mean", lambda: mean)
            running_var = self.variable("batch_stats", "running_var", lambda: var)
            mean, var, count = x.mean(axis=0), x.var(axis=0), len(x)
            unbiased = var * count / max(count - 1, 1)
            for running, new in ((running_mean, mean), (running_var, unbiased)):
                old = running.value
                running.value = old + BATCH_NORM_MOMENTUM * (new - old)
        return (x - mean) * jax.lax.rsqrt(var + BATCH_NORM_EPS) * scale + shift


class ResBlock(nn.Module):
    """Pairs of a dilated and a plain convolution, each added to its input. Source: HiFi-GAN."""

    kernel: int
    dilations: tuple[int, ...]
    weight_norm: bool

    @nn.compact
    def __call__(self, x, lengths=None):
        """From float32[B, W, C], valid up to int32[B] lengths, to float32[B, W, C]."""
        shape = (x.shape[-1], self.kernel, self.weight_norm)
        for i, dilation in enumerate(self.dilations):
            dilated = Conv(*shape, dilation=dilation, name=f"dilated_{i}")
            plain = Conv(*shape, name=f"plain_{i}")
            y = dilated(nn.leaky_relu(x, LEAKY_SLOPE), lengths)
            x = x + plain(nn.leaky_relu(y, LEAKY_SLOPE), lengths)
        return x


class Conv(nn.Module):
    """Convolution along time that divides its length by the stride; multiplies, if transposed.

    Its kernel is [width, in, out], transposed [width, out, in]. With weight norm it is held as
    direction `v` and length `g`, one length for each index of the last axis.
    """

    features: int
    width: int
    weight_norm: bool
    stride: int = 1
    dilation: int = 1
    transposed: bool = False

    @property
    def padding(self) -> int:
        """Zeros at either end of the input; cut off either end of the output, if transposed."""
        return ((self.width - 1) * self.dilation + 1 - self.stride) // 2

    def num_outputs(self, length):
        """Outputs for `length` inputs; works on ints and arrays."""
        if self.transposed:
            return (length - 1) * self.stride + self.width - 2 * self.padding
        reach = (self.width - 1) * self.dilation
        return (length + 2 * self.padding - reach - 1) // self.stride + 1

    @nn.compact
    def __call__(self, x, lengths=None):
        """From float32[B, W, C], valid up to int32[B] lengths, to float32[B, W', features]."""
        channels = (x.shape[-1], self.features)
        shape = (self.width, *(channels[::-1] if self.transposed else channels))
        kernel = weight(
            self, "v" if self.weight_norm else "kernel", shape, KERNEL_AXES, num_inputs=2
        )
        if self.weight_norm:
            # About the length of every direction at the start.
            length = bias(self, "g", shape[-1:], ("channels",), mean=1.0)
            kernel = _fold(length, kernel)
        shift = bias(self, "bias", (self.features,), ("channels",))
        x = _mask(x, lengths)
        if self.transposed:
            kernel, padding = kernel[::-1].swapaxes(1, 2), self.width - 1 - self.padding
            return convolve(x, kernel, spread=self.stride, padding=padding) + shift
        how = {"stride": self.stride, "dilation": self.dilation, "padding": self.padding}
        return convolve(x, kernel, **how) + shift


def quantize(x, codebook, config: CodecConfig):
    """The codewords nearest to `x`. Source: VQ-VAE (arXiv 1711.00937), section 3.

    Args:
      x: float32[B, ..., D] vectors.
      codebook: float32[V, D] codewords.
      config: gives the weights of the two losses.

    Returns:
      int32[B, ...] indices, float32[B, ..., D] codewords with the gradient of `x`, float32[B] loss.
    """
    # In full precision on every device, or another codeword wins. |x|^2 is common to all of them.
    product = jnp.einsum("...D,VD->...V", x, codebook, precision=jax.lax.Precision.HIGHEST)
    indices = jnp.argmin(jnp.sum(codebook**2, axis=-1) - 2 * product, axis=-1)
    nearest, stop = codebook[indices], jax.lax.stop_gradient
    axes = tuple(range(1, x.ndim))
    loss = config.codebook_loss_weight * jnp.mean((nearest - stop(x)) ** 2, axis=axes)
    loss += config.commitment_loss_weight * jnp.mean((stop(nearest) - x) ** 2, axis=axes)
    return indices, x + stop(nearest - x), loss


def fold_weight_norm(params: dict) -> dict:
    """The tree that `weight_norm=False` reads: every {g, v} becomes the {kernel} it stands for; of
    NumPy arrays or JAX's, float32 in either case.
    """
    if "v" in params:
        rest = {name: leaf for name, leaf in params.items() if name not in ("g", "v")}
        return {"kernel": _fold(params["g"], params["v"]), **rest}
    return {k: fold_weight_norm(v) if isinstance(v, dict) else v for k, v in params.items()}


def _fold(g, v):
    g, v = g.astype("float32"), v.astype("float32")
    return g / (v**2).sum(axis=(0, 1)) ** 0.5 * v


def _valid(x, lengths):
    """bool[B, W, C] which of `x` float32[B, W, C] count; None if all do."""
    if lengths is None:
        return None
    valid = jnp.arange(x.shape[1])[:, None] < lengths[:, None, None]
    return jnp.broadcast_to(valid, x.shape)


def _mask(x, lengths):
    """`x` with zeros behind the rows' ends: what a convolution finds where nothing follows."""
    return x if lengths is None else jnp.where(_valid(x, lengths), x, 0.0)


def _group_norm(channels):
    return nn.GroupNorm(
        max(1, channels // GROUP_NORM_CHANNELS),
        epsilon=GROUP_NORM_EPS,
        use_fast_variance=False,
        bias_init=lambda key, shape, dtype: drawn(("channels",))(key, shape),
        scale_init=lambda key, shape, dtype: drawn(("channels",), mean=1.0)(key, shape),
    )
