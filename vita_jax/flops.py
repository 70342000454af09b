"""How much arithmetic a step is, and how fast this machine multiplies matrices.

Goes in: a model's sizes and a batch. Comes out: floating-point operations, a multiplication and an
addition each counting as one. Only what the model needs is counted, for real tokens, tiles and
frames: neither padding nor what is computed again in the backward pass.
"""

from __future__ import annotations

import math
import time

import jax
import jax.numpy as jnp
import numpy as np

from vita_jax.batch import Batch
from vita_jax.config import VitaConfig


def model_flops(config: VitaConfig, objective: str, trained, batch: Batch) -> float:
    """Matrix products of a training step, forwards and backwards.

    Args:
      config: the model.
      objective: "next_token", or "ctc": then the audio encoder alone is used.
      trained: paths of the parameters that train. A part that does not train, with nothing
        before it that does, has no backward pass.
      batch: NumPy arrays.
    """
    tokens = int((batch.segment_ids > 0).sum())
    pairs = int((batch.positions + 1)[batch.segment_ids > 0].sum())  # that attend to each other
    tiles = 0 if batch.tiles is None else int(batch.tile_mask.sum())
    frames = np.zeros(0) if batch.audio is None else batch.audio_mask.sum(axis=-1).ravel()
    frames = frames[frames > 0]
    encoder = ("audio/encoder", _audio(config, frames))
    if objective == "ctc":
        steps = config.audio.encoder_frames(frames).sum()
        head = 2 * steps * config.audio.embed_dim * config.audio.num_units
        return _passes([encoder, ("audio/ctc", head)], trained)
    vision, audio = _vision(config, tiles), [encoder, ("audio/adapter", _adapter(config, frames))]
    # Backwards through the LLM whenever anything trains; through an encoder only for its own sake.
    total = _passes(vision, trained) + _passes(audio, trained)
    total += _llm(config, tokens, pairs) * (2 + any(path.startswith("llm/") for path in trained))
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


def _passes(parts, trained):
    """Work of parts one behind the other: (path, forward FLOPs)."""
    total, upstream = 0.0, False
    for path, forward in parts:
        trains = any(p.startswith(path) for p in trained)
        total += forward * (1 + trains + upstream)
        upstream = upstream or trains
    return total


def _llm(config, tokens, pairs):
    """Forward FLOPs of blocks and head."""
    c = config.llm
    heads = c.embed_dim * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    a_token = c.num_layers * (heads + 3 * c.embed_dim * c.mlp_dim) + c.embed_dim * c.vocab_size
    return 2 * tokens * a_token + 4 * pairs * c.num_layers * c.num_heads * c.head_dim


def _vision(config, tiles):
    c = config.vision
    t, wide = c.grid**2 + 1, 4 * c.embed_dim
    block = 2 * t * c.embed_dim * (4 * c.embed_dim + 2 * c.mlp_dim) + 4 * t * t * c.embed_dim
    patches = 2 * c.grid**2 * 3 * c.patch_px**2 * c.embed_dim
    projector = 2 * c.embeddings_per_tile * (wide * c.out_dim + c.out_dim**2)
    return [
        ("vision/encoder", tiles * (c.num_layers * block + patches)),
        ("vision/projector", tiles * projector),
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
    return float((2 * c.adapter_frames(frames) * (kernel + c.adapter_dim * c.out_dim)).sum())
