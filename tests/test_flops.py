"""vita_jax/flops.py: counted arithmetic against XLA's own count."""

import dataclasses

import jax
import numpy as np
import pytest

from vita_jax.batch import Batch
from vita_jax.config import vita_tiny
from vita_jax.flops import matmul_flops_per_s, model_flops
from vita_jax.models.vita import Vita, param_shapes


def counted(config, method, *args):
    """FLOPs of a compiled call, by XLA."""
    model, params = Vita(config), param_shapes(config)
    run = jax.jit(lambda p, *a: model.apply({"params": p}, *a, method=method))
    return run.lower(params, *args).compile().cost_analysis()["flops"]


def one_layer():
    """XLA counts the body of a loop once. Wide, so that matrix products are nearly all there is."""
    config, wide = vita_tiny(), {"num_layers": 1, "embed_dim": 256, "mlp_dim": 1024}
    audio = dataclasses.replace(config.audio, **wide, num_units=500)
    vision = dataclasses.replace(config.vision, **wide, tile_px=112)
    llm = dataclasses.replace(config.llm, num_layers=1)
    return dataclasses.replace(config, vision=vision, audio=audio, llm=llm)


def batch(tokens, config, tiles=2, frames=400):
    ids = np.tile(np.arange(tokens, dtype=np.int32), (2, 1))
    pixels = np.zeros((2, tiles, *[config.vision.tile_px] * 2, 3), np.float32)
    audio = np.zeros((2, 1, frames, config.audio.num_mel_bins), np.float32)
    return Batch(
        ids % 300, ids, np.ones_like(ids), np.ones(ids.shape, np.float32),
        pixels, np.ones((2, tiles), bool), audio, np.ones((2, 1, frames), bool),
    )  # fmt: skip


def test_forward_passes_agree_with_the_compiler():
    config = one_layer()
    full = batch(256, config)
    text = dataclasses.replace(full, tiles=None, tile_mask=None, audio=None, audio_mask=None)
    # With nothing trained there is one pass (of the LLM two: backwards to what would train).
    llm = model_flops(config, "next_token", (), text) / 2
    pairs = 2 * 256 * 257 / 2  # XLA multiplies the masked half, too
    heads = 4 * config.llm.num_heads * config.llm.head_dim
    assert llm + heads * pairs == pytest.approx(counted(config, "__call__", text), rel=0.05)
    sees = model_flops(config, "next_token", (), dataclasses.replace(full, audio=None)) - 2 * llm
    assert sees == pytest.approx(counted(config, "encode_tiles", full.tiles), rel=0.05)
    hears = model_flops(config, "ctc", (), full)
    by_xla = counted(config, "unit_logits", full.audio, full.audio_mask)
    assert hears == pytest.approx(by_xla, rel=0.05)


def test_what_trains_takes_more_passes():
    config = one_layer()
    full = batch(64, config)
    everything = ("vision/encoder/x", "vision/projector/x", "audio/encoder/x", "llm/x")
    frozen = model_flops(config, "next_token", (), full)
    projector = model_flops(config, "next_token", ("vision/projector/out",), full)
    trained = model_flops(config, "next_token", everything, full)
    assert frozen < projector < trained < 3 * frozen
    hears = model_flops(config, "ctc", (), full)
    head = model_flops(config, "ctc", ("audio/ctc",), full) - hears  # one more pass of the head
    # The encoder has nothing before it, so it needs no gradient of its input.
    both = model_flops(config, "ctc", ("audio/encoder/x", "audio/ctc"), full)
    assert both == 2 * (hears - head) + 3 * head


def test_padding_does_not_count():
    config = one_layer()
    full = batch(64, config)
    half = dataclasses.replace(
        full,
        segment_ids=full.segment_ids * np.array([[1], [0]], np.int32),
        tile_mask=full.tile_mask & np.array([[True], [False]]),
        audio_mask=full.audio_mask & np.array([[[True]], [[False]]]),
    )
    assert 2 * model_flops(config, "next_token", (), half) == model_flops(
        config, "next_token", (), full
    )


def test_this_machine_multiplies():
    assert 1e8 < matmul_flops_per_s("float32") < 1e16
