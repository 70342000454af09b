"""vita_jax/flops.py: counted arithmetic against XLA's own count."""

import dataclasses

import jax
import numpy as np
import pytest

from vita_jax.batch import TEXT_TOKEN, Batch
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
    steps = config.audio.adapter_frames(full.audio_mask.sum(axis=-1)).sum()
    table = 2 * steps * config.llm.embed_dim * config.llm.vocab_size
    by_xla = counted(config, "encode_audio", full.audio, full.audio_mask)
    assert model_flops(config, "align", (), full) == pytest.approx(by_xla + table, rel=0.05)


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
    # An encoder of one layer needs no gradient of its input, one of two needs that of the second.
    both = model_flops(config, "ctc", ("audio/encoder/x", "audio/ctc"), full)
    assert both == 2 * (hears - head) + 3 * head
    deep = dataclasses.replace(config, audio=dataclasses.replace(config.audio, num_layers=2))
    hears = model_flops(deep, "ctc", (), full)
    both = model_flops(deep, "ctc", ("audio/encoder/x", "audio/ctc"), full)
    assert both == 2.5 * (hears - head) + 3 * head


def test_speech_decoders():
    """Two utterances in a row, forward, beside XLA's count of both, which knows no mask."""
    config = vita_tiny()
    wide = {"num_layers": 2, "embed_dim": 256, "mlp_dim": 1024, "num_heads": 4}
    config = dataclasses.replace(
        config,
        llm=dataclasses.replace(config.llm, embed_dim=1024, num_layers=1),
        vision=dataclasses.replace(config.vision, out_dim=1024),
        audio=dataclasses.replace(config.audio, out_dim=1024),
        speech=dataclasses.replace(config.speech, **wide),
    )
    c, codes, words = config.speech, 20, 3
    row = [c.bos_id, *[TEXT_TOKEN] * 4 * words, c.sos_id, *[7] * codes, c.eos_id]
    size = len(row)
    ids = np.repeat([1, 2], size).astype(np.int32)[None]
    talk = Batch(
        np.array([row + row], np.int32), np.tile(np.arange(size), 2)[None], ids, np.ones(ids.shape),
        text=np.ones((1, 2 * words), np.int32),
        text_segment_ids=np.repeat([1, 2], words).astype(np.int32)[None],
    )  # fmt: skip
    ours = model_flops(config, "speech", (), talk)
    one = dataclasses.replace(config, speech=dataclasses.replace(c, num_layers=1))
    layer = ours - model_flops(one, "speech", (), talk)  # one of each decoder
    assert layer > 0
    block = 2 * 256 * (4 * 256 + 3 * 1024)
    pairs = 2 * ((1 + 4 * words) ** 2 + sum(range(2 + 4 * words, size + 1)))
    nar = 2 * 4 * words * block + 4 * 2 * (4 * words) ** 2 * 256
    assert layer == nar + 2 * size * block + 4 * pairs * 256
    everything = model_flops(config, "speech", ("speech/nar/x", "speech/ar/x", "speech/head"), talk)
    # The only layer of the NAR decoder needs no gradient of its input.
    assert everything == 3 * ours - nar


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
