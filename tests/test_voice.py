"""vita_jax/infer/voice.py: where text is cut, and that every code of every segment is heard."""

import dataclasses

import jax
import numpy as np
import pytest

from vita_jax.config import vita_tiny
from vita_jax.data.tokenizer import load_bundled
from vita_jax.infer import voice as voices
from vita_jax.infer.decode import decode_codes
from vita_jax.infer.engine import Engine
from vita_jax.infer.voice import Segmenter, speakable
from vita_jax.models.codec import fold_weight_norm
from vita_jax.models.vita import init_params


@pytest.mark.parametrize(
    "text, segments",
    [
        ("It is a cat. It sleeps.", ["It is a cat.", "It sleeps."]),
        ("这是一只猫。它在睡觉。", ["这是一只猫。", "它在睡觉。"]),
        ("Yes, it is.", ["Yes, it is."]),  # "Yes," is shorter than five characters
        ("Pi is 3.14159, I say", ["Pi is 3.14159,", "I say"]),
        ("It costs 1,000 yuan", ["It costs 1,000 yuan"]),
        ("In 1999. Then", ["In 1999.", "Then"]),
        ("...", []),
        ("", []),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 100])
def test_segments_do_not_depend_on_how_text_arrives(text, segments, size):
    segmenter, out = Segmenter(), []
    for i in range(0, len(text), size):
        out += segmenter.push(text[i : i + size])
    assert out + segmenter.flush() == segments


def test_segment_is_given_out_before_the_text_goes_on():
    assert Segmenter().push("It is a cat.") == ["It is a cat."]


def test_state_and_special_tokens_are_not_spoken():
    assert speakable("☞Hello<|im_end|> ") == "Hello"


@pytest.mark.parametrize("push", ["a b c d e f g h i j k l", "一 二三四五六七八九十"])
def test_text_without_punctuation_is_cut_too(push):
    segmenter = Segmenter(max_pushes=4)
    segments = sum([segmenter.push(char) for char in push], []) + segmenter.flush()
    assert len(segments) > 1 and max(map(len, segments)) <= 6
    assert "".join(segments).replace(" ", "") == push.replace(" ", "")


@pytest.fixture(scope="module")
def model():
    config = vita_tiny()
    params = init_params(config, 0)
    params["codec"] = fold_weight_norm(params["codec"])
    codec = dataclasses.replace(config.codec, weight_norm=False)
    return dataclasses.replace(config, codec=codec), jax.device_put(params)


def test_codes_are_heard_in_full(model, monkeypatch):
    """Far from the seams what is streamed sounds like the whole, decoded at once."""
    monkeypatch.setattr(voices, "MAX_CODES", 93)
    config, params = model
    engine = Engine(config, params, load_bundled("vita_tiny"))
    session = engine.session(seed=5, max_new_tokens=1)
    session.push_text("Hi")
    session.end_of_speech()
    session.reply.speaker.segments.append("hello there")
    codes, speaker = [], session.reply.speaker
    push = speaker.push
    monkeypatch.setattr(speaker, "push", lambda new: (codes.extend(new), push(new)))
    while session.reply:
        engine.step()
    waveform = session.events[-1].reply.audio
    codes = [code for code in codes if code >= 0][:93]
    assert len(codes) == 93 and max(codes) < config.speech.num_codes  # no end was drawn
    tokens, length = np.array([codes], np.int32), np.array([len(codes)])
    whole = decode_codes(config, params, tokens, length, voices.voice_of(config)[None])[0]
    np.testing.assert_allclose(waveform[: 10 * 600], whole[: 10 * 600], atol=1e-4)
    middle = slice(30 * 600, 50 * 600)
    np.testing.assert_allclose(waveform[middle], whole[middle], atol=1e-4)


def test_same_seed_same_voice(model):
    config, params = model

    def say(seed, config=config):
        args = config, params, load_bundled("vita_tiny"), ["one", "two three"]
        return np.concatenate(voices.speak(*args, max_codes=25, seed=seed))

    np.testing.assert_array_equal(say(3), say(3))
    assert len(say(3)) != len(say(4)) or np.abs(say(3) - say(4)).max() > 1e-3
    sure = dataclasses.replace(config, speech=dataclasses.replace(config.speech, top_k=1))
    np.testing.assert_array_equal(say(3, sure), say(4, sure))
