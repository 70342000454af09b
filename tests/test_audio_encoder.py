"""vita_jax/models/audio.py against the recorded encoder, and a stream against the whole clip."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import assert_close, random_params, recorded_params, run, shapes_of

from vita_jax import tables
from vita_jax.config import AudioConfig, vita_tiny
from vita_jax.models.audio import (
    Audio,
    _halved,
    _halved_by_taps,
    init_audio_state,
    sinusoids,
    stream_frames,
)

RULES = tables.AUDIO_ENCODER + tables.AUDIO_ADAPTER + tables.AUDIO_PROMPTS


@pytest.fixture
def recording(golden):
    tensors, c = golden("whale_encoder")
    config = AudioConfig(
        num_mel_bins=c["mel"], embed_dim=c["dim"], num_layers=c["layers"], num_heads=c["heads"],
        mlp_dim=c["ff"], adapter_dim=2 * c["dim"], out_dim=c["llm"], num_prompts=c["prompts"],
        adapter_kernel=c["kernel"],
    )  # fmt: skip
    frames = tensors["in.speech"]
    rules = RULES if c["prompts"] else tables.AUDIO_ENCODER + tables.AUDIO_ADAPTER
    shapes = shapes_of(Audio(config), frames, jnp.asarray(tensors["in.speech_lengths"], jnp.int32))
    return tensors, config, recorded_params(tensors, rules, shapes), c["runs"]


def case_name(chunk, left):
    return "full" if chunk <= 0 else f"chunk{chunk}_left{'all' if left < 0 else left}"


@pytest.mark.golden
def test_every_recorded_chunk_setting(recording):
    tensors, config, params, runs = recording
    frames, lengths = tensors["in.speech"], jnp.asarray(tensors["in.speech_lengths"], jnp.int32)
    for chunk, left in runs:
        case = case_name(chunk, left)
        c = dataclasses.replace(config, chunk_size=chunk, left_chunks=left)
        x, _ = run(Audio(c), params, frames, lengths, method=lambda m, *a: m.encoder(*a))
        real = np.arange(x.shape[1]) < c.encoder_frames(np.asarray(lengths))[:, None]
        np.testing.assert_array_equal(
            real[:, None], tensors[f"out.{case}.encoder_mask"].astype(bool)
        )
        assert_close(x, tensors[f"out.{case}.encoder"])
        out = run(Audio(c), params, frames, lengths)
        assert_close(out, tensors[f"out.{case}.inputs_embeds"])
        assert_close(out[:, c.num_prompts :], tensors[f"out.{case}.adapter"])
        real = (
            np.arange(out.shape[1] - c.num_prompts) < c.adapter_frames(np.asarray(lengths))[:, None]
        )
        np.testing.assert_array_equal(
            real[:, None], tensors[f"out.{case}.adapter_mask"].astype(bool)
        )
        np.testing.assert_array_equal(real, tensors[f"out.{case}.attention_mask"].astype(bool))
    np.testing.assert_array_equal(
        config.adapter_frames(np.asarray(lengths)), tensors["out.lengths_for_llm"]
    )


@pytest.mark.golden
def test_every_recorded_stage(recording):
    tensors, config, params, _ = recording
    frames, lengths = tensors["in.speech"], jnp.asarray(tensors["in.speech_lengths"], jnp.int32)

    def stage(method, *args, c=config, p=params):
        return run(Audio(c), p, *args, method=method)

    normalised = stage(lambda m, x: m.encoder.cmvn(x), frames)
    assert_close(normalised[:, : tensors["mid.cmvn"].shape[1]], tensors["mid.cmvn"])
    subsampled = stage(lambda m, x: m.encoder.subsampled(x), frames)
    assert_close(subsampled, tensors["mid.subsampled"])
    np.testing.assert_array_equal(
        config.encoder_frames(np.asarray(lengths)), tensors["mid.subsampled_lengths"]
    )
    real = np.arange(subsampled.shape[1]) < config.encoder_frames(np.asarray(lengths))[:, None]
    np.testing.assert_array_equal(real[:, None], tensors["mid.subsampled_mask"].astype(bool))
    embedded = stage(lambda m, x: m.encoder.embedded(x), subsampled)
    assert_close(embedded, tensors["mid.embedded"])
    assert_close(sinusoids(embedded.shape[1], config.embed_dim)[None], tensors["mid.pos_emb"])
    all_blocks = params["encoder"]["blocks"]
    for layer in range(config.num_layers):
        c = dataclasses.replace(config, num_layers=layer + 1)
        blocks = {k: jax.tree.map(lambda p, n=layer + 1: p[:n], v) for k, v in all_blocks.items()}
        p = params | {"encoder": params["encoder"] | {"blocks": blocks}}

        def blocks_only(m, x):
            return m.encoder.transform(x, m.encoder.mask(x.shape[1], lengths, None))[0]

        assert_close(stage(blocks_only, embedded, c=c, p=p), tensors[f"mid.block{layer}"])


@pytest.mark.parametrize("chunk, left, cuts", [(4, 2, 1), (4, -1, 1), (2, 3, 3), (6, 0, 1)])
def test_stream_equals_whole_clip(chunk, left, cuts):
    config = dataclasses.replace(vita_tiny().audio, chunk_size=chunk, left_chunks=left)
    frames = jax.random.normal(jax.random.key(1), (1, 16 * chunk * cuts + 13, config.num_mel_bins))
    num_frames = jnp.array([frames.shape[1]])
    params = random_params(Audio(config), frames, num_frames)
    whole = run(Audio(config), params, frames, num_frames)

    state = init_audio_state(config, 1, config.encoder_frames(frames.shape[1]))
    pieces, at = [], 0
    while at < frames.shape[1]:
        size = stream_frames(config, state.frames.shape[1]) + 4 * chunk * (cuts - 1)
        final = at + size >= frames.shape[1]
        piece, state = run(
            Audio(config), params, frames[:, at : at + size], state, method="stream", final=final
        )
        pieces.append(piece)
        at += size
    assert sum(p.shape[1] > 0 for p in pieces) > 2
    assert_close(jnp.concatenate(pieces, axis=1), whole, 2e-6)


def test_padding_changes_nothing():
    config = vita_tiny().audio
    frames = jax.random.normal(jax.random.key(1), (1, 61, config.num_mel_bins))
    params = random_params(Audio(config), frames, jnp.array([61]))
    alone = run(Audio(config), params, frames, jnp.array([61]))
    padded = jnp.concatenate([frames, 7 * jnp.ones((1, 39, config.num_mel_bins))], axis=1)
    together = run(Audio(config), params, padded, jnp.array([61]))
    assert_close(together[:, : config.num_embeddings(61)], alone, 1e-6)


def test_clip_of_padding_only_is_finite():
    config = vita_tiny().audio
    frames = jnp.zeros((1, 40, config.num_mel_bins))
    params = random_params(Audio(config), frames, jnp.array([40]))
    assert np.isfinite(run(Audio(config), params, frames, jnp.array([0]))).all()


@pytest.mark.parametrize("size", [(2, 7, 80, 1), (1, 21, 39, 8), (3, 12, 5, 4)])
def test_a_convolution_by_taps_is_that_convolution(size):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal(size), rng.standard_normal((3, 3, size[-1], 6))
    x, kernel = x.astype(np.float32), kernel.astype(np.float32)
    np.testing.assert_allclose(_halved_by_taps(x, kernel), _halved(x, kernel), rtol=1e-5, atol=1e-5)
