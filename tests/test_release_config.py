"""Settings files of published folders: values are read, other options refused by name."""

import dataclasses
import shutil

import numpy as np
import pytest
from published import (
    AUDIO,
    audio_settings,
    codec_settings,
    draw,
    mixed,
    refused,
    slots_of,
    speech_settings,
    vita_settings,
    write_json,
    write_release,
    write_shards,
    write_yaml,
)
from safetensors.numpy import load_file

from vita_jax import checkpoint, release
from vita_jax.config import vita_tiny

TINY = vita_tiny()


@pytest.fixture(scope="module")
def published():
    return mixed(draw(slots_of(TINY, "main")))


@pytest.fixture(scope="module")
def silent(published, tmp_path_factory):
    folder = tmp_path_factory.mktemp("release") / "VITA"
    write_release(folder, TINY, published)
    return folder


@pytest.fixture
def source(silent, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(silent, tmp_path / "VITA")


def test_values_are_read_from_the_files(source, tmp_path):
    main = vita_settings(TINY) | {
        "rms_norm_eps": 1e-5, "rope_theta": 5e5, "max_position_embeddings": 8192,
        "tokenizer_model_max_length": 4600, "vocab_size": 999,
    }  # fmt: skip
    main["vision_config"]["layer_norm_eps"] = 1e-5
    write_json(source / "config.json", main)
    audio = audio_settings(TINY)
    blocks = audio["encoder_conf"]["para_conf"]["transformer"]
    blocks |= {"transformer-chunk_size": 4, "transformer-left_chunks": 16}
    write_yaml(source / "audio" / "train.yaml", audio)
    release.convert(source, tmp_path / "new")
    config, _ = checkpoint.open_folder(tmp_path / "new")
    assert (config.llm.norm_eps, config.llm.rope_theta) == (1e-5, 5e5)
    assert (config.llm.max_positions, config.max_tokens) == (8192, 4600)
    assert config.llm.vocab_size == TINY.llm.vocab_size  # as many as there are rows
    assert config.vision.norm_eps == 1e-5
    assert (config.audio.chunk_size, config.audio.left_chunks) == (4, 16)
    assert config.audio.dither == 0


def test_heads_that_the_shapes_contradict(source, tmp_path):
    audio = audio_settings(TINY)
    audio["encoder_conf"]["para_conf"]["transformer"]["transformer-attention-heads"] = 4
    write_yaml(source / "audio" / "train.yaml", audio)
    with pytest.raises(ValueError, match=r"pos_bias_u: expected shape \[4, 8\], found \[2, 16\]"):
        release.convert(source, tmp_path / "new")


def test_random_chunks_are_not_followed(source, tmp_path):
    audio = audio_settings(TINY)
    blocks = audio["encoder_conf"]["para_conf"]["transformer"]
    blocks["transformer-chunk_size"] = 4
    del blocks["transformer-dynamic-chunks"]  # the release's default is to draw them
    write_yaml(source / "audio" / "train.yaml", audio)
    provenance = release.convert(source, tmp_path / "new")
    assert any("transformer-dynamic-chunks is not followed" in note for note in provenance["notes"])
    assert checkpoint.open_folder(tmp_path / "new")[0].audio.chunk_size == -1


def test_prompt_embeddings(source, published, tmp_path):
    prompted = {"audio_prompt_finetune": True, "audio_prompt_num": 3}
    write_json(source / "config.json", vita_settings(TINY) | prompted)
    with pytest.raises(ValueError, match=r"missing: .*prompt_embeddings.weight \[3, 64\]"):
        release.convert(source, tmp_path / "new")
    prompts = np.random.default_rng(0).standard_normal((3, 64), np.float32)
    write_shards(source, published | {AUDIO + "prompt_embeddings.weight": prompts})
    release.convert(source, tmp_path / "new")
    stored = load_file(tmp_path / "new" / "audio.safetensors")
    np.testing.assert_array_equal(stored["prompts"], prompts)


def test_vision_sizes_from_shapes(source, tmp_path):
    vision = dataclasses.replace(TINY.vision, embed_dim=128, num_heads=2)
    config = dataclasses.replace(TINY, vision=vision)
    write_shards(source, draw(slots_of(config, "main")))
    settings = vita_settings(config)
    del settings["vision_config"]
    write_json(source / "config.json", settings)
    provenance = release.convert(source, tmp_path / "new")
    assert checkpoint.open_folder(tmp_path / "new")[0] == dataclasses.replace(
        config, name="VITA", speech=None, codec=None
    )
    assert any("heads of 64" in note for note in provenance["notes"])


def changed(values, path, value):
    """`values` with the entry at a path of keys replaced, or removed if `value` is `...`."""
    *above, key = path
    node = values
    for name in above:
        node = node[name]
    if value is ...:
        del node[key]
    else:
        node[key] = value
    return values


ENCODER, BLOCKS = ("encoder_conf", "para_conf"), ("encoder_conf", "para_conf", "transformer")


@pytest.mark.parametrize(
    "path, value, words",
    [
        (
            (*BLOCKS, "transformer-pos-enc-class"),
            "abs-enc",
            "train.yaml: encoder_conf.para_conf.transformer.transformer-pos-enc-class=abs-enc is "
            "not supported: expected rel-enc",
        ),
        ((*BLOCKS, "transformer-pos-enc-class"), ..., "abs-enc is not supported: expected rel-enc"),
        ((*BLOCKS, "transformer-normalize-before"), False, "transformer-normalize-before=false"),
        ((*BLOCKS, "transformer-concat-after"), True, "transformer-concat-after=true"),
        ((*BLOCKS, "transformer-input-layer"), "conv2d", "transformer-input-layer=conv2d"),
        ((*BLOCKS, "transformer-positionwise-layer-type"), "conv1d", "layer-type=conv1d"),
        ((*BLOCKS, "transformer-glu"), True, "transformer.transformer-glu=true is not supported"),
        ((*BLOCKS, "transformer-attention-dim"), ..., "transformer_attention_dim is missing"),
        ((*BLOCKS, "transformer-attention-dim"), "32", "expected a positive integer"),
        ((*ENCODER, "subsampling", "subsampling-rate"), 8, "subsampling-rate=8 .*expected 4"),
        (
            ("encoder_conf", "overview_conf", "encoder-layer-config"),
            "subsampling-conformer",
            "encoder_conf.overview_conf.encoder-layer-config=subsampling-conformer",
        ),
        (("model_conf", "adpter_type"), "cnn", "model_conf.adpter_type=cnn .*expected subsampling"),
        (("model_conf", "activation_func"), "relu", "activation_func=relu .*expected gelu"),
        (("model_conf", "norm"), ..., "model_conf.norm .*batch is not supported: expected layer"),
        (("model_conf", "add_audio_bos_eos"), True, "add_audio_bos_eos=true .*expected false"),
        (("model_conf", "llm_embed_dim"), 3584, "llm_embed_dim=3584 .*expected 64"),
        (("model_conf", "gated"), 1, "model_conf.gated=1 is not supported"),
        (("dataset_conf", "fbank_conf", "frame_shift"), 20, "frame_shift=20 .*expected 10"),
        (("dataset_conf", "resample_conf", "resample_rate"), 8000, "resample_rate=8000"),
        (("model_conf",), [1], "model_conf: expected keys with values"),
    ],
)
def test_audio_options_are_refused_by_name(source, path, value, words):
    file = "audio/train.yaml"
    write_yaml(source / file, changed(audio_settings(TINY), path, value))
    refused(source, words, file)


@pytest.mark.parametrize(
    "path, value, words",
    [
        (("tie_word_embeddings",), True, "config.json: tie_word_embeddings=true .*expected false"),
        (("use_sliding_window",), True, "use_sliding_window=true"),
        (("rope_scaling",), {"type": "yarn"}, "rope_scaling=.*yarn.* is not supported"),
        (("hidden_act",), "gelu", "hidden_act=gelu .*expected silu"),
        (("mm_projector_type",), "linear", "mm_projector_type=linear .*expected mlp2x_gelu"),
        (("use_s2",), True, "use_s2=true"),
        (("audio_state_predictor_tuning",), True, "audio_state_predictor_tuning=true"),
        (("hidden_size",), ..., "config.json: hidden_size is missing"),
        (("intermediate_size",), "many", "llm.mlp_dim.*expected int, got 'many'"),
        (("num_key_value_heads",), 3, "llm.num_heads=4 must be a multiple of num_kv_heads=3"),
        (("vision_config", "qk_normalization"), True, "vision_config.qk_normalization=true"),
        (("vision_config", "norm_type"), "rms_norm", "norm_type=rms_norm .*expected layer_norm"),
        (("vision_config", "qkv_bias"), ..., "qkv_bias .*false is not supported: expected true"),
    ],
)
def test_main_options_are_refused_by_name(source, path, value, words):
    write_json(source / "config.json", changed(vita_settings(TINY), path, value))
    refused(source, words, "config.json")


@pytest.mark.parametrize(
    "path, value, words",
    [
        ((2, "encoder_criterion"), "ctc", "model.json: encoder_criterion=ctc .*expected ce"),
        ((2, "encoder_pre_norm_type"), "rms", "encoder_pre_norm_type=rms"),
        ((2, "transformer_attention_dim"), 64, "transformer_attention_dim=64 .*expected 16"),
        ((2, "transformer_gate"), True, "transformer_gate=true is not supported"),
        ((2, "transformer_num_blocks"), ..., "transformer_num_blocks is missing"),
        ((2,), 7, "model.json: expected keys with values"),
    ],
)
def test_speech_options_are_refused_by_name(source, path, value, words):
    file = "vita_tts_ckpt/decoder/model.json"
    write_json(source / file, changed(speech_settings(TINY), path, value))
    refused(source, words, file)


@pytest.mark.parametrize(
    "path, value, words",
    [
        (("resblock",), "2", "model.json: resblock=2 is not supported: expected 1"),
        (("n_code_groups",), 2, "n_code_groups=2"),
        (("residul_layer",), 4, "residul_layer=4"),
        (("global_feature_conv",), [8, 4, 8, 5, 1], "global_feature_conv=.* expected .*3, 1"),
        (("global_tokens",), ..., "model.json: global_tokens is missing"),
        (("global_tokens",), [1, 2], r"global_tokens=\[1, 2\]: expected 4 integers"),
        (("use_snake",), True, "use_snake=true is not supported"),
    ],
)
def test_codec_options_are_refused_by_name(source, path, value, words):
    file = "vita_tts_ckpt/codec/model.json"
    write_json(source / file, changed(codec_settings(TINY), path, value))
    refused(source, words, file)
