"""Every program that a session can need, run once in every size. Goes in: an engine without work.

Arguments are of the kinds that `engine.py` gives, Python's numbers where it gives these: any other
kind would be compiled apart. Read next: `decode.py`.
"""

from __future__ import annotations

import jax
import numpy as np

from vita_jax.data.audio import HOP_SAMPLES, SAMPLE_RATE_HZ
from vita_jax.data.collate import bucket
from vita_jax.infer import voice as voices
from vita_jax.infer.chunks import FIRST_CHUNK, PADDING
from vita_jax.infer.decode import (
    begin_speech,
    begin_text,
    decode_codes,
    embed_text,
    next_speech,
    next_text,
    read,
    splice,
)
from vita_jax.infer.engine import (
    CODES_PER_CALL,
    MOST_CODES,
    SPANS,
    TOKENS_PER_CALL,
    Engine,
    lengths,
)
from vita_jax.infer.sampling import Sampler
from vita_jax.infer.session import Media


def warm_up(engine: Engine, max_audio_s: float) -> None:
    """Arguments as for `Engine.warm_up`, which calls this."""
    _write(engine, _read(engine, max_audio_s))
    if engine.speaks:
        _speak(engine)


def _read(engine, max_audio_s):
    """Reads pictures, sound and text; dtype[D] what `begin_text` takes."""
    config, params = engine.config, engine.params
    tile = Media(np.zeros((config.vision.tile_px,) * 2 + (3,), np.float32), 0)
    media = [engine._embeddings(tile)]
    if config.audio.chunk_size > 0:
        media.append(_hear_pieces(engine))
    else:
        longest = min(int(max_audio_s * SAMPLE_RATE_HZ / HOP_SAMPLES), config.audio.max_frames)
        for size in sorted({bucket(frames, 32) for frames in range(1, longest + 1)}):
            clip = Media(np.zeros((size, config.audio.num_mel_bins), np.float32), 0)
            media.append(engine._embeddings(clip))
    for size in SPANS:
        embeddings = embed_text(config, params, np.zeros(size, np.int32))
        for rows in media:
            embeddings = splice(embeddings, rows, 0, 0, 1)
        for num_seen in lengths(engine._num_slots):
            if num_seen >= size:
                args = params, engine._text, 0, embeddings, 0, 1
                engine._text, hidden = read(config, num_seen, *args)
    return hidden


def _hear_pieces(engine):
    """Encodes pieces of sound, until a stream keeps as much of them as it has before: such as fill
    a chunk, and whatever may be left at the end.
    """
    config, clip, before = engine.config.audio, Media(None, 0), set()
    engine._begin_clip(clip)
    while (kept := (clip.stream.state.frames.shape, clip.stream.state.tail.shape)) not in before:
        before.add(kept)
        state = clip.stream.state
        for chunk in range(config.chunk_size + 1):
            clip.stream.state = state
            frames = max(4 * chunk + 3 - state.frames.shape[1], 0)
            banks = np.zeros((frames, config.num_mel_bins), np.float32)
            engine._encode_piece(clip, banks, chunk < config.chunk_size)
    return clip.rows


def _write(engine, hidden):
    tokens, sampling = np.full(engine._num_slots, -1, np.int32), Sampler().arrays()
    args = engine._text, 0, hidden, tokens, jax.random.key(0), 1, sampling, engine._stops
    engine._text, _ = begin_text(engine.config, engine.params, *args)
    for num_seen in lengths(engine._num_slots):
        args = engine.params, engine._text, engine._running([]), engine._stops
        engine._text, _ = next_text(engine.config, num_seen, TOKENS_PER_CALL, *args)


def _speak(engine):
    config, params, sampling = engine.config, engine.params, Sampler().arrays()
    speaker = voices.Speaker(config, engine.tokenizer, 0)
    speaker.segments.append("a")
    _, length, key = speaker.next_segment()
    for size in sorted({bucket(n, 8) for n in range(1, 2 * voices.MAX_SEGMENT_TOKENS + 1)}):
        tokens, left = np.zeros(size, np.int32), np.int32(voices.MAX_CODES)
        args = engine._speech, 0, tokens, length, key, left, sampling
        engine._speech = begin_speech(config, params, *args)
    for num_seen in lengths(engine._speech.cache.k.shape[2]):
        args = params, engine._banned, engine._speech, engine._running([])
        engine._speech, _ = next_speech(config, num_seen, CODES_PER_CALL, *args)
    for rows in sorted({1 << (n - 1).bit_length() for n in range(1, len(engine._rows) + 1)}):
        for size in (FIRST_CHUNK + PADDING, MOST_CODES):
            codes, real = np.zeros((rows, size), np.int32), np.ones(rows, np.int32)
            timbre = np.zeros((rows, config.codec.num_global_tokens), np.int32)
            decode_codes(config, params, codes, real, timbre)
