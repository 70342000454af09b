"""vita_jax/attend.py: the attention that the model has, no other."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from vita_jax.attend import attend, walk
from vita_jax.batch import AUDIO_TOKEN, IMAGE_TOKEN
from vita_jax.config import vita_tiny
from vita_jax.data.processor import Turn
from vita_jax.data.tokenizer import load_bundled
from vita_jax.infer.engine import Engine
from vita_jax.models.attention import Segments
from vita_jax.models.vita import Vita, init_params

PICTURE = Image.fromarray(np.arange(60 * 60 * 3, dtype=np.uint8).reshape(60, 60, 3))
SOUND = (0.1 * np.sin(np.arange(16000) / 7).astype(np.float32), 16000)


@pytest.fixture(scope="module")
def engine():
    config = vita_tiny()
    config = dataclasses.replace(
        config, max_tiles=1, audio=dataclasses.replace(config.audio, num_prompts=2)
    )
    return Engine(config, init_params(config, 0), load_bundled("vita_tiny"))


def by_hand(config, params, x, positions):
    """float64[N, T, T] attention of the first layer over float64[T, D], a number at a time."""
    num_tokens, half = len(x), config.head_dim // 2
    norm = params["attn_norm"]["scale"][0]
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.norm_eps) * norm

    def heads(name):
        y = np.einsum("td,dnh->tnh", x, params["attn"][name][0]) + params["attn"][f"{name}_bias"][0]
        turned = np.empty_like(y)
        for t, position in enumerate(positions):
            for i in range(half):
                angle = position * config.rope_theta ** (-i / half)
                turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
                turned[t][:, [i, i + half]] = y[t][:, [i, i + half]] @ turn.T
        return turned

    q, k = heads("q"), heads("k")
    weights = np.zeros((config.num_heads, num_tokens, num_tokens))
    for n in range(config.num_heads):
        of = n // (config.num_heads // config.num_kv_heads)
        for t in range(num_tokens):
            e = np.exp([q[t, n] @ k[s, of] / config.head_dim**0.5 for s in range(t + 1)])
            weights[n, t, : t + 1] = e / e.sum()
    return weights


def test_the_walk_is_the_model(engine):
    c, rng = engine.config.llm, np.random.default_rng(0)
    x = rng.standard_normal((2, 12, c.embed_dim)).astype(np.float32)
    segment_ids = np.array([[1] * 7 + [2] * 5, [1] * 9 + [0] * 3], np.int32)
    positions = np.array([[*range(7), *range(5)], [*range(12)]], np.int32)
    params = jax.tree.map(np.asarray, engine.params["llm"])

    def states(model, x):
        return model.llm(x, positions, Segments(segment_ids))[0]

    last, weights = walk(c, params["blocks"], x, positions, segment_ids)
    wanted = Vita(engine.config).apply({"params": engine.params}, x, method=states)
    normed = np.asarray(last) / np.sqrt(np.square(last).mean(axis=-1, keepdims=True) + c.norm_eps)
    real = segment_ids > 0
    np.testing.assert_allclose(
        (normed * params["norm"]["scale"])[real], np.asarray(wanted)[real], atol=2e-5
    )
    assert weights.shape == (c.num_layers, 2, c.num_heads, 12, 12)
    weights = np.asarray(weights)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
    assert not weights[:, 0, :, 7:, :7].any() and not np.triu(weights[:, 0], 1).any()
    first = by_hand(c, params["blocks"], x[0, :7].astype(float), range(7))
    np.testing.assert_allclose(weights[0, 0, :, :7, :7], first, atol=1e-6)


def test_over_picture_and_sound(engine):
    turn = Turn("What is it?", [PICTURE], SOUND, reply="☞A cat.")
    seen = attend(engine, turn)
    assert seen.pieces[0] == "☞" and "".join(seen.pieces) == turn.reply
    num_tokens, num_layers = len(seen.tokens), engine.config.llm.num_layers
    shape = (len(seen.pieces), num_layers, engine.config.llm.num_heads, num_tokens)
    assert seen.weights.shape == shape
    np.testing.assert_allclose(seen.weights.sum(axis=-1), 1, atol=1e-5)
    # The first piece was written at the end of the prompt: nothing after that had been said.
    assert not seen.weights[0][..., num_tokens - len(seen.pieces) :].any()
    assert seen.weights[-1][..., -2].all() and not seen.weights[-1][..., -1].any()

    over = seen.weights.mean(axis=(1, 2))
    edge = engine.config.vision.embeddings_per_tile**0.5
    assert seen.picture().shape == (len(seen.pieces), edge, edge)
    np.testing.assert_allclose(
        seen.picture().reshape(len(over), -1), over[:, seen.tokens == IMAGE_TOKEN]
    )
    clip = over[:, seen.tokens == AUDIO_TOKEN]
    np.testing.assert_allclose(seen.sound(), clip[:, 2:])
    assert seen.sound().shape[1] == engine.config.audio.adapter_frames(98)


def test_a_turn_without_them(engine):
    with pytest.raises(ValueError, match="no reply"):
        attend(engine, Turn("What is it?"))
    seen = attend(engine, Turn("What is it?", reply="☜A cat."))
    with pytest.raises(ValueError, match="no picture"):
        seen.picture()
    with pytest.raises(ValueError, match="no sound"):
        seen.sound()
