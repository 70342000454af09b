"""vita_jax/models/speech.py against the recorded speech decoder: teacher forcing, steps, greedy
tokens.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import assert_close, packed, random_params, recorded_params, run, shapes_of

from vita_jax import tables
from vita_jax.batch import TEXT_TOKEN
from vita_jax.config import SpeechConfig, vita_tiny
from vita_jax.infer.sampling import MAX_WINDOW, penalize
from vita_jax.losses import next_token_loss, next_token_targets
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
    shapes = shapes_of(Speech(config), *nothing(config), method=touch)
    return tensors, config, recorded_params(tensors, tables.SPEECH, shapes), c


def nothing(config):
    """The smallest arguments."""
    return jnp.zeros((1, 1, config.embed_dim)), *[jnp.ones((1, 1), jnp.int32)] * 4


def touch(model, *args):
    return model.logits(model(*args))


@pytest.mark.golden
def test_teacher_forcing(recording):
    """The recorded training case, its two utterances packed in one row."""
    tensors, config, params, _ = recording
    x_lens, y_lens = (np.asarray(tensors[f"in.{name}_lens"]) for name in "xy")
    args = packed(config, tensors["in.x"], x_lens, tensors["in.y"], y_lens, padded=True)
    read = run(Speech(config), params, *args[:2], method="read_text")
    valid = tensors["out.pre_nn_valid"].astype(bool)
    assert_close(np.asarray(read)[0, : x_lens.sum()], tensors["mid.pre_nn"][valid])

    def of_codes(x):
        """What stands at SOS and codes, of one utterance after the other."""
        segments, is_code = args[4][0], (args[2] != TEXT_TOKEN) & (args[2] != config.bos_id)
        keep = (segments > 0) & is_code[0] & (args[2][0] != config.eos_id)
        return np.asarray(x)[0][np.asarray(keep)]

    one = dataclasses.replace(config, num_layers=1)
    first = params | {"ar": jax.tree.map(lambda p: p[:1], params["ar"])}
    layer0 = run(Speech(one), first, read, *args[2:], method="read_codes")
    recorded, width = tensors["mid.layer0"], 1 + tensors["in.x"].shape[1]
    rows = [np.r_[0 : 1 + n, width : width + 1 + m] for n, m in zip(x_lens, y_lens)]
    recorded = np.concatenate([recorded[i, row] for i, row in enumerate(rows)])
    kept = np.asarray((args[4][0] > 0) & (args[2][0] != config.eos_id))
    assert_close(np.asarray(layer0)[0][kept], recorded)

    last = run(Speech(config), params, *args)
    hidden = run(Speech(config), params, last, method=lambda m, x: m.norm(x))
    logits = run(Speech(config), params, last, method="logits")
    valid = tensors["out.logits_valid"].astype(bool)
    assert_close(of_codes(hidden), tensors["out.final_hidden"][valid])
    assert_close(of_codes(logits), tensors["out.logits"][valid])

    is_target = np.asarray((args[2] >= 0) & (args[2] != config.bos_id) & (args[2] != config.sos_id))
    targets, weights = next_token_targets(args[2], args[4], is_target.astype(np.float32))
    head = functools.partial(run, Speech(config), params, method="logits")
    nats, _ = next_token_loss(last, head, targets, weights, chunk=7)
    assert_close((nats * weights).sum(), tensors["out.loss_sum"][0])
    assert weights.sum() == (1 + y_lens).sum()


@pytest.mark.golden
def test_greedy_tokens_of_every_run(recording):
    tensors, config, params, meta = recording
    hidden = tensors["in.hidden"]
    mask = np.ones(hidden.shape[:2], bool)
    read = run(Speech(config), params, hidden, mask.astype(np.int32), method="read_text")
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
            recent = jnp.array([([-1] * MAX_WINDOW + tokens)[-MAX_WINDOW:]])
            window = jnp.array([max(look_back, 0)])
            after.append(penalize(logits, recent, jnp.array([case["penalty"]]), window))
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
    """Alone with a cache as packed with others in a row."""
    config, key = vita_tiny().speech, jax.random.key(0)
    text = jax.random.normal(key, (2, 8, config.embed_dim))
    codes = jax.random.randint(key, (2, 12), 0, config.num_codes)
    x_lens, y_lens = [8, 5], [12, 9]
    args = packed(config, np.asarray(text), x_lens, np.asarray(codes), y_lens)
    params = random_params(Speech(config), *args, method=touch)
    last = run(Speech(config), params, *args)
    whole = np.asarray(run(Speech(config), params, last, method="logits"))[0]
    text_mask = jnp.arange(8) < jnp.array(x_lens)[:, None]
    cache = run(
        Speech(config), params, text, text_mask, init_speech_cache(config, 2, 24), method="prefill"
    )
    starts = [1 + x_lens[0], 1 + x_lens[0] + 2 + y_lens[0] + 1 + x_lens[1]]
    fed = jnp.concatenate([jnp.full((2, 1), config.sos_id), codes], axis=1)
    for i in range(fed.shape[1]):
        logits, cache = run(Speech(config), params, fed[:, i], cache, method="step")
        for row, start in enumerate(starts):
            if i <= y_lens[row]:
                assert_close(logits[row], whole[start + i], 1e-5)


def test_padded_text_speaks_the_same():
    config = vita_tiny().speech
    text = jax.random.normal(jax.random.key(0), (1, 8, config.embed_dim))
    params = random_params(Speech(config), *nothing(config), method=touch)

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
    text = np.asarray(jax.random.normal(jax.random.key(0), (1, 8, config.embed_dim)))
    args = packed(config, text, [8], np.arange(6)[None], [6])
    params = random_params(Speech(config), *nothing(config), method=touch)
    half, full = (
        run(Speech(c), params, run(Speech(c), params, *args), method="logits")
        for c in (config, dataclasses.replace(config, dtype="float32"))
    )
    real = np.asarray(args[4]) > 0
    assert half.dtype == jnp.float32
    assert_close(np.asarray(half)[real], np.asarray(full)[real], 5e-2)
