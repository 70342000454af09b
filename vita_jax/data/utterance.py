"""Samples that the voice is trained on: pieces of clips, and words with the codec tokens for them.

Goes in: a sample in the release's format, or a record of `vita data codec-tokens`. Comes out: an
`Example`. Read next: `shard.py`, which packs these in rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vita_jax.batch import TEXT_TOKEN
from vita_jax.config import CodecConfig, VitaConfig
from vita_jax.data.audio import read_audio, trim
from vita_jax.data.processor import Example, Processor
from vita_jax.data.tokenizer import Tokenizer

MIN_SECONDS = 0.1
# Of silence that is left at either end of what is learned from; else it is half of synthesised
# clips.
SILENCE_S = 0.15


def example(
    objective: str,
    processor: Processor,
    sample: Mapping,
    max_tokens: int,
    rng: np.random.Generator | None = None,
) -> Example:
    """The arrays of a sample, by what a stage makes small.

    Args:
      objective: one of `config.OBJECTIVES`.
      processor: of the model that is trained.
      sample: a conversation; for "speech" a record of text and codec tokens.
      max_tokens: for "codec", how many codec tokens a piece of a clip has.
      rng: of what is drawn at random.

    Raises:
      FileNotFoundError, ValueError: the sample cannot be used.
    """
    if objective == "codec":
        return pieces(sample, processor.config.codec, max_tokens, rng)
    if objective == "speech":
        return utterance(sample, processor.config, processor.tokenizer)
    return processor.sample(sample, rng=rng)


def pieces(sample: Mapping, config: CodecConfig, num_tokens: int, rng) -> Example:
    """Two random pieces of a clip without its silence, for the codec; one of several clips is
    drawn, too.

    Args:
      sample: with `audio`, a sound or a list.
      config: the codec's.
      num_tokens: codec tokens of a piece.
      rng: where the pieces start.

    Returns:
      Example with `waveform` float32[2, W], zeros behind the end of a short clip, and a token for
      each codec token that the first piece makes.

    Raises:
      FileNotFoundError, ValueError: as `read_clip`.
    """
    clip = read_clip(sample, config.sample_rate_hz, rng)
    clip = trim(clip, config.sample_rate_hz, SILENCE_S, SILENCE_S)
    size = num_tokens * config.samples_per_token
    starts = rng.integers(max(len(clip) - size, 0) + 1, size=2)
    waveform = np.zeros((2, size), np.float32)
    for row, start in zip(waveform, starts):
        piece = clip[start : start + size]
        row[: len(piece)] = piece
    length = -(-min(len(clip), size) // config.samples_per_token)
    nothing = np.zeros(length, np.int32)
    return Example(nothing, np.ones(length, np.float32), None, (), waveform=waveform)


def utterance(sample: Mapping, config: VitaConfig, tokenizer: Tokenizer) -> Example:
    """Words and their codec tokens, as the speech decoder reads them: BOS, a TEXT_TOKEN for each
    piece of a text embedding, SOS, codec tokens, EOS; targets are the codec tokens and EOS.

    Args:
      sample: with `text` and `codes`, codec tokens.
      config: the model's.
      tokenizer: its tokenizer.

    Raises:
      ValueError: there is no text or no code, or a code that the model does not have.
    """
    where, c = f"sample {sample.get('id', 'without id')}", config.speech
    codes = sample.get("codes")
    if not isinstance(codes, list) or not codes:
        raise ValueError(f"{where}: no codes; make them with `vita data codec-tokens`")
    if bad := [x for x in codes if type(x) is not int or not 0 <= x < c.num_codes]:
        raise ValueError(f"{where}: code {bad[0]!r}; the model's are 0 to {c.num_codes - 1}")
    text = tokenizer.encode(words(sample))
    if not text:
        raise ValueError(f"{where}: no words to say")
    before = [c.bos_id, *[TEXT_TOKEN] * len(text) * config.speech_frames_per_token, c.sos_id]
    is_target = np.arange(len(before) + len(codes) + 1) >= len(before)
    return Example(
        np.array([*before, *codes, c.eos_id], np.int32),
        is_target.astype(np.float32),
        None,
        (),
        text=np.array(text, np.int32),
    )


def words(sample: Mapping) -> str:
    """What a sample's clip says: its `text`, or its replies; empty if there are none."""
    if isinstance(sample.get("text"), str):
        return sample["text"].strip()
    turns = sample.get("conversations") or []
    return " ".join(turn["value"].strip() for turn in turns if turn.get("from") == "gpt")


def read_clip(sample: Mapping, sample_rate_hz: int, rng=None) -> np.ndarray:
    """float32[W] clip of a sample; with several, the first, or with `rng` any.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: there is no clip, it is shorter than 0.1 s, or as `read_audio`.
    """
    clips = sample.get("audio") or []
    clips = clips if isinstance(clips, list) else [clips]
    if not clips:
        raise ValueError(f"sample {sample.get('id', 'without id')}: no audio")
    source = clips[0 if rng is None or len(clips) == 1 else rng.integers(len(clips))]
    waveform = read_audio(source, sample_rate_hz)
    if len(waveform) < MIN_SECONDS * sample_rate_hz:
        seconds = len(waveform) / sample_rate_hz
        raise ValueError(f"{source}: {seconds:.2f} s of sound; give at least {MIN_SECONDS} s")
    return waveform
