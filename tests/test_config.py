"""vita_jax/config.py: presets, overrides, JSON and what it refuses."""

import json

import pytest

from vita_jax import config as configs
from vita_jax.config import PRESETS, VitaConfig, from_json, override, to_json, vita_7b, vita_tiny


@pytest.mark.parametrize("preset", PRESETS)
def test_json_round_trip(preset):
    config = PRESETS[preset]()
    assert from_json(VitaConfig, json.loads(json.dumps(to_json(config)))) == config
    assert hash(config) == hash(PRESETS[preset]())


def test_numbers_that_follow():
    c = vita_7b()
    assert c.vision.embeddings_per_tile == 256
    assert c.audio.num_embeddings(352) == 44
    assert c.audio.adapter_frames(400) == 50
    assert c.codec.samples_per_token == 600
    assert c.speech_frames_per_token == 4
    assert (c.speech.bos_id, c.speech.sos_id, c.speech.eos_id, c.speech.pad_id) == (
        1024,
        1025,
        1026,
        1027,
    )
    assert c.audio.encoder_frames(c.audio.max_frames) == c.audio.max_positions
    assert c.audio.encoder_frames(c.audio.max_frames + 1) == c.audio.max_positions + 1


def test_overrides_are_words():
    c = override(
        vita_tiny(), ["llm.num_layers=3", "max_tokens=100", "codec.global_tokens=[1,2,3,4]"]
    )
    assert (c.llm.num_layers, c.max_tokens, c.codec.global_tokens) == (3, 100, (1, 2, 3, 4))


@pytest.mark.parametrize(
    "word, message",
    [
        ("llm.num_layers", "key=value"),
        ("llm.depth=3", "unknown key 'llm.depth'; valid: vocab_size"),
        ("name.first=3", "unknown key"),
        ("llm.num_layers=three", "'llm.num_layers': expected int, got 'three'"),
        ("llm.num_layers=2.5", "expected int"),
        ("llm.qkv_bias=1", "expected bool"),
        ("llm.num_kv_heads=3", "must be a multiple"),
        ("llm.num_states=2", "llm.num_states=2: expected 0 or 3"),
        ("max_tokens=40000", "exceeds llm.max_positions"),
        ("vision.out_dim=32", "must equal"),
        ("vision.tile_px=35", "even number of patches"),
    ],
)
def test_bad_words_are_named(word, message):
    with pytest.raises(ValueError, match=message):
        override(vita_tiny(), [word])


def test_files(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        configs.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: Expecting"):
        configs.load(path)
    tree = to_json(vita_tiny())
    path.write_text(json.dumps(tree | {"colour": 1}))
    with pytest.raises(ValueError, match=r"config\.json: unknown config key 'colour'"):
        configs.load(path)
    del tree["llm"]["vocab_size"]
    path.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"'llm\.vocab_size' is missing"):
        configs.load(path)


def test_dtype_is_that_of_every_part_but_the_codec():
    c = vita_tiny().with_dtype("bfloat16")
    assert {c.vision.dtype, c.audio.dtype, c.llm.dtype, c.speech.dtype} == {"bfloat16"}
    with pytest.raises(ValueError, match="int8"):
        c.with_dtype("int8")
