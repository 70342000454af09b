"""vita_jax/models/speech.py against the recorded speech decoder: teacher forcing, steps, greedy tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import assert_close, recorded_params, shapes_of

from vita_jax import tables
from vita_jax.config import SpeechConfig, vita_tiny
from vita_jax.infer.sampling import Sampler, penalize
from vita_jax.models.speech import Speech, init_speech_cache


@pytest.fixture
def recording(golden):
    tensors, c = golden("tts_decoder")
    config = SpeechConfig(
        embed_dim=c["dim"], num_layers=c["layers"], num_heads=c["heads"], mlp_dim=c["ff"], num_codes=c["codes"]
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
    read = Speech(config).apply({"params": params}, text, text_mask, method="read_text")
    valid = tensors["out.pre_nn_valid"].astype(bool)
    assert_close(np.asarray(read)[valid], tensors["mid.pre_nn"][valid])

    logits = Speech(config).apply({"params": params}, text, text_mask, codes)
    valid = tensors["out.logits_valid"].astype(bool)
    assert_close(np.asarray(logits)[valid], tensors["out.logits"][valid])
    labels = np.full(logits.shape[:2], config.pad_id)
    for row, length in enumerate(tensors["in.y_lens"]):
        labels[row, :length] = tensors["in.y"][row, :length]
        labels[row, length] = config.eos_id
    picked = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), labels[..., None], axis=-1)[..., 0]
    assert_close(-picked[labels != config.pad_id].sum(), tensors["out.loss_sum"][0])


@pytest.mark.golden
def test_greedy_tokens_of_every_run(recording):
    tensors, config, params, meta = recording
    hidden = tensors["in.hidden"]
    mask = np.ones(hidden.shape[:2], bool)
    read = Speech(config).apply({"params": params}, hidden, mask, method="read_text")
    assert_close(read, tensors["mid.infer_pre_nn"])
    step = jax.jit(lambda codes, cache: Speech(config).apply({"params": params}, codes, cache, method="step"))
    runs = {name: run for name, run in meta["infer_runs"].items() if not run["prefix_given"]}
    assert runs
    for name, run in runs.items():
        sampler = Sampler(top_k=run["top_k"], penalty=run["penalty"], penalty_window=run["penalty_window_size"])
        cache = init_speech_cache(config, 1, hidden.shape[1] + meta["steps"] + 2)
        cache = Speech(config).apply({"params": params}, hidden, mask, cache, method="prefill")
        tokens, before, after = [config.sos_id], [], []
        for _ in range(meta["steps"]):
            logits, cache = step(jnp.array(tokens[-1:]), cache)
            before.append(logits)
            window = jnp.full((1, max(sampler.penalty_window, 1)), -1)
            recent = tokens[-sampler.penalty_window :] if sampler.penalty_window > 0 else []
            if recent:
                window = window.at[0, -len(recent) :].set(jnp.array(recent))
            after.append(penalize(logits, window, sampler.penalty))
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
    params = Speech(config).init(key, text, text_mask, codes)
    whole = Speech(config).apply(params, text, text_mask, codes)
    cache = Speech(config).apply(params, text, text_mask, init_speech_cache(config, 2, 24), method="prefill")
    fed = jnp.concatenate([jnp.full((2, 1), config.sos_id), codes], axis=1)
    for i in range(fed.shape[1]):
        logits, cache = Speech(config).apply(params, fed[:, i], cache, method="step")
        assert_close(logits, whole[:, i], 1e-5)


def test_padded_text_speaks_the_same():
    config = vita_tiny().speech
    text = jax.random.normal(jax.random.key(0), (1, 8, config.embed_dim))
    params = Speech(config).init(jax.random.key(1), text, jnp.ones((1, 8), bool), jnp.zeros((1, 1), jnp.int32))

    def logits(text, num_real):
        mask = jnp.arange(text.shape[1])[None] < num_real
        cache = Speech(config).apply(params, text, mask, init_speech_cache(config, 1, 32), method="prefill")
        out = []
        for code in (config.sos_id, 3, 5):
            y, cache = Speech(config).apply(params, jnp.array([code]), cache, method="step")
            out.append(y)
        return jnp.stack(out)

    padded = jnp.concatenate([text, 9 * jnp.ones((1, 8, config.embed_dim))], axis=1)
    assert_close(logits(padded, 8), logits(text, 8), 1e-6)


def test_bfloat16_stays_close():
    config = dataclasses.replace(vita_tiny().speech, dtype="bfloat16")
    text = jax.random.normal(jax.random.key(0), (1, 8, config.embed_dim))
    mask, codes = jnp.ones((1, 8), bool), jnp.arange(6)[None]
    params = Speech(config).init(jax.random.key(1), text, mask, codes)
    half = Speech(config).apply(params, text, mask, codes)
    full = Speech(dataclasses.replace(config, dtype="float32")).apply(params, text, mask, codes)
    assert half.dtype == jnp.float32
    assert_close(half, full, 5e-2)
