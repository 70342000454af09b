"""Losses that train the codec: pure functions of arrays.

Goes in: recorded waveforms, what the codec made of them, and what discriminators say of both. Comes
out: float32[B] of each part of a loss, weighted, a mean over everything but the batch: the loss of
a batch is the sum of its rows' losses, whichever way the rows are cut into pieces.
Source: TiCodec's public training code, HiFi-GAN (arXiv 2010.05646), where nothing else is said.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from vita_jax.models.discriminators import Judgement, stft

# n_fft, hop (samples), mel bins, weight. Ours: 64 bins at the last scale; of TiCodec's 80, those
# narrower than the distance between two frequencies would be empty.
MEL_SCALES = ((1024, 240, 80, 45.0), (512, 120, 80, 1.0), (256, 60, 64, 1.0))
FEATURES_WEIGHT = 2.0  # HiFi-GAN
QUANTIZER_WEIGHT = 10.0  # TiCodec
TIMBRE_WEIGHT = 5.0  # TiCodec

LOG_FLOOR = 1e-5  # of mel energies: HiFi-GAN
POWER_FLOOR = 1e-9  # added to power, so that silence has a gradient: HiFi-GAN
COSINE_FLOOR = 1e-8  # of lengths


def generator_losses(
    real, fake, judged_real, judged_fake, latents_loss, timbre, other_timbre, rate_hz: int
) -> dict[str, jax.Array]:
    """What the codec makes small.

    Args:
      real: float32[B, W] recorded waveform, in [-1, 1].
      fake: float32[B, W] what the codec made of it.
      judged_real: Judgements of `real`; () without discriminators.
      judged_fake: Judgements of `fake`, by the same discriminators.
      latents_loss: float32[B] of the quantizers.
      timbre: float32[B, E] of `real`.
      other_timbre: float32[B, E] of other segments of the same utterances; no gradient goes there.
      rate_hz: samples a second.

    Returns:
      float32[B] of `mel`, `quantizer`, `timbre` and, where there are discriminators, of
      `adversarial` and `features`. Their sum is the loss.
    """
    parts = {
        "mel": mel_loss(real, fake, rate_hz),
        "quantizer": QUANTIZER_WEIGHT * latents_loss,
        "timbre": TIMBRE_WEIGHT * timbre_loss(timbre, other_timbre),
    }
    if judged_fake:
        parts["adversarial"] = sum(_rows((1 - judged.scores) ** 2) for judged in judged_fake)
        parts["features"] = FEATURES_WEIGHT * feature_loss(judged_real, judged_fake)
    return parts


def discriminator_losses(judged_real, judged_fake) -> dict[str, jax.Array]:
    """What the discriminators make small. Source: LSGAN (arXiv 1611.04076).

    Args:
      judged_real: Judgements of recorded waveforms; () without discriminators.
      judged_fake: Judgements of what the codec made of them.

    Returns:
      float32[B] of `real` and `fake`, their sum the loss; empty without discriminators.
    """
    if not judged_real:
        return {}
    return {
        "real": sum(_rows((1 - judged.scores) ** 2) for judged in judged_real),
        "fake": sum(_rows(judged.scores**2) for judged in judged_fake),
    }


def feature_loss(judged_real: tuple[Judgement, ...], judged_fake: tuple[Judgement, ...]):
    """float32[B]: mean |difference| of every layer of every discriminator, summed.

    Source: HiFi-GAN, section 2.4.
    """
    pairs = [
        pair
        for judged in zip(judged_real, judged_fake)
        for pair in zip(*(j.features for j in judged))
    ]
    return sum(_rows(jnp.abs(real - fake)) for real, fake in pairs)


def mel_loss(real, fake, rate_hz: int):
    """float32[B]: weighted mean |difference| of the log-mel spectra of float32[B, W] waveforms."""
    loss = 0.0
    for n_fft, hop, num_mels, weight in MEL_SCALES:
        of_real, of_fake = (log_mel(x, n_fft, hop, num_mels, rate_hz) for x in (real, fake))
        loss += weight * _rows(jnp.abs(of_real - of_fake))
    return loss


def timbre_loss(timbre, other_timbre):
    """float32[B]: 1 - cosine between float32[B, E] vectors; the second is what to be like."""
    a, b = _unit(timbre), _unit(jax.lax.stop_gradient(other_timbre))
    return 1 - jnp.sum(a * b, axis=-1)


def log_mel(waveform, n_fft: int, hop: int, num_mels: int, rate: int):
    """Logarithm of the magnitudes in Slaney's mel bins. Source: HiFi-GAN.

    Args:
      waveform: float32[B, W] in [-1, 1]; reflected at both ends, so that T = W / hop.
      n_fft: samples of a window (Hann).
      hop: samples from one window to the next.
      num_mels: bins, from 0 to rate / 2.
      rate: samples a second.

    Returns:
      float32[B, T, num_mels].
    """
    margin = (n_fft - hop) // 2
    assert waveform.shape[1] > margin, waveform.shape
    x = jnp.pad(waveform, ((0, 0), (margin, margin)), mode="reflect")
    real, imaginary = stft(x, n_fft, hop)
    magnitude = jnp.sqrt(real**2 + imaginary**2 + POWER_FLOOR)
    return jnp.log(jnp.maximum(magnitude @ mel_filters(n_fft, num_mels, rate), LOG_FLOOR))


def mel_filters(n_fft: int, num_mels: int, rate: int) -> np.ndarray:
    """float32[n_fft / 2 + 1, num_mels] triangles of area 1 (per Hz / 2), evenly spaced in mel.

    Source: Slaney, Auditory Toolbox (1998): linear below 1 kHz, logarithmic above.
    """
    edges = _mel_to_hz(np.linspace(0, _hz_to_mel(rate / 2), num_mels + 2))
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    hz = np.linspace(0, rate / 2, n_fft // 2 + 1)[:, None]
    triangles = np.minimum((hz - low) / (centre - low), (high - hz) / (high - centre))
    return (np.maximum(triangles, 0) * 2 / (high - low)).astype(np.float32)


_HZ_A_MEL = 200 / 3  # below the bend
_BEND_HZ = 1000.0
_LOG_STEP = np.log(6.4) / 27  # of a mel above the bend


def _hz_to_mel(hz):
    return np.where(
        hz < _BEND_HZ,
        hz / _HZ_A_MEL,
        _BEND_HZ / _HZ_A_MEL + np.log(np.maximum(hz, _BEND_HZ) / _BEND_HZ) / _LOG_STEP,
    )


def _mel_to_hz(mel):
    bend = _BEND_HZ / _HZ_A_MEL
    return np.where(mel < bend, mel * _HZ_A_MEL, _BEND_HZ * np.exp((mel - bend) * _LOG_STEP))


def _unit(x):
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), COSINE_FLOOR**2))


def _rows(x):
    """The mean of each row."""
    return x.reshape(len(x), -1).mean(axis=1)
