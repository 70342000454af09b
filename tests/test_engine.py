"""vita_jax/infer/engine.py: one turn and several, whole and streamed, on one device and more."""

import dataclasses

import jax
import numpy as np
import PIL.Image
import pytest

from vita_jax import sharding
from vita_jax.config import vita_tiny
from vita_jax.data.collate import collate
from vita_jax.data.tokenizer import load_bundled
from vita_jax.infer import voice
from vita_jax.infer.engine import AudioChunk, Done, Engine, TextDelta
from vita_jax.infer.sampling import Sampler
from vita_jax.models.codec import fold_weight_norm
from vita_jax.models.vita import Vita, boxed_shapes, init_params

PICTURE = PIL.Image.fromarray(np.arange(60 * 40 * 3, dtype=np.uint8).reshape(40, 60, 3))
SOUND = (0.1 * np.sin(np.arange(9000) / 7).astype(np.float32), 16000)


def make_engine(mesh=None):
    config = vita_tiny()
    params = init_params(config, 0)
    params["codec"] = fold_weight_norm(params["codec"])
    config = dataclasses.replace(config, codec=dataclasses.replace(config.codec, weight_norm=False))
    if mesh is not None:
        params = jax.device_put(params, sharding.param_shardings(boxed_shapes(config), mesh))
    else:
        params = jax.device_put(params)
    return Engine(config, params, load_bundled("vita_tiny"), mesh)


@pytest.fixture(scope="module")
def engine():
    return make_engine()


@pytest.fixture(autouse=True)
def short_speech(monkeypatch):
    monkeypatch.setattr(voice, "MAX_CODES", 60)


def test_everything_at_once(engine):
    wild = Sampler(temperature=2.0)  # random weights: the likeliest bytes alone need not be words
    events = list(engine.stream("What?", [PICTURE], SOUND, max_new_tokens=30, sampler=wild))
    assert isinstance(events[-1], Done) and sum(isinstance(e, Done) for e in events) == 1
    reply = events[-1].reply
    assert reply.text == "".join(e.text for e in events if isinstance(e, TextDelta))
    chunks = [e for e in events if isinstance(e, AudioChunk)]
    np.testing.assert_array_equal(reply.audio, np.concatenate([c.samples for c in chunks]))
    assert len(reply.audio) and np.abs(reply.audio).max() <= 1
    c = engine.config
    assert reply.seen.num_audio_embeddings == c.audio.num_embeddings(reply.seen.num_audio_frames)
    assert reply.seen.num_tile_embeddings == reply.seen.num_tiles * c.vision.embeddings_per_tile
    assert reply.times_s["first token"] <= reply.times_s["first sound"] <= reply.times_s["done"]


def test_greedy_tokens_are_the_arg_max_of_the_whole_pass(engine):
    example = engine.processor.prompt("Hello", [PICTURE], SOUND)
    tokens = list(engine._tokens(example, 6, Sampler(), 0, lambda name: None))
    batch = collate([example])
    length = len(example.tokens)
    ids = np.zeros((1, batch.tokens.shape[1] + 16), np.int32)
    ids[0, :length] = example.tokens
    ids[0, length : length + len(tokens)] = tokens
    positions = np.arange(ids.shape[1], dtype=np.int32)[None]
    batch = batch.replace(
        tokens=ids, positions=positions, segment_ids=np.ones_like(ids), loss_mask=None
    )
    logits = jax.jit(lambda b: Vita(engine.config).apply({"params": engine.params}, b))(batch)
    expected = np.asarray(logits)[0, length - 1 : length - 1 + len(tokens)].argmax(-1)
    np.testing.assert_array_equal(tokens, expected)
    assert len(set(tokens)) > 1


@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 2, 2)])
def test_meshes_say_the_same(engine, shape):
    ask = {"text": "Hello", "images": [PICTURE], "audio": SOUND, "max_new_tokens": 8}
    alone, together = engine.chat(**ask), make_engine(sharding.make_mesh(shape)).chat(**ask)
    assert together.text == alone.text
    np.testing.assert_allclose(together.audio, alone.audio, atol=1e-4)


def count_compilations(action):
    """Programs that XLA compiles while `action` runs."""
    names = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: names.append(name))
    action()
    return sum(name.endswith("backend_compile_duration") for name in names)


def test_another_length_in_the_bucket_compiles_nothing(engine):
    ask = {"images": [PICTURE], "max_new_tokens": 5, "speak": False}
    shorter = (SOUND[0][:8500], 16000)
    drawn = Sampler(0.7, 5, 0.9, 1.1)
    engine.chat("What is it?", audio=SOUND, **ask)
    assert not count_compilations(lambda: engine.chat("What is this here?", audio=shorter, **ask))
    assert not count_compilations(
        lambda: engine.chat("Who?", audio=SOUND, sampler=drawn, seed=3, **ask)
    )
    assert count_compilations(lambda: engine.chat("What? " * 200, **ask))  # the listener does hear


def test_another_segment_in_the_bucket_compiles_nothing(engine):
    def say(text):
        speaker = voice.Voice(
            engine.config, engine.params, engine.tokenizer, voice.SPEECH_SAMPLER, 0
        )
        speaker.say(text)
        while speaker.busy:
            speaker.advance()

    say("one two three")
    assert not count_compilations(lambda: say("four five six!"))
    assert count_compilations(lambda: say("seven " * 30))


def test_history_is_part_of_the_prompt(engine):
    first = engine.chat("My name is Ann.", max_new_tokens=4, speak=False)
    assert first.audio is None
    second = engine.chat("What is my name?", history=[first.turn], max_new_tokens=4, speak=False)
    alone = engine.chat("What is my name?", max_new_tokens=4, speak=False)
    extra = len(engine.tokenizer.encode("My name is Ann.")) + len(
        engine.tokenizer.encode(first.turn.reply)
    )
    assert second.seen.num_text_tokens > alone.seen.num_text_tokens + extra


def test_seed_decides_what_is_drawn(engine):
    ask = {"max_new_tokens": 12, "speak": False, "sampler": Sampler(temperature=1.0)}
    assert engine.chat("Hi", seed=1, **ask).text == engine.chat("Hi", seed=1, **ask).text
    assert engine.chat("Hi", seed=1, **ask).text != engine.chat("Hi", seed=2, **ask).text


def test_repetition_penalty_repeats_less(engine):
    plain = list(
        engine._tokens(engine.processor.prompt("Hello"), 40, Sampler(), 0, lambda name: None)
    )
    fewer = list(
        engine._tokens(
            engine.processor.prompt("Hello"), 40, Sampler(penalty=5.0), 0, lambda name: None
        )
    )
    assert len(set(fewer)) > len(set(plain))


def test_stop_tokens_end_the_reply(engine, monkeypatch):
    example = engine.processor.prompt("Hello")
    tokens = list(engine._tokens(example, 8, Sampler(), 0, lambda name: None))
    stop = next(t for t in tokens[1:] if t != tokens[0])
    monkeypatch.setattr(engine, "_stop_ids", frozenset([stop]))
    assert (
        list(engine._tokens(example, 8, Sampler(), 0, lambda name: None))
        == tokens[: tokens.index(stop)]
    )


def test_state_token_is_told_apart_from_the_text(engine, monkeypatch):
    ids = [engine.tokenizer.state_ids["noise"], *engine.tokenizer.encode("ok.")]
    monkeypatch.setattr(engine, "_tokens", lambda *_: iter(ids))
    reply = engine.chat("Hello", speak=False)
    assert (reply.state, reply.text, reply.turn.reply) == ("noise", "ok.", "☟ok.")


def test_first_segment_is_spoken_before_the_text_ends(engine, monkeypatch):
    ids = engine.tokenizer.encode("Hello there. " + "and so on " * 30)
    monkeypatch.setattr(engine, "_tokens", lambda *_: iter(ids))
    monkeypatch.setattr(voice, "MAX_CODES", 20)
    kinds = [type(event) for event in engine.stream("Hello")]
    assert kinds.index(AudioChunk) < len(kinds) - 1 - kinds[::-1].index(TextDelta)


def test_speaking_needs_a_voice(engine):
    mute = Engine(dataclasses.replace(engine.config, speech=None), engine.params, engine.tokenizer)
    with pytest.raises(ValueError, match="speak=False"):
        mute.chat("Hello")
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        engine.chat("Hello", max_new_tokens=0)
