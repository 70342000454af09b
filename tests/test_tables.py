"""Every table reads both ways, and names what the specification of the release names."""

import dataclasses

import numpy as np
import pytest

from vita_jax import params as trees
from vita_jax import tables
from vita_jax.checkpoint import part_counts
from vita_jax.config import vita_7b, vita_nano, vita_tiny
from vita_jax.models import vita

PARTS = {
    "vision encoder": ("vision/encoder/", tables.below(tables.VISION, "", "vision/")),
    "projector": ("vision/projector/", tables.below(tables.PROJECTOR, "", "vision/")),
    "audio encoder": ("audio/encoder/", tables.below(tables.AUDIO_ENCODER, "", "audio/")),
    "audio adapter": ("audio/adapter/", tables.below(tables.AUDIO_ADAPTER, "", "audio/")),
    "audio prompts": ("audio/prompts", tables.below(tables.AUDIO_PROMPTS, "", "audio/")),
    "llm": ("llm/", tables.below(tables.LLM, "", "llm/")),
    "speech": ("speech/", tables.below(tables.SPEECH, "", "speech/")),
}


@pytest.fixture(scope="module")
def shapes():
    """{config name: {path: shape}}, prompts and all."""
    configs = [vita_7b(), vita_tiny()]
    for i, config in enumerate(configs):
        audio = dataclasses.replace(config.audio, num_prompts=25)
        configs[i] = dataclasses.replace(config, audio=audio)
    return {config.name: trees.flatten(vita.param_shapes(config)) for config in configs}


def slots_of(part, shapes, config):
    if part == "codec":
        rules, prefix = tables.below(tables.codec_rules(config.codec), "", "codec/"), "codec/"
    else:
        prefix, rules = PARTS[part]
    return tables.assign(rules, {p: s for p, s in shapes.items() if p.startswith(prefix)})


@pytest.mark.parametrize("part", [*PARTS, "codec"])
def test_there_and_back(part, shapes):
    slots = slots_of(part, shapes["vita_tiny"], vita_tiny())
    rng = np.random.default_rng(0)
    published = {s.published: rng.standard_normal(s.published_shape) for s in slots}
    assert len(published) == len(slots)
    ours = tables.to_params(published, slots)
    assert {path: value.shape for path, value in ours.items()} == {
        slot.path: shapes["vita_tiny"][slot.path].shape for slot in slots
    }
    back = tables.to_published(ours, slots)
    assert set(back) == set(published)
    for name, value in published.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)
    again = tables.to_params(back, slots)
    for path, value in ours.items():
        np.testing.assert_array_equal(again[path], value, err_msg=path)


def test_rearrangements_put_numbers_where_the_names_say(shapes):
    slots = {s.published: s for s in slots_of("vision encoder", shapes["vita_tiny"], vita_tiny())}
    slot = slots["encoder.layers.1.attn.qkv.weight"]
    three, heads, head_dim = slot.shape[1:]
    weight = np.arange(np.prod(slot.published_shape)).reshape(slot.published_shape)
    row = (2 * heads + 1) * head_dim + 3  # third entry of the second head's values
    assert three == 3 and slot.layer == 1
    np.testing.assert_array_equal(slot.ours(weight)[:, 2, 1, 3], weight[row])

    slots = {s.published: s for s in slots_of("audio encoder", shapes["vita_tiny"], vita_tiny())}
    slot = slots["encoder.enc.0.core.out.0.weight"]
    mel, channels, _ = slot.shape
    weight = np.arange(np.prod(slot.published_shape)).reshape(slot.published_shape)
    np.testing.assert_array_equal(slot.ours(weight)[4, 5], weight[:, 5 * mel + 4])
    assert weight.shape == (channels, channels * mel)


# Names and shapes that the specification lists for the release.
PUBLISHED = {
    "vision encoder": {
        "embeddings.class_embedding": (1, 1, 1024),
        "embeddings.patch_embedding.weight": (1024, 3, 14, 14),
        "embeddings.position_embedding": (1, 1025, 1024),
        "encoder.layers.23.attn.qkv.weight": (3072, 1024),
        "encoder.layers.0.attn.qkv.bias": (3072,),
        "encoder.layers.7.attn.proj.weight": (1024, 1024),
        "encoder.layers.7.mlp.fc1.weight": (4096, 1024),
        "encoder.layers.7.mlp.fc2.weight": (1024, 4096),
        "encoder.layers.7.norm2.bias": (1024,),
        "encoder.layers.7.ls2": (1024,),
    },
    "projector": {"0.weight": (3584, 4096), "2.weight": (3584, 3584), "2.bias": (3584,)},
    "audio encoder": {
        "encoder.global_cmvn.istd": (80,),
        "encoder.enc.0.core.conv.0.weight": (1024, 1, 3, 3),
        "encoder.enc.0.core.conv.2.weight": (1024, 1024, 3, 3),
        "encoder.enc.0.core.out.0.weight": (1024, 19456),
        "encoder.enc.1.embed.0.weight": (1024, 1024),
        "encoder.enc.1.embed.1.bias": (1024,),
        "encoder.enc.1.encoders.23.self_attn.linear_pos.weight": (1024, 1024),
        "encoder.enc.1.encoders.0.self_attn.pos_bias_u": (16, 64),
        "encoder.enc.1.encoders.0.self_attn.linear_out.bias": (1024,),
        "encoder.enc.1.encoders.0.feed_forward.w_1.weight": (4096, 1024),
        "encoder.enc.1.after_norm.weight": (1024,),
    },
    "audio adapter": {
        "adpter.conv1d2.weight": (2048, 1024, 5),
        "adpter.bn2.weight": (2048,),
        "adpter.project.weight": (3584, 2048),
    },
    "audio prompts": {"prompt_embeddings.weight": (25, 3584)},
    "llm": {
        "model.embed_tokens.weight": (152064, 3584),
        "model.layers.27.self_attn.q_proj.weight": (3584, 3584),
        "model.layers.0.self_attn.k_proj.weight": (512, 3584),
        "model.layers.0.self_attn.v_proj.bias": (512,),
        "model.layers.0.self_attn.o_proj.weight": (3584, 3584),
        "model.layers.0.mlp.gate_proj.weight": (18944, 3584),
        "model.layers.0.mlp.down_proj.weight": (3584, 18944),
        "model.layers.0.post_attention_layernorm.weight": (3584,),
        "model.norm.weight": (3584,),
        "lm_head.weight": (152064, 3584),
    },
    "speech": {
        "embedding.weight": (1028, 896),
        "layers_pre_nn.1.self_attn.q_proj.weight": (896, 896),
        "layers.3.mlp.up_proj.weight": (4864, 896),
        "norm.weight": (896,),
        "out_fnn.weight": (1028, 896),
        "out_fnn.bias": (1028,),
    },
    "codec": {
        "generator.conv_pre.weight_v": (512, 512, 7),
        "generator.ups.0.weight_v": (512, 256, 16),
        "generator.ups.3.weight_g": (64, 1, 1),
        "generator.resblocks.11.convs2.2.weight_v": (32, 32, 11),
        "generator.conv_post.weight_v": (1, 32, 7),
        "quantizer.quantizer_modules.0.embedding.weight": (1024, 512),
        "quantizer.quantizer_modules_globaltokens.7.embedding.weight": (1024, 16),
        "encoder.ups.0.weight_v": (64, 32, 5),
        "encoder.resblocks.0.convs1.0.weight_v": (64, 64, 11),
        "encoder.normalize.11.weight": (512,),
        "encoder.conv_post.weight": (512, 512, 3),
        "encoder.linear.0.weight": (128, 128),
        "encoder.GlobalTokenEncoder.conv.0.weight": (64, 128, 3),
        "encoder.GlobalTokenEncoder.fn.2.running_var": (128,),
    },
}


@pytest.mark.parametrize("part", PUBLISHED)
def test_published_names_and_shapes(part, shapes):
    slots = slots_of(part, shapes["vita_7b"], vita_7b())
    published = {slot.published: slot.published_shape for slot in slots}
    assert {n: published.get(n) for n in PUBLISHED[part]} == PUBLISHED[part]


def test_every_misfit_is_listed(shapes):
    slots = slots_of("projector", shapes["vita_tiny"], vita_tiny())
    tensors = {s.published: np.zeros(s.published_shape) for s in slots}
    del tensors["0.bias"]
    tensors["2.weight"] = tensors["2.weight"][:-1]
    with pytest.raises(ValueError, match="2 tensors") as error:
        tables.to_params(tensors, slots)
    assert "missing 0.bias [64]" in str(error.value)
    assert "2.weight: expected [64, 64], found [63, 64]" in str(error.value)


def test_a_parameter_without_a_rule_is_an_error(shapes):
    held = {p: s for p, s in shapes["vita_tiny"].items() if p.startswith("vision/projector/")}
    with pytest.raises(KeyError, match="vision/projector/up_bias"):
        tables.assign(tables.below(tables.PROJECTOR, "", "vision/")[:1], held)


def test_parameter_counts_of_the_release():
    assert part_counts(vita_7b()) == {
        "vision encoder": 304_012_288,
        "projector": 27_532_288,
        "audio encoder": 357_950_464,
        "audio adapter": 17_835_520,
        "LLM": 7_615_616_512,
        "main model": 8_322_947_072,
        "speech decoder": 99_569_028,
        "codec decoder": 15_369_857,
        "codec encoder": 47_332_032,
        "codebooks": 655_360,
    }


@pytest.mark.parametrize("preset, low, high", [(vita_nano, 15e6, 21e6), (vita_tiny, 0, 1e6)])
def test_presets_are_as_small_as_they_say(preset, low, high):
    counts = part_counts(preset())
    total = sum(number for name, number in counts.items() if name != "main model")
    assert low < total < high, counts
