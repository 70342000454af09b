"""Published folders as the release lays them out, with small random weights, for the tests."""

import json

import ml_dtypes
import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from vita_jax import params as trees
from vita_jax import release, tables
from vita_jax.data.tokenizer import byte_tokenizer
from vita_jax.models import vita

VISION, AUDIO = "model.vision_tower.vision_tower.", "model.audio_encoder."
BF16 = ml_dtypes.bfloat16
INV_FREQ = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}


def slots_of(config, part):
    """The slots of one part: "main", "speech" or "codec", as their files name the tensors."""
    rules = {
        "main": lambda: (
            tables.below(tables.LLM, "", "llm/")
            + tables.below(tables.VISION, VISION, "vision/")
            + tables.below(tables.PROJECTOR, "model.mm_projector.", "vision/")
            + tables.below(tables.AUDIO_ENCODER + tables.AUDIO_ADAPTER, AUDIO, "audio/")
        ),
        "speech": lambda: tables.below(tables.SPEECH, "", "speech/"),
        "codec": lambda: tables.below(tables.codec_rules(config.codec), "", "codec/"),
    }[part]()
    paths = {rule.path for rule in rules}
    shapes = trees.flatten(vita.param_shapes(config))
    return tables.assign(rules, {path: s for path, s in shapes.items() if path in paths})


def draw(slots, seed=0):
    rng = np.random.default_rng(seed)
    return {s.published: rng.standard_normal(s.published_shape, np.float32) for s in slots}


def below(tensors, prefix):
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def write_json(file, values):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values))


def write_yaml(file, values):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(values))


def in_float32(tensors):
    return {name: np.asarray(value, np.float32) for name, value in tensors.items()}


def llm_settings(config, model_type):
    c = config.llm
    return {
        "model_type": model_type, "hidden_act": "silu", "hidden_size": c.embed_dim,
        "num_hidden_layers": c.num_layers, "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads, "intermediate_size": c.mlp_dim,
        "vocab_size": c.vocab_size, "max_position_embeddings": c.max_positions,
        "rms_norm_eps": c.norm_eps, "rope_theta": c.rope_theta, "tie_word_embeddings": False,
        "use_sliding_window": False, "torch_dtype": "float16",
    }  # fmt: skip


def vision_settings(config):
    c = config.vision
    return {
        "model_type": "intern_vit_6b", "hidden_size": c.embed_dim, "image_size": c.tile_px,
        "patch_size": c.patch_px, "num_hidden_layers": c.num_layers, "hidden_act": "gelu",
        "num_attention_heads": c.num_heads, "intermediate_size": c.mlp_dim, "qkv_bias": True,
        "norm_type": "layer_norm", "layer_norm_eps": c.norm_eps, "qk_normalization": False,
    }  # fmt: skip


def vita_settings(config):
    return llm_settings(config, "vita-Qwen2") | {
        "mm_projector_type": "mlp2x_gelu", "mm_vision_tower": "somewhere/InternViT",
        "mm_audio_encoder": "somewhere/audio", "audio_prompt_finetune": False,
        "audio_prompt_num": None, "tokenizer_model_max_length": 6200, "use_s2": False,
        "vision_config": vision_settings(config),
    }  # fmt: skip


def audio_settings(config):
    c, dim = config.audio, config.audio.embed_dim
    return {
        "input_dim": c.num_mel_bins,
        "cmvn_file": "/somewhere/global_cmvn",
        "is_json_cmvn": True,
        "encoder_conf": {
            "overview_conf": {
                "encoder-layer-config": "subsampling-transformer",
                "encoder-input-dim": c.num_mel_bins, "encoder-output-dim": dim,
            },
            "para_conf": {
                "subsampling": {
                    "subsampling-rate": 4, "subsampling-input-dim": c.num_mel_bins,
                    "subsampling-output-dim": dim, "subsampling-dropout-rate": 0.1,
                },
                "transformer": {
                    "transformer-input-dim": dim, "transformer-output-dim": dim,
                    "transformer-attention-dim": dim, "transformer-attention-heads": c.num_heads,
                    "transformer-linear-units": c.mlp_dim, "transformer-num-blocks": c.num_layers,
                    "transformer-dropout-rate": 0.1, "transformer-attention-dropout-rate": 0.0,
                    "transformer-positional-dropout-rate": 0.1, "transformer-input-layer": "linear",
                    "transformer-pos-enc-class": "rel-enc", "transformer-normalize-before": True,
                    "transformer-concat-after": False,
                    "transformer-positionwise-layer-type": "linear",
                    "transformer-positionwise-conv-kernel_size": 1, "transformer-chunk_size": -1,
                    "transformer-left_chunks": -1, "transformer-dynamic-chunks": False,
                },
            },
        },
        "model_conf": {
            "enc_out_dim": dim, "llm_embed_dim": c.out_dim, "kernel_size": c.adapter_kernel,
            "adpter_type": "subsampling", "activation_func": "gelu", "norm": "layer",
            "audio_prompt_finetune": False, "audio_prompt_num": 25, "add_audio_bos_eos": False,
            "task_num": 10, "freeze_encoder": True, "llm_path": "/somewhere/Qwen2",
        },
        "dataset_conf": {
            "resample_conf": {"resample_rate": 16000},
            "fbank_conf": {
                "num_mel_bins": c.num_mel_bins, "frame_shift": 10, "frame_length": 25, "dither": 1.0
            },
        },
    }  # fmt: skip


def speech_settings(config):
    c = config.speech
    return [c.embed_dim, c.num_codes, {
        "transformer_attention_dim": c.embed_dim, "transformer_linear_units": c.mlp_dim,
        "transformer_num_blocks": c.num_layers, "transformer_attention_heads": c.num_heads,
        "transformer_dropout_rate": 0.1, "encoder_output_dim": c.embed_dim,
        "encoder_drop_rate": 0.1, "encoder_criterion": "ce", "encoder_pre_norm_type": "ln",
        "encoder_upsample_rate": 9, "kv_cache_prefix_finetune": 1, "accum_grad": 2,
    }]  # fmt: skip


def codec_settings(config):
    c = config.codec
    return {
        "resblock": "1", "num_gpus": 8, "batch_size": 20, "learning_rate": 2e-4, "adam_b1": 0.5,
        "adam_b2": 0.9, "lr_decay": 0.98, "seed": 1234, "upsample_rates": c.upsample_rates,
        "upsample_kernel_sizes": c.upsample_kernels, "upsample_initial_channel": c.channels,
        "resblock_kernel_sizes": c.resblock_kernels,
        "resblock_dilation_sizes": c.resblock_dilations, "segment_size": 16000, "num_mels": 80,
        "n_fft": 1024, "hop_size": 240, "win_size": 1024,
        "sampling_rate": c.sample_rate_hz, "n_code_groups": 1, "residul_layer": 1,
        "n_codes": c.num_codes, "codebook_loss_lambda": 1.0, "commitment_loss_lambda": 0.25,
        "global_code_num": c.num_global_tokens, "global_feature_conv": [*c.global_conv, 3, 1],
        "global_tokens": c.global_tokens, "fmin": 0, "fmax_for_loss": None, "num_workers": 12,
        "dist_config": {"dist_backend": "nccl"},
    }  # fmt: skip


def cmvn_frames(num_bins=80):
    frames = np.random.default_rng(5).standard_normal((50, num_bins)) * 3 + 16
    frames[:, 3] = 12.0  # without variance
    return frames


def cmvn_stats(frames):
    sums, squares = frames.sum(0).tolist(), (frames**2).sum(0).tolist()
    return {"mean_stat": sums, "var_stat": squares, "frame_num": len(frames)}


def mixed(tensors):
    """Dtypes as a release could mix them, within the layers of one parameter too."""
    out = {}
    for name, value in tensors.items():
        if ".layers.0." in name or name == "lm_head.weight":
            out[name] = value.astype(BF16)
        elif "norm" in name:
            out[name] = value
        else:
            out[name] = value.astype(np.float16)
    return out


def write_shards(folder, tensors, extra=None):
    """Two shards and their index; `extra` goes to the second."""
    names = sorted(tensors)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    shards = {first: {n: tensors[n] for n in names[::2]}}
    shards[second] = {n: tensors[n] for n in names[1::2]} | (extra or {})
    for file, held in shards.items():
        save_file(held, folder / file, {"format": "pt"})
    weight_map = {name: file for file, held in shards.items() for name in held}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def assert_same_bytes(actual: dict, expected: dict):
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (value.dtype, value.shape), name
        assert actual[name].tobytes() == value.tobytes(), name


def write_release(folder, config, tensors):
    """The release's folder without the voice, and so without .pt files."""
    write_json(folder / "config.json", vita_settings(config))
    write_json(folder / "generation_config.json", {"do_sample": True})
    write_shards(folder, tensors, INV_FREQ)
    byte_tokenizer().save(folder)
    write_yaml(folder / "audio" / "train.yaml", audio_settings(config))
    write_json(folder / "audio" / "global_cmvn", cmvn_stats(cmvn_frames()))


def refused(source, words, file):
    """Converting `source` fails with one line that names the file, and writes nothing."""
    before = set(source.parent.iterdir())
    with pytest.raises(ValueError, match=words) as error:
        release.convert(source, source.parent / "new")
    assert "\n" not in str(error.value)
    assert str(source / file) in str(error.value)
    assert set(source.parent.iterdir()) == before
