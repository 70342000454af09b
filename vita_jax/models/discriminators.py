"""Discriminators: waveform -> how real it sounds. They train the codec and speak in no reply.

Goes in: a waveform, recorded or made by the codec. Comes out: a `Judgement` of each of them.
Always float32. Read next: `codec_losses.py`, what is made of the judgements.
"""

from __future__ import annotations

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from vita_jax.models.conv import convolve
from vita_jax.models.layers import bias, weight

PERIODS = (2, 3, 5, 7, 11)  # samples
SCALES = (1, 2, 4)  # samples, one for each that is seen
FFT_SIZES = (1024, 2048, 512)  # samples

# Layers of each kind: factor of the base width, kernel, stride, and dilation in time or groups.
PERIOD_LAYERS = ((1, 5, 3), (4, 5, 3), (16, 5, 3), (32, 5, 3), (32, 5, 1))
SCALE_LAYERS = (
    (4, 15, 1, 1), (4, 41, 2, 4), (8, 41, 2, 16), (16, 41, 4, 16), (32, 41, 4, 16), (32, 41, 1, 16),
    (32, 5, 1, 1),
)  # fmt: skip
STFT_LAYERS = (
    ((3, 9), (1, 1), 1), ((3, 9), (1, 2), 1), ((3, 9), (1, 2), 2), ((3, 9), (1, 2), 4),
    ((3, 3), (1, 1), 1),
)  # fmt: skip

SLOPE = 0.1  # of leaky ReLUs: HiFi-GAN
STFT_SLOPE = 0.2  # EnCodec


@flax.struct.dataclass
class Judgement:
    """What one discriminator says; rows of the batch come first in every array.

    Attributes:
      scores: float32[B, ...] 1 means real, 0 made.
      features: tuple of float32[B, ..., C] what its layers made on the way.
    """

    scores: jax.Array
    features: tuple[jax.Array, ...]


class Discriminators(nn.Module):
    """All of them: of multiple periods, of multiple scales, of multiple STFTs. Source: TiCodec's
    public training code has these three kinds.
    """

    channels: int  # of the first layers; 32 at full size

    def __post_init__(self):
        if self.channels <= 0 or self.channels % 4:
            raise ValueError(
                f"discriminators: channels={self.channels}: expected a positive multiple of 4, "
                "such as 32 (full size) or 4 (tests)"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, waveform) -> tuple[Judgement, ...]:
        """Judges.

        Args:
          waveform: float32[B, W] in [-1, 1], at least as long as the longest of `FFT_SIZES`.
        """
        assert waveform.shape[1] >= max(FFT_SIZES), waveform.shape
        c, pooled = self.channels, waveform[..., None]
        judgements = [PeriodDiscriminator(c, p, name=f"period_{p}")(waveform) for p in PERIODS]
        for scale in SCALES:
            if scale > 1:
                # Zeros beyond the ends count, as in HiFi-GAN.
                pooled = nn.avg_pool(pooled, (4,), strides=(2,), padding=((2, 2),))
            judgements.append(ScaleDiscriminator(c, name=f"scale_{scale}")(pooled))
        judgements += [StftDiscriminator(c, n, name=f"stft_{n}")(waveform) for n in FFT_SIZES]
        return tuple(judgements)


class PeriodDiscriminator(nn.Module):
    """Sees every `period`-th sample. Source: HiFi-GAN (arXiv 2010.05646), section 2.3: the paper's
    convolutions of width 1 across the periods are along time alone, each period a row.
    """

    channels: int
    period: int

    @nn.compact
    def __call__(self, waveform) -> Judgement:
        """Judges float32[B, W]; its arrays are [B, period, T, C]."""
        c, p = self.channels, self.period
        x = jnp.pad(waveform, ((0, 0), (0, -waveform.shape[1] % p)), mode="reflect")
        x = x.reshape(len(x), -1, p).swapaxes(1, 2).reshape(-1, x.shape[1] // p, 1)
        features = []
        for i, (factor, width, stride) in enumerate(PERIOD_LAYERS):
            x = NormedConv(factor * c, (width,), (stride,), name=f"conv_{i}")(x)
            x = nn.leaky_relu(x, SLOPE)
            features.append(x)
        features.append(NormedConv(1, (3,), name="post")(x))
        features = [y.reshape(len(waveform), p, *y.shape[1:]) for y in features]
        return Judgement(features[-1], tuple(features))


class ScaleDiscriminator(nn.Module):
    """Sees the waveform, or averages of it. Source: MelGAN (arXiv 1910.06711), HiFi-GAN. Ours:
    weight norm at every scale, where HiFi-GAN's first has spectral norm, whose state would change
    with every call.
    """

    channels: int

    @nn.compact
    def __call__(self, x) -> Judgement:
        """Judges float32[B, W, 1]; its arrays are [B, T, C]."""
        c = self.channels
        features = []
        for i, (factor, width, stride, groups) in enumerate(SCALE_LAYERS):
            conv = NormedConv(factor * c, (width,), (stride,), groups=groups, name=f"conv_{i}")
            x = nn.leaky_relu(conv(x), SLOPE)
            features.append(x)
        features.append(NormedConv(1, (3,), name="post")(x))
        return Judgement(features[-1], tuple(features))


class StftDiscriminator(nn.Module):
    """Sees the complex spectrum. Source: EnCodec (arXiv 2210.13438), section 3.4, and its public
    code, where scores are no feature.
    """

    channels: int
    n_fft: int

    @nn.compact
    def __call__(self, waveform) -> Judgement:
        """Judges float32[B, W]; its arrays are [B, T, frequency, C]."""
        real, imaginary = stft(waveform, self.n_fft, self.n_fft // 4)
        scale = 1 / np.sqrt(np.sum(_hann(self.n_fft) ** 2))
        x = jnp.stack([real, imaginary], axis=-1) * scale
        features = []
        for i, (width, stride, dilation) in enumerate(STFT_LAYERS):
            x = NormedConv(self.channels, width, stride, (dilation, 1), name=f"conv_{i}")(x)
            x = nn.leaky_relu(x, STFT_SLOPE)
            features.append(x)
        return Judgement(NormedConv(1, (3, 3), name="post")(x), tuple(features))


class NormedConv(nn.Module):
    """Convolution with weight norm that divides its axes by the stride, with zeros at either end.

    Its kernel [*width, C / groups, features] is held as direction `v` and length `g`, one length
    for each index of the last axis, as in `codec.py`.
    """

    features: int
    width: tuple[int, ...]
    stride: tuple[int, ...] | int = 1
    dilation: tuple[int, ...] | int = 1
    groups: int = 1

    @nn.compact
    def __call__(self, x):
        """From float32[B, *space, C] to float32[B, *space', features]."""
        shape = (*self.width, x.shape[-1] // self.groups, self.features)
        inputs = tuple(range(len(shape) - 1))
        axes = (*(None for _ in inputs), "channels")
        direction = weight(self, "v", shape, axes, num_inputs=len(inputs))
        # About the length of every direction at the start.
        length = bias(self, "g", shape[-1:], ("channels",), mean=1.0)
        shift = bias(self, "bias", shape[-1:], ("channels",))
        kernel = length / jnp.sqrt(jnp.sum(direction**2, axis=inputs)) * direction
        dilations = np.broadcast_to(self.dilation, len(self.width))
        padding = tuple(int(d) * (w - 1) // 2 for w, d in zip(self.width, dilations))
        how = dict(stride=self.stride, dilation=self.dilation, padding=padding, groups=self.groups)
        return convolve(x, kernel, **how) + shift


def stft(waveform, n_fft: int, hop: int):
    """Short-time Fourier transform of every whole window (Hann, periodic); nothing is padded.

    Args:
      waveform: float32[B, W], W at least n_fft.
      n_fft: samples of a window.
      hop: samples from one window to the next.

    Returns:
      float32[B, T, n_fft / 2 + 1] real parts and as many imaginary ones.
    """
    num_frames = (waveform.shape[1] - n_fft) // hop + 1
    pieces = -(-n_fft // hop)  # of `hop` samples, side by side in a window
    size = (num_frames - 1 + pieces) * hop
    x = jnp.pad(waveform, ((0, 0), (0, max(0, size - waveform.shape[1]))))[:, :size]
    x = x.reshape(len(x), -1, hop)
    frames = jnp.concatenate([x[:, i : i + num_frames] for i in range(pieces)], axis=-1)
    spectrum = jnp.fft.rfft(frames[..., :n_fft] * _hann(n_fft))
    return spectrum.real, spectrum.imag


def _hann(size):
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)).astype(np.float32)
