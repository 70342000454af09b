"""How much arithmetic a step is, how many bytes it moves, and how fast this machine multiplies
matrices and copies.

Goes in: a model's sizes and a batch, or what a program of the engine is called with. Comes out:
floating-point operations, a multiplication and an addition each counting as one, and bytes. Only
what the model needs is counted, for real tokens, tiles and frames: neither padding nor what is
computed again in the backward pass.
"""

from __future__ import annotations

import dataclasses
import math
import time

import jax
import jax.numpy as jnp
import numpy as np

from vita_jax import params as trees
from vita_jax.batch import TEXT_TOKEN, Batch
from vita_jax.config import VitaConfig
from vita_jax.models.discriminators import (
    FFT_SIZES,
    PERIOD_LAYERS,
    PERIODS,
    SCALE_LAYERS,
    SCALES,
    STFT_LAYERS,
)


def model_flops(
    config: VitaConfig, objective: str, trained, batch: Batch, discriminator_channels: int = 0
) -> float:
    """Matrix products of a training step, forwards and backwards.

    Args:
      config: the model.
      objective: "next_token"; "match": then the vision encoder and projector alone are used; "ctc":
        the audio encoder; "align": with the adapter; "speech": the speech decoders; "codec".
      trained: paths of the parameters that train. A part that does not train, with nothing
        before it that does, has no backward pass. An adapter is part of what it adapts.
      batch: NumPy arrays.
      discriminator_channels: of the codec's discriminators; 0 for none.
    """
    trained = [path.removeprefix("lora/") for path in trained]
    if objective == "speech":
        return _passes(_speech(config, batch), trained)
    if objective == "codec":
        number = int((batch.segment_ids > 0).any(axis=1).sum())
        length = batch.waveform.shape[-1]
        judge = _discriminators(discriminator_channels, length) if discriminator_channels else 0
        # Recorded and made waveforms are judged; backwards, both for the discriminators' weights,
        # the made one once more for the codec, which needs no gradient of these.
        return number * (_passes(_codec(config.codec, length), trained) + 7 * judge)
    tokens = int((batch.segment_ids > 0).sum())
    pairs = int((batch.positions + 1)[batch.segment_ids > 0].sum())  # that attend to each other
    tiles = 0 if batch.tiles is None else int(batch.tile_mask.sum())
    frames = np.zeros(0) if batch.audio is None else batch.audio_mask.sum(axis=-1).ravel()
    frames = frames[frames > 0]
    if objective == "match":
        return _passes(_vision(config, tiles), trained)
    encoder = ("audio/encoder", _audio(config, frames), 1 - 1 / config.audio.num_layers)
    if objective == "ctc":
        steps = config.audio.encoder_frames(frames).sum()
        head = 2 * steps * config.audio.embed_dim * config.audio.num_units
        return _passes([encoder, ("audio/ctc", head, 0)], trained)
    vision, audio = _vision(config, tiles), [encoder, _adapter(config, frames)]
    if objective == "align":
        steps = config.audio.adapter_frames(frames).sum()
        table = 2 * steps * config.llm.embed_dim * config.llm.vocab_size
        return _passes([*audio, ("llm/embedding", table, 0)], trained)
    # Backwards through the LLM whenever anything trains; through an encoder only for its own sake.
    total = _passes(vision, trained) + _passes(audio, trained)
    targets = int((batch.loss_mask * (batch.segment_ids > 0) > 0).sum())  # others have no logits
    learns = any(path.startswith("llm/") for path in trained)
    total += _llm(config, tokens, pairs, targets) * (2 + learns)
    return float(total)


def matmul_flops_per_s(dtype: str) -> float:
    """Measured rate of large square matrix products on all devices together; takes about a second.

    Devices of a CPU share its cores, so there one is measured for all.
    """
    on_cpu = jax.default_backend() == "cpu"
    size, repeats = (1024, 4) if on_cpu else (8192, 16)
    device = jax.local_devices()[0]
    a = jax.device_put(np.ones((size, size), jnp.dtype(dtype)), device)
    product = jax.jit(lambda x, y: jax.lax.fori_loop(0, repeats, lambda _, z: z @ y / size, x))
    product(a, a).block_until_ready()
    best_s = math.inf
    for _ in range(3):
        start_s = time.perf_counter()
        product(a, a).block_until_ready()
        best_s = min(best_s, time.perf_counter() - start_s)
    return 2 * size**3 * repeats / best_s * (jax.process_count() if on_cpu else jax.device_count())


def copy_bytes_per_s() -> float:
    """Measured rate at which one device reads a large array and writes it again, in place; bytes
    read and bytes written both count. Takes about a second.
    """
    size = 1 << (26 if jax.default_backend() == "cpu" else 29)
    touch = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = touch(jnp.zeros(size, jnp.float32))
    best_s = math.inf
    for _ in range(5):
        x.block_until_ready()
        start_s = time.perf_counter()
        x = touch(x).block_until_ready()
        best_s = min(best_s, time.perf_counter() - start_s)
    return 2 * x.nbytes / best_s


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a call has to do at least.

    Attributes:
      flops: floating-point operations of matrix products.
      bytes: of the weights, once for every pass, and of the used part of caches.
    """

    flops: float
    bytes: float


def decode_cost(
    config: VitaConfig, params, length: int, num_tokens: int, num_rows: int = 1
) -> Cost:
    """Writing `num_tokens` in each of `num_rows` rows that hold `length` tokens."""
    seen = num_rows * sum(range(length + 1, length + num_tokens + 1))
    weights = _nbytes(params["llm"], but=("embedding", "state"))
    return Cost(
        _llm(config, num_rows * num_tokens, seen, num_rows * num_tokens),
        num_tokens * weights + seen * _slot_bytes(config.llm),
    )


def prefill_cost(config: VitaConfig, params, num_tokens: int, span: int) -> Cost:
    """Reading `num_tokens` embeddings into an empty row, at most `span` in a pass; no logits."""
    c, pairs = config.llm, num_tokens * (num_tokens + 1) / 2
    weights = _nbytes(params["llm"], but=("embedding", "state", "head"))
    return Cost(
        _llm(config, num_tokens, pairs, 0),
        -(-num_tokens // span) * weights + num_tokens * _slot_bytes(c),
    )


def tile_cost(config: VitaConfig, params) -> Cost:
    """Encoding a tile."""
    return Cost(float(sum(work for _, work, _ in _vision(config, 1))), _nbytes(params["vision"]))


def clip_cost(config: VitaConfig, params, num_frames: int, num_clips: int = 1) -> Cost:
    """Encoding clips of `num_frames` filter-bank frames each."""
    frames = np.full(num_clips, num_frames)
    work = _audio(config, frames) + _adapter(config, frames)[1]
    return Cost(work, _nbytes(params["audio"], but=("ctc",)))


def speech_cost(
    config: VitaConfig, params, num_text: int, num_codes: int, num_rows: int = 1
) -> Cost:
    """Reading `num_text` tokens with the NAR decoder and the AR decoder, a row at a time, then
    drawing `num_codes` in all rows together.
    """
    c = config.speech
    pieces = num_text * config.speech_frames_per_token
    start, seen = pieces + 1, sum(range(pieces + 2, pieces + num_codes + 2))
    block = 2 * c.embed_dim * (4 * c.embed_dim + 3 * c.mlp_dim)
    nar = c.num_nar_layers * (pieces * block + 4 * pieces**2 * c.embed_dim)
    ar = (start + num_codes) * block + 4 * (start**2 + seen) * c.embed_dim
    head = 2 * num_codes * c.embed_dim * c.vocab_size
    whole = _nbytes(params["speech"], but=("embedding",))
    nar_bytes = _nbytes(params["speech"]["nar"])
    ar_bytes = _nbytes(params["speech"]["ar"])
    return Cost(
        float(num_rows * (nar + c.num_layers * ar + head)),
        num_rows * (nar_bytes + ar_bytes + seen * _slot_bytes(c)) + num_codes * (whole - nar_bytes),
    )


def codec_cost(config: VitaConfig, params, num_codes: int, num_rows: int = 1) -> Cost:
    """Decoding windows of `num_codes`; of what is between the layers nothing is counted as moved,
    of the waveform its samples.
    """
    samples = num_codes * config.codec.samples_per_token
    return Cost(
        num_rows * _codec(config.codec, samples)[1][1],
        _nbytes(params["codec"]["decoder"]) + 4 * num_rows * samples,
    )


def _nbytes(params, but=()) -> int:
    """Bytes of parameters, those left out whose path begins with a word of `but`."""
    flat = trees.flatten(params)
    return sum(x.size * x.dtype.itemsize for path, x in flat.items() if not path.startswith(but))


def _slot_bytes(c) -> int:
    """Bytes of a token in the cache of an LLM or of a speech decoder."""
    return 2 * c.num_layers * c.num_kv_heads * c.head_dim * jnp.dtype(c.dtype).itemsize


def _passes(parts, trained):
    """Work of parts one behind the other: (path, forward FLOPs, share of its later layers).
    Backwards, the gradient of what goes in is needed behind the first weight that trains.
    """
    total, upstream = 0.0, False
    for path, forward, later in parts:
        trains = any(p.removeprefix("lora/").startswith(path) for p in trained)
        total += forward * (1 + trains + (1 if upstream else later * trains))
        upstream = upstream or trains
    return float(total)


def _speech(config, batch):
    c = config.speech
    block = 2 * c.embed_dim * (4 * c.embed_dim + 3 * c.mlp_dim)
    before = (batch.tokens == TEXT_TOKEN) | (batch.tokens == c.bos_id)
    real = batch.segment_ids > 0
    # Utterances of a row are numbered, so that each prefix is counted by itself.
    prefixes = [np.bincount(ids[is_text]) for ids, is_text in zip(batch.segment_ids, before & real)]
    prefixes = np.concatenate(prefixes)
    pieces = np.maximum(prefixes - 1, 0)
    pairs = (prefixes**2).sum() + (batch.positions + 1)[real & ~before].sum()
    nar = c.num_nar_layers * (pieces.sum() * block + 4 * (pieces**2).sum() * c.embed_dim)
    ar = c.num_layers * (real.sum() * block + 4 * pairs * c.embed_dim)
    head = 2 * real.sum() * c.embed_dim * c.vocab_size
    later = 1 - 1 / max(c.num_nar_layers, 1)
    return [("speech/nar", nar, later), ("speech/ar", ar, 1), ("speech/head", head, 0)]


def _llm(config, tokens, pairs, num_logits):
    """Forward FLOPs of blocks, and of the head for some of the tokens."""
    c = config.llm
    heads = c.embed_dim * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    blocks = 2 * tokens * c.num_layers * (heads + 3 * c.embed_dim * c.mlp_dim)
    head = 2 * num_logits * c.embed_dim * c.vocab_size
    return blocks + head + 4 * pairs * c.num_layers * c.num_heads * c.head_dim


def _codec(c, length):
    """Encoder, once and its first half once more for another piece's timbre, and decoder."""
    stages = list(zip(c.upsample_rates, c.upsample_kernels))
    kinds = [(k, len(d)) for k, d in zip(c.resblock_kernels, c.resblock_dilations)]

    def blocks(time, channels):
        return sum(2 * 2 * number * time * width * channels**2 for width, number in kinds)

    time, channels = length, c.encoder_channels
    halves = [2 * time * 7 * channels, 0]
    for i, (rate, width) in enumerate(stages[::-1]):
        time, channels = time // rate, channels * 2
        work = 2 * time * width * channels**2 / 2 + blocks(time, channels)
        halves[i >= len(stages) // 2] += work
    halves[1] += 2 * time * 3 * channels * c.code_dim + 2 * time * c.num_codes * c.code_dim
    channels = c.channels
    decoder = 2 * time * 7 * c.code_dim * channels
    for rate, width in stages:
        channels //= 2
        decoder += 2 * time * width * 2 * channels**2
        time *= rate
        decoder += blocks(time, channels)
    decoder += 2 * time * 7 * channels
    encoder = 2 * halves[0] + halves[1]
    return [("codec/encoder", encoder, 1), ("codec/decoder", decoder, 1)]


def _discriminators(c, length):
    """Forward FLOPs of all of them, of one waveform."""
    total = 0
    for period in PERIODS:
        time, inputs = -(-length // period), 1
        for factor, width, stride in PERIOD_LAYERS:
            time = (time - 1) // stride + 1
            total += period * 2 * time * width * inputs * factor * c
            inputs = factor * c
        total += period * 2 * time * 3 * inputs
    for scale in SCALES:
        time, inputs = length // scale, 1
        for factor, width, stride, groups in SCALE_LAYERS:
            time = (time - 1) // stride + 1
            total += 2 * time * width * inputs // groups * factor * c
            inputs = factor * c
        total += 2 * time * 3 * inputs
    for n_fft in FFT_SIZES:
        time, bins, inputs = (length - n_fft) // (n_fft // 4) + 1, n_fft // 2 + 1, 2
        for width, stride, _ in STFT_LAYERS:
            bins = (bins - 1) // stride[1] + 1
            total += 2 * time * bins * math.prod(width) * inputs * c
            inputs = c
        total += 2 * time * bins * 9 * inputs
    return total


def _vision(config, tiles):
    c = config.vision
    t, wide = c.grid**2 + 1, 4 * c.embed_dim
    block = 2 * t * c.embed_dim * (4 * c.embed_dim + 2 * c.mlp_dim) + 4 * t * t * c.embed_dim
    patches = 2 * c.grid**2 * 3 * c.patch_px**2 * c.embed_dim
    projector = 2 * c.embeddings_per_tile * (wide * c.out_dim + c.out_dim**2)
    return [
        ("vision/encoder", tiles * (c.num_layers * block + patches), 1 - 1 / c.num_layers),
        ("vision/projector", tiles * projector, c.out_dim / (wide + c.out_dim)),
    ]


def _audio(config, frames):
    c = config.audio
    t = c.encoder_frames(frames)
    block = 2 * t * c.embed_dim * (4 * c.embed_dim + 2 * c.mlp_dim) + 6 * t * t * c.embed_dim
    positions = 2 * t * c.embed_dim**2
    bins = c.num_mel_bins // 4
    convolutions = 2 * t * bins * c.embed_dim * (4 * 9 + 9 * c.embed_dim)
    embed = 2 * t * bins * c.embed_dim**2
    return float((c.num_layers * (block + positions) + convolutions + embed).sum())


def _adapter(config, frames):
    c = config.audio
    kernel = c.adapter_kernel * c.embed_dim * c.adapter_dim
    out = c.adapter_dim * c.out_dim
    forward = float((2 * c.adapter_frames(frames) * (kernel + out)).sum())
    return "audio/adapter", forward, out / (kernel + out)
