"""Sound: from a file to log-mel filter banks.

Goes in: a file or samples. Comes out: float32[A, M], one row every 10 ms.
The order is `read_audio`, then `fbank`. Read next: `processor.py`, which gives the frames their
placeholders; `models/audio.py` subtracts the mean (CMVN).
"""

from __future__ import annotations

import functools
import math
import wave
from pathlib import Path

import numpy as np

from vita_jax.data.image import find_file

SAMPLE_RATE_HZ = 16000  # of everything the audio encoder hears
FRAME_SAMPLES = 400  # 25 ms: one frame of the filter bank
HOP_SAMPLES = 160  # 10 ms from one frame to the next
FFT_SAMPLES = 512  # a frame padded to a power of two
LOW_HZ = 20.0  # lower edge of the first mel band; the last one ends at half the sample rate
PREEMPHASIS = 0.97
SAMPLE_SCALE = 32768.0  # the filter bank sees samples as 16-bit integers
ENERGY_FLOOR = float(np.finfo(np.float32).eps)  # of a band, before the logarithm
QUIET = 0.02  # of the loudest sample: what is quieter is silence
SINC_ZEROS = 6  # zero crossings of the resampling filter on either side
SINC_ROLLOFF = 0.99  # where it cuts off, as a part of the lower half rate
RATES_HZ = (1000, 1_000_000)  # lowest and highest sample rate that is believed
READ_SAMPLES = 1 << 20  # of a file at a time
MAX_PEAK = 8.0  # loud lossy recordings decode to a little over 1, unscaled integers to thousands
MAX_CHANNELS = 64  # more means that the axes are the wrong way round


def read_audio(
    source: str | Path | tuple[np.ndarray, int], sample_rate_hz: int = SAMPLE_RATE_HZ
) -> np.ndarray:
    """The sound as float32[W], one channel at `sample_rate_hz`, in [-1, 1].

    Channels are averaged (the release takes the first, which loses a speaker on the second).

    Args:
      source: a file that libsndfile or FFmpeg reads, or (samples, rate in Hz), the samples [W] or
        [W, C] and floats in [-1, 1], uint8, int16 or int32.
      sample_rate_hz: rate of the result.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is empty, cut short or not a sound; there are no samples, or some are
        NaN, infinite or far beyond [-1, 1]; the rate is not between 1 kHz and 1 MHz.
    """
    if isinstance(source, tuple):
        name, (samples, rate_hz) = "sound", source
    else:
        name = find_file(source, "sound")
        samples, rate_hz = _read_file(name)
    low_hz, high_hz = RATES_HZ
    if not (low_hz <= rate_hz <= high_hz and rate_hz == int(rate_hz)):
        allowed = f"a whole number from {low_hz} to {high_hz}"
        raise ValueError(f"{name}: sample rate {rate_hz} Hz; expected {allowed}")
    samples = _to_float(np.asarray(samples), name)
    if not np.isfinite(samples).all():
        raise ValueError(f"{name}: samples that are NaN or infinite; record or export it again")
    if (peak := np.abs(samples).max()) > MAX_PEAK:
        raise ValueError(f"{name}: samples up to {peak:.0f}; scale them to [-1, 1]")
    waveform = samples.mean(axis=1, dtype=np.float32) if samples.ndim == 2 else samples
    return resample(waveform, int(rate_hz), sample_rate_hz)


def resample(waveform: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """The waveform at another rate, through a Hann-windowed sinc.

    Args:
      waveform: float32[W].
      from_hz: its sample rate.
      to_hz: the rate wanted.

    Returns:
      float32[ceil(W * to_hz / from_hz)].

    Source: J. O. Smith, Digital Audio Resampling (band-limited interpolation), with the filter
    length and cut-off that torchaudio has by default.
    """
    common = math.gcd(from_hz, to_hz)
    down, up = from_hz // common, to_hz // common
    waveform = np.asarray(waveform, np.float32)
    if down == up:
        return waveform
    num_out = -(-len(waveform) * up // down)
    cutoff = min(down, up) * SINC_ROLLOFF
    reach = math.ceil(SINC_ZEROS * down / cutoff)  # input samples heard on either side
    num_periods = -(-num_out // up)
    padded = np.pad(waveform, (reach, num_periods * down + 2 * reach + 2 - len(waveform)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 2)
    out = np.empty((num_periods, up), np.float32)
    for phase in range(up):  # output samples `up` apart lie alike among the input: one filter each
        start = phase * down // up
        offset = (np.arange(-reach, reach + 2) + start) / down - phase / up
        x = np.clip(offset * cutoff, -SINC_ZEROS, SINC_ZEROS)
        taps = np.sinc(x) * np.cos(x * np.pi / SINC_ZEROS / 2) ** 2 * cutoff / down
        out[:, phase] = windows[start::down][:num_periods] @ taps.astype(np.float32)
    return out.reshape(-1)[:num_out]


def trim(waveform: np.ndarray, rate_hz: int, front_s: float, back_s: float) -> np.ndarray:
    """float32[w] of float32[W]: at most so many seconds of silence before and behind the sound."""
    loud = np.flatnonzero(np.abs(waveform) > QUIET * np.abs(waveform).max(initial=0))
    if not len(loud):
        return waveform
    start = max(0, loud[0] - round(front_s * rate_hz))
    return waveform[start : loud[-1] + 1 + round(back_s * rate_hz)]


def fbank(
    waveform: np.ndarray,
    num_mel_bins: int = 80,
    dither: float = 0.0,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Log-mel filter banks as Kaldi computes them, without mean subtraction.

    Args:
      waveform: float32[W], 16 kHz, in [-1, 1].
      num_mel_bins: bands between 20 Hz and 8 kHz.
      dither: deviation of the noise added to every frame, on the scale of 16-bit integers.
      rng: where the noise comes from; None for a fresh generator.

    Returns:
      float32[A, M] with A = 1 + (W - 400) // 160: only whole frames of 25 ms, 10 ms apart.

    Raises:
      ValueError: the waveform is shorter than one frame.

    Source: Kaldi, `compute-fbank-feats` (Povey window, power spectrum, no energy).
    """
    if len(waveform) < FRAME_SAMPLES:
        length_ms = 1000 * len(waveform) / SAMPLE_RATE_HZ
        raise ValueError(
            f"a sound of {length_ms:.1f} ms is shorter than one 25 ms frame; record more"
        )
    samples = np.asarray(waveform, np.float64) * SAMPLE_SCALE
    frames = np.lib.stride_tricks.sliding_window_view(samples, FRAME_SAMPLES)[::HOP_SAMPLES]
    if dither:
        frames = frames + dither * (rng or np.random.default_rng()).standard_normal(frames.shape)
    frames = frames - frames.mean(axis=1, keepdims=True)
    previous = np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    window = np.hanning(FRAME_SAMPLES) ** 0.85
    spectrum = np.fft.rfft((frames - PREEMPHASIS * previous) * window, FFT_SAMPLES)
    energy = np.square(np.abs(spectrum)) @ _mel_bands(num_mel_bins)
    return np.log(np.maximum(energy, ENERGY_FLOOR)).astype(np.float32)


def write_wav(path: str | Path, waveform: np.ndarray, sample_rate_hz: int) -> None:
    """Writes float[W] as 16-bit PCM; what lies outside [-1, 1] is clipped."""
    samples = np.asarray(waveform, np.float32)  # in bfloat16 a full-scale sample would wrap around
    pcm = np.clip(np.round(samples * SAMPLE_SCALE), -SAMPLE_SCALE, SAMPLE_SCALE - 1)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate_hz)
        file.writeframes(pcm.astype("<i2").tobytes())


def mel(hz):
    """Kaldi's mel scale, of float[...] Hz."""
    return 1127 * np.log1p(np.asarray(hz) / 700)


def mel_hz(mels):
    """The frequencies in Hz of float[...] on the mel scale."""
    return 700 * np.expm1(np.asarray(mels) / 1127)


def mel_edges(num_mel_bins: int) -> np.ndarray:
    """float64[M + 2] on the mel scale: where bands begin; M centres are in the middle."""
    return np.linspace(mel(LOW_HZ), mel(SAMPLE_RATE_HZ / 2), num_mel_bins + 2)


@functools.cache
def _mel_bands(num_mel_bins):
    """float64[FFT / 2 + 1, M]: weights of frequencies in bands: triangles on the mel scale."""

    edges = mel_edges(num_mel_bins)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    at = mel(np.linspace(0, SAMPLE_RATE_HZ / 2, FFT_SAMPLES // 2 + 1))[:, None]
    bands = np.minimum((at - left) / (centre - left), (right - at) / (right - centre)).clip(0)
    bands[-1] = 0  # Kaldi leaves the Nyquist bin out
    return bands


def _read_file(path):
    """Samples [W, C] and rate of a file."""
    import soundfile

    if (cut := _missing_bytes(path)) > 0:
        raise ValueError(f"{path}: cut short, {cut} bytes are missing; copy or record it again")
    try:
        with soundfile.SoundFile(path) as file:
            pieces, rate_hz = [], file.samplerate
            # By pieces to the end: a streamed FLAC or an MP3 without a table claims any length.
            while len(piece := file.read(READ_SAMPLES, dtype="float32", always_2d=True)):
                pieces.append(piece)
    except (soundfile.SoundFileError, TypeError):  # TypeError: a name ending in .raw
        pieces, rate_hz = _read_with_ffmpeg(path)
    return (np.concatenate(pieces) if pieces else np.zeros((0, 1), np.float32)), rate_hz


def _missing_bytes(path):
    """Bytes that a WAV header promises beyond the end of the file; libsndfile ignores them."""
    with path.open("rb") as file:
        riff = file.read(12)
        if riff[:4] != b"RIFF" or riff[8:] != b"WAVE":
            return 0
        while len(chunk := file.read(8)) == 8:
            num_bytes = int.from_bytes(chunk[4:], "little")
            if chunk[:4] == b"data":
                streamed = num_bytes >= 0x7FFFF000  # written to a pipe: the length was not known
                return 0 if streamed else num_bytes - (path.stat().st_size - file.tell())
            file.seek(num_bytes + num_bytes % 2, 1)
    return 0


def _read_with_ffmpeg(path):
    """Samples in pieces [W, C] and rate of a file libsndfile does not know, such as a video."""
    import av

    try:
        with av.open(path) as container:
            if not container.streams.audio:
                raise ValueError(f"{path}: no sound in it; give a recording")
            rate_hz = container.streams.audio[0].rate
            as_float = av.AudioResampler(format="fltp").resample
            frames = [part for frame in container.decode(audio=0) for part in as_float(frame)]
            return [frame.to_ndarray().T for frame in frames], rate_hz
    except av.FFmpegError as error:
        reason = error.strerror
        raise ValueError(f"{path}: not a sound, or damaged ({reason}); export it again") from error


def _to_float(samples, name):
    """Samples of any of the allowed types as float32 with full scale 1."""
    if samples.ndim not in (1, 2) or samples.ndim == 2 and samples.shape[1] > MAX_CHANNELS:
        raise ValueError(f"{name}: samples of shape {list(samples.shape)}; expected [W] or [W, C]")
    if not samples.size:
        raise ValueError(f"{name}: no samples (0 s of sound); record it again")
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    if samples.dtype in (np.int16, np.int32):
        return (samples / -float(np.iinfo(samples.dtype).min)).astype(np.float32)
    if samples.dtype.kind == "f":
        return samples.astype(np.float32)
    allowed = "floats, uint8, int16 or int32"
    raise ValueError(f"{name}: samples of type {samples.dtype}; expected {allowed}")
