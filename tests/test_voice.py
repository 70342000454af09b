"""vita_jax/infer/voice.py: where text is cut, and that every code of every segment is heard."""

import dataclasses

import jax
import numpy as np
import pytest

from vita_jax.config import vita_tiny
from vita_jax.data.tokenizer import load_bundled
from vita_jax.infer import voice as voices
from vita_jax.infer.decode import decode_codes
from vita_jax.infer.sampling import Sampler
from vita_jax.infer.voice import Segmenter, Voice, speakable
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


@pytest.fixture(scope="module")
def model():
    config = vita_tiny()
    params = init_params(config, 0)
    params["codec"] = fold_weight_norm(params["codec"])
    codec = dataclasses.replace(config.codec, weight_norm=False)
    return dataclasses.replace(config, codec=codec), jax.device_put(params)


def test_codes_are_heard_in_full(model, monkeypatch):
    config, params = model
    monkeypatch.setattr(voices, "MAX_CODES", 93)
    heard = []
    decode = voices.Voice._synthesize

    def listen(self, codes):
        heard.append(list(codes))
        return decode(self, codes)

    monkeypatch.setattr(voices.Voice, "_synthesize", listen)
    voice = Voice(
        config, params, load_bundled("vita_tiny"), Sampler(temperature=1.0, top_k=2), seed=0
    )
    voice.say("hello there")
    pieces = []
    while voice.busy:
        pieces.append(voice.advance())
    waveform = np.concatenate(pieces)
    codes = heard[0] + [c for window in heard[1:] for c in window[20:]]
    assert len(codes) == len(waveform) / config.codec.samples_per_token == 93
    assert max(codes) < config.speech.num_codes
    # Far from the seams the windows sound like the whole.
    tokens, length = np.array([codes], np.int32), np.array([len(codes)])
    whole = decode_codes(config, params, tokens, length, np.array(config.codec.global_tokens))[0]
    np.testing.assert_allclose(waveform[: 30 * 600], whole[: 30 * 600], atol=1e-4)


def test_same_seed_same_voice(model, monkeypatch):
    config, params = model
    monkeypatch.setattr(voices, "MAX_CODES", 25)

    def say(seed):
        voice = Voice(
            config, params, load_bundled("vita_tiny"), Sampler(temperature=1.0, top_k=2), seed
        )
        voice.say("one")
        voice.say("two")
        pieces = []
        while voice.busy:
            pieces.append(voice.advance())
        return np.concatenate(pieces)

    np.testing.assert_array_equal(say(3), say(3))
    assert np.abs(say(3) - say(4)).max() > 1e-3
