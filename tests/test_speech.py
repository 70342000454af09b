"""vita_jax/models/speech.py against the recorded speech decoder: teacher forcing, steps, greedy
tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import assert_close, random_params, recorded_params, run, shapes_of

from vita_jax import tables
from vita_jax.config import SpeechConfig, vita_tiny
from vita_jax.infer.sampling import penalize
from vita_jax.models.speech import Speech, init_speech_cache


@pytest.fixture
def recording(golden):
    tensors, c = golden("tts_decoder")
    config = SpeechConfig(
        embed_dim=c["dim"],
        num_layers=c["layers"],
        num_heads=c["heads"],
        mlp_dim=c["ff"],
        num_codes=c["codes"],
    )
    x = jnp.zeros((1, 1, config.embed_dim))
    shapes = shapes_of(Speech(config), x, jnp.ones((1, 1), bool), jnp.zeros((1, 1), jnp.int32))
    return tensors, config, recorded_params(tensors, tables.SPEECH, shapes), c


def lengths_mask(lengths, size):
    return np.arange(size) < np.asarray(lengths)[:, None]


@pytest.mark.golden
def test_teacher_forcing(recording):
    tensors, config, params, _ = recording
    text, codes = tensors["in.x"], tensors["in.y"]
    text_mask = lengths_mask(tensors["in.x_lens"], text.shape[1])
    codes = jnp.asarray(np.where(codes < 0, config.pad_id, codes), jnp.int32)
    read = run(Speech(config), params, text, text_mask, method="read_text")
    valid = tensors["out.pre_nn_valid"].astype(bool)
    assert_close(np.asarray(read)[valid], tensors["mid.pre_nn"][valid])

    prefix = run(Speech(config), params, text, text_mask, method="prefix")
    one = dataclasses.replace(config, num_layers=1)
    first = params | {"ar": jax.tree.map(lambda p: p[:1], params["ar"])}
    layer0 = run(Speech(one), first, prefix, text_mask, codes, method="read_codes")
    x_lens, y_lens = np.asarray(tensors["in.x_lens"]), np.asarray(tensors["in.y_lens"])
    in_text = lengths_mask(1 + x_lens, 1 + text.shape[1])
    real = np.concatenate([in_text, lengths_mask(1 + y_lens, 1 + codes.shape[1])], axis=1)
    assert_close(np.asarray(layer0)[real], tensors["mid.layer0"][real])
    last = run(Speech(config), params, prefix, text_mask, codes, method="read_codes")
    hidden = run(Speech(config), params, last[:, prefix.shape[1] :], method=lambda m, x: m.norm(x))
    valid = tensors["out.logits_valid"].astype(bool)
    assert_close(np.asarray(hidden)[valid], tensors["out.final_hidden"][valid])

    logits = run(Speech(config), params, text, text_mask, codes)
    valid = tensors["out.logits_valid"].astype(bool)
    assert_close(np.asarray(logits)[valid], tensors["out.logits"][valid])
    labels = np.full(logits.shape[:2], config.pad_id)
    for row, length in enumerate(tensors["in.y_lens"]):
        labels[row, :length] = tensors["in.y"][row, :length]
        labels[row, length] = config.eos_id
    picked = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), labels[..., None], axis=-1)[
        ..., 0
    ]
    assert_close(-picked[labels != config.pad_id].sum(), tensors["out.loss_sum"][0])


@pytest.mark.golden
def test_greedy_tokens_of_every_run(recording):
    tensors, config, params, meta = recording
    hidden = tensors["in.hidden"]
    mask = np.ones(hidden.shape[:2], bool)
    read = run(Speech(config), params, hidden, mask, method="read_text")
    assert_close(read, tensors["mid.infer_pre_nn"])
    settings = {name: case for name, case in meta["infer_runs"].items() if not case["prefix_given"]}
    assert settings
    for name, case in settings.items():
        look_back = case["penalty_window_size"]
        cache = init_speech_cache(config, 1, hidden.shape[1] + meta["steps"] + 2)
        cache = run(Speech(config), params, hidden, mask, cache, method="prefill")
        tokens, before, after = [config.sos_id], [], []
        for _ in range(meta["steps"]):
            logits, cache = run(
                Speech(config), params, jnp.array(tokens[-1:]), cache, method="step"
            )
            before.append(logits)
            recent = tokens[-look_back:] if look_back > 0 else []
            recent = jnp.array([[-1] * (meta["steps"] - len(recent)) + recent])
            after.append(penalize(logits, recent, case["penalty"]))
            chosen = int(after[-1][0].argmax())
            if chosen == config.eos_id:
                break
            tokens.append(chosen)
        recorded = tensors[f"out.{name}.logits_before_penalty"]
        assert_close(np.concatenate(before)[: len(recorded)], recorded)
        recorded = tensors[f"out.{name}.logits_after_penalty"]
        assert_close(np.concatenate(after)[: len(recorded)], recorded)
        late = [key for key in tensors if key.startswith(f"out.{name}.logits_after_penalty_step")]
        for key in late:
            assert_close(after[int(key.rsplit("step", 1)[1])], tensors[key])
        np.testing.assert_array_equal(tokens[1:], tensors[f"out.{name}.tokens"])
        assert (chosen == config.eos_id) == bool(tensors[f"out.{name}.ended_by_eos"][0])


def test_steps_equal_teacher_forcing():
    config = vita_tiny().speech
    key = jax.random.key(0)
    text = jax.random.normal(key, (2, 8, config.embed_dim))
    text_mask = jnp.arange(8) < jnp.array([[8], [8]])
    codes = jax.random.randint(key, (2, 12), 0, config.num_codes)
    params = random_params(Speech(config), text, text_mask, codes)
    whole = run(Speech(config), params, text, text_mask, codes)
    cache = run(
        Speech(config), params, text, text_mask, init_speech_cache(config, 2, 24), method="prefill"
    )
    fed = jnp.concatenate([jnp.full((2, 1), config.sos_id), codes], axis=1)
    for i in range(fed.shape[1]):
        logits, cache = run(Speech(config), params, fed[:, i], cache, method="step")
        assert_close(logits, whole[:, i], 1e-5)


def test_padded_text_speaks_the_same():
    config = vita_tiny().speech
    text = jax.random.normal(jax.random.key(0), (1, 8, config.embed_dim))
    params = random_params(
        Speech(config), text, jnp.ones((1, 8), bool), jnp.zeros((1, 1), jnp.int32)
    )

    def logits(text, num_real):
        mask = jnp.arange(text.shape[1])[None] < num_real
        cache = run(
            Speech(config), params, text, mask, init_speech_cache(config, 1, 32), method="prefill"
        )
        out = []
        for code in (config.sos_id, 3, 5):
            y, cache = run(Speech(config), params, jnp.array([code]), cache, method="step")
            out.append(y)
        return jnp.stack(out)

    padded = jnp.concatenate([text, 9 * jnp.ones((1, 8, config.embed_dim))], axis=1)
    assert_close(logits(padded, 8), logits(text, 8), 1e-6)


def test_bfloat16_stays_close():
    config = dataclasses.replace(vita_tiny().speech, dtype="bfloat16")
    text = jax.random.normal(jax.random.key(0), (1, 8, config.embed_dim))
    mask, codes = jnp.ones((1, 8), bool), jnp.arange(6)[None]
    params = random_params(Speech(config), text, mask, codes)
    half = run(Speech(config), params, text, mask, codes)
    full = run(Speech(dataclasses.replace(config, dtype="float32")), params, text, mask, codes)
    assert half.dtype == jnp.float32
    assert_close(half, full, 5e-2)
