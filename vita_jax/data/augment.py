"""Speech made harder to recognise, so that the encoder learns what matters.

Goes in: a waveform, later its filter bank. Comes out: the same, faster or slower, noisier, of
another speaker, with gaps. Everything is drawn from the generator given. Read next: `processor.py`,
which calls this.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from vita_jax.data.audio import (
    SAMPLE_RATE_HZ,
    mel,
    mel_edges,
    mel_hz,
    read_audio,
    resample,
    trim,
)

# Source: Ko et al. 2015, Audio Augmentation for Speech Recognition; more steps than there
SPEEDS = (0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15)
WARP = 0.12  # frequencies are higher or lower by up to this share; ours
SNR_DB = (5.0, 20.0)  # speech over noise, drawn evenly; ours
TRIMMED_SHARE = 0.7  # of clips whose silence is cut; ours
LONGEST_SILENCE_S = 0.6  # that is then left at either end; ours
NOISE_SHARE = 0.5  # of clips that get noise, if there is any; ours
SOUND_FILES = (".wav", ".flac", ".ogg", ".mp3")
# Gaps: how many, and the longest. Source: WeNet's recipes, `spec_aug`.
TIME_GAPS, MAX_TIME_GAP = 2, 50  # frames of 10 ms
BAND_GAPS, MAX_BAND_GAP = 2, 10  # mel bins


@dataclasses.dataclass(frozen=True)
class Augment:
    """Speed perturbation, noise, other speakers and SpecAugment for clips.

    Attributes:
      noises: files of noise; none mixes no noise in.
    """

    noises: tuple[str, ...] = ()

    @classmethod
    def with_noises(cls, folder: str | Path) -> Augment:
        """Mixes in the sound files of a folder and its subfolders.

        Raises:
          ValueError: there are none.
        """
        files = sorted(str(f) for f in Path(folder).rglob("*") if f.suffix.lower() in SOUND_FILES)
        if not files:
            raise ValueError(f"{folder}: no sound files; expected {', '.join(SOUND_FILES)}")
        return cls(tuple(files))

    def waveform(self, waveform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """float32[W], 16 kHz, with less silence around it, at another speed and with noise; W
        changes.
        """
        if rng.random() < TRIMMED_SHARE:
            waveform = trim(waveform, SAMPLE_RATE_HZ, *rng.uniform(0, LONGEST_SILENCE_S, 2))
        speed = SPEEDS[rng.integers(len(SPEEDS))]
        waveform = resample(waveform, round(speed * SAMPLE_RATE_HZ), SAMPLE_RATE_HZ)
        if not self.noises or rng.random() >= NOISE_SHARE:
            return waveform
        noise = read_audio(self.noises[rng.integers(len(self.noises))])
        noise = np.roll(noise, -rng.integers(len(noise)))
        return mix(waveform, np.resize(noise, len(waveform)), rng.uniform(*SNR_DB))

    def speaker(self, banks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """float32[A, M] with all frequencies higher or lower, as of someone smaller or larger.

        Source: Jaitly and Hinton 2013, Vocal Tract Length Perturbation.
        """
        num_bins = banks.shape[1]
        centres = mel_edges(num_bins)[1:-1]
        moved = mel(mel_hz(centres) * rng.uniform(1 - WARP, 1 + WARP))
        at = np.interp(moved, centres, np.arange(num_bins))
        below = np.minimum(at.astype(int), num_bins - 2)
        share = (at - below).astype(np.float32)
        return banks[:, below] * (1 - share) + banks[:, below + 1] * share

    def gaps(self, banks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """float32[A, M] with stretches of time and bands of frequency set to each bin's mean. A gap
        in time is at most a tenth of the clip: a question is short, and a fifth of it is a word.

        Source: Park et al. 2019, SpecAugment.
        """
        banks, mean = banks.copy(), banks.mean(axis=0)
        num_frames, num_bins = banks.shape
        for _ in range(TIME_GAPS):
            first, end = _gap(num_frames, min(MAX_TIME_GAP, num_frames // 10), rng)
            banks[first:end] = mean
        for _ in range(BAND_GAPS):
            first, end = _gap(num_bins, MAX_BAND_GAP, rng)
            banks[:, first:end] = mean[first:end]
        return banks


def mix(waveform: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """float32[W] and noise float32[W] so loud that the first has `snr_db` more power. Where either
    is silent nothing is mixed.
    """
    power, noise_power = np.mean(np.square(waveform)), np.mean(np.square(noise))
    if not power or not noise_power:
        return waveform
    gain = np.sqrt(power / noise_power / 10 ** (snr_db / 10))
    return (waveform + gain * noise).astype(np.float32)


def _gap(size, longest, rng):
    """First and end of up to `longest` neighbours among `size`."""
    length = rng.integers(longest + 1)
    first = rng.integers(size - length + 1)
    return first, first + length
