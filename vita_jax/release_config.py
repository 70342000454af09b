"""The settings files of a published folder as a `VitaConfig`.

Goes in: `config.json` (language model), `train.yaml` (audio encoder), `model.json` (speech decoder,
codec) and the shapes of the tensors beside them. Comes out: the config. Nothing is assumed that a
file states, and an option that this model does not have is refused by its name.
Source: the VITA-1.5 release's settings files and the readers of its code. Read next: `release.py`.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import yaml

from vita_jax import config as configs
from vita_jax.config import VitaConfig

VISION = "model.vision_tower.vision_tower."  # what the main weights put before the encoder's names


def read_config(folders: dict[str, Path], found: dict):
    """The config that settings files and shapes describe.

    Args:
      folders: "main", "audio" and, if they are there, "vision", "decoder", "codec".
      found: {published name: object with .shape} of all tensors.

    Returns:
      VitaConfig, and notes on what differs from the release or was taken for granted.

    Raises:
      ValueError: a file that cannot be read, a setting that is missing or not supported.
    """
    file, notes = folders["main"] / "config.json", []
    main = Settings(read_json(file), f"{file}: ")
    llm = _llm(main, found)
    values = {
        "name": folders["main"].resolve().name,
        "vision": _vision(main, folders, found, llm["embed_dim"], notes),
        "audio": _audio(folders["audio"] / "train.yaml", main, llm["embed_dim"], notes),
        "llm": llm,
        "speech": _speech(folders["decoder"]) if "decoder" in folders else None,
        "codec": _codec(folders["codec"], found) if "codec" in folders else None,
        "max_tokens": min(
            main.size("tokenizer_model_max_length", VitaConfig.max_tokens), llm["max_positions"]
        ),
    }
    try:
        return configs.from_json(VitaConfig, values), notes
    except ValueError as error:
        raise ValueError(f"{file} and the settings beside it: {error}") from None


class Settings:
    """A section of a settings file. What nobody asks for can be refused by its name."""

    def __init__(self, values, where: str):
        """`where` goes before a key in errors; null stands for a key that is not there."""
        if not isinstance(values, dict):
            raise ValueError(f"{where.rstrip(':. ')}: expected keys with values, found {values!r}")
        self._where = where
        # The release's own reader takes "-" and "_" for the same.
        self._names = {str(n).replace("-", "_"): n for n, v in values.items() if v is not None}
        self._values = {key: values[name] for key, name in self._names.items()}
        self._asked = set()

    def get(self, key: str, default=...):
        """The value of `key`; without a default it has to be there."""
        self._asked.add(key)
        if key not in self._values and default is ...:
            raise ValueError(f"{self._where}{key} is missing")
        return self._values.get(key, default)

    def size(self, key: str, default=...) -> int:
        """As `get`, for a positive integer."""
        value = self.get(key, default)
        if type(value) is not int or value < 1:
            raise ValueError(f"{self._where}{key}={_shown(value)}: expected a positive integer")
        return value

    def sizes(self, key: str, number: int) -> list[int]:
        """As `get`, for a list of so many integers."""
        value = self.get(key)
        if not isinstance(value, list) or [type(v) for v in value] != [int] * number:
            raise ValueError(f"{self._where}{key}={_shown(value)}: expected {number} integers")
        return value

    def section(self, key: str) -> Settings:
        """The settings below `key`, none if it is not there."""
        return Settings(self.get(key, {}), f"{self._where}{key}.")

    def expect(self, key: str, wanted, default=...) -> None:
        """Refuses any value but `wanted`; `default` is what the release takes if there is none."""
        value = self.get(key, default)
        if value != wanted and str(value).lower() != str(wanted).lower():
            name = self._names.get(key, f"{key} (not stated, so the default)")
            raise ValueError(
                f"{self._where}{name}={_shown(value)} is not supported: expected {_shown(wanted)}"
            )

    def refuse_others(self, harmless: str) -> None:
        """Refuses keys that were not asked for and do not match the pattern `harmless`."""
        for key, value in self._values.items():
            if key not in self._asked and not re.fullmatch(harmless, key, re.IGNORECASE):
                named = f"{self._where}{self._names[key]}={_shown(value)}"
                raise ValueError(f"{named} is not supported: remove the line if it changes nothing")


def read_json(file):
    """The values in a JSON file.

    Raises:
      ValueError: it is not JSON; the file is named.
    """
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}); copy it again") from None


def _shown(value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _side(found, name, axis, default):
    """One side of a stored tensor; `default` if it is missing, which is reported later."""
    shape = found[name].shape if name in found else ()
    return shape[axis] if axis < len(shape) else default


def _llm(main: Settings, found) -> dict:
    main.expect("hidden_act", "silu", "silu")
    main.expect("tie_word_embeddings", False, False)
    main.expect("use_sliding_window", False, False)
    main.expect("rope_scaling", None, None)
    rope = main.section("rope_parameters")  # where later versions of transformers put it
    rope.expect("rope_type", "default", "default")
    embed_dim, num_heads = main.size("hidden_size"), main.size("num_attention_heads")
    return {
        # The release's code cuts the tables to the tokenizer's size, and may have saved them so.
        "vocab_size": _side(found, "model.embed_tokens.weight", 0, main.get("vocab_size")),
        "embed_dim": embed_dim,
        "num_layers": main.get("num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": main.get("num_key_value_heads"),
        "head_dim": main.get("head_dim", embed_dim // num_heads),
        "mlp_dim": main.get("intermediate_size"),
        "max_positions": main.size("max_position_embeddings"),
        "rope_theta": rope.get("rope_theta", None) or main.get("rope_theta"),
        "norm_eps": main.get("rms_norm_eps"),
    }


def _vision(main: Settings, folders, found, out_dim, notes) -> dict:
    """From InternViT's config.json or `vision_config`; from the shapes if there is neither."""
    main.expect("mm_projector_type", "mlp2x_gelu", "mlp2x_gelu")
    main.expect("mm_vision_select_layer", -1, -1)
    main.expect("use_s2", False, False)
    tower = Path(str(main.get("mm_vision_tower", ""))).name
    beside = folders["main"].resolve().parent / tower / "config.json"
    file = folders["vision"] / "config.json" if "vision" in folders else beside
    settings = main.section("vision_config")
    if tower and file.is_file() or "vision" in folders:
        settings = Settings(read_json(file), f"{file}: ")
    elif not main.get("vision_config", None):
        notes.append("no settings of the vision encoder: sizes from its shapes, heads of 64")
        expected = configs.vita_7b().vision
        embed_dim = _side(found, VISION + "embeddings.class_embedding", 2, expected.embed_dim)
        patch_px = _side(found, VISION + "embeddings.patch_embedding.weight", 3, expected.patch_px)
        rows = _side(found, VISION + "embeddings.position_embedding", 1, expected.grid**2 + 1)
        layers = sum(name.startswith(VISION) and name.endswith(".ls1") for name in found)
        mlp_dim = _side(found, VISION + "encoder.layers.0.mlp.fc1.bias", 0, expected.mlp_dim)
        return {
            "tile_px": math.isqrt(rows - 1) * patch_px,
            "patch_px": patch_px,
            "embed_dim": embed_dim,
            "num_layers": layers or expected.num_layers,
            "num_heads": max(1, embed_dim // 64),
            "mlp_dim": mlp_dim,
            "out_dim": out_dim,
        }
    settings.expect("norm_type", "layer_norm", "rms_norm")
    settings.expect("qkv_bias", True, False)
    settings.expect("qk_normalization", False, True)
    settings.expect("hidden_act", "gelu", "gelu")
    settings.expect("num_channels", 3, 3)
    return {
        "tile_px": settings.size("image_size"),
        "patch_px": settings.size("patch_size"),
        "embed_dim": settings.get("hidden_size"),
        "num_layers": settings.get("num_hidden_layers"),
        "num_heads": settings.get("num_attention_heads"),
        "mlp_dim": settings.get("intermediate_size"),
        "out_dim": out_dim,
        "norm_eps": settings.get("layer_norm_eps", 1e-6),
    }


def _audio(file: Path, main: Settings, out_dim, notes) -> dict:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file}: not YAML ({reason}); copy it again") from None
    top = Settings(values, f"{file}: ")
    encoder = top.section("encoder_conf")
    overview = encoder.section("overview_conf")
    overview.expect("encoder_layer_config", "subsampling-transformer", "tdnn-dtc")
    subsampling = encoder.section("para_conf").section("subsampling")
    subsampling.expect("subsampling_rate", 4, 4)
    subsampling.refuse_others("subsampling_(input_dim|output_dim|dropout_rate)")

    blocks = encoder.section("para_conf").section("transformer")
    blocks.expect("transformer_input_layer", "linear", "linear")
    blocks.expect("transformer_pos_enc_class", "rel-enc", "abs-enc")
    blocks.expect("transformer_normalize_before", True, True)
    blocks.expect("transformer_concat_after", False, False)
    blocks.expect("transformer_positionwise_layer_type", "linear", "linear")
    embed_dim = blocks.size("transformer_attention_dim")
    chunks = {
        "chunk_size": blocks.get("transformer_chunk_size", -1),
        "left_chunks": blocks.get("transformer_left_chunks", -1),
    }
    if _shown(blocks.get("transformer_dynamic_chunks", True)).lower() == "true":
        # Random masks while answering would make no reply like the last; the whole clip is seen.
        notes.append(f"{file}: transformer-dynamic-chunks is not followed, each clip is seen whole")
        chunks = {}
    sizes = {
        "num_layers": blocks.get("transformer_num_blocks", 6),
        "num_heads": blocks.get("transformer_attention_heads", 4),
        "mlp_dim": blocks.get("transformer_linear_units", 1024),
    }
    blocks.refuse_others(
        "transformer_(.*dropout_rate|input_dim|output_dim|positionwise_conv_kernel_size)"
    )

    adapter = top.section("model_conf")
    adapter.expect("adpter_type", "subsampling", "cnn")
    adapter.expect("activation_func", "gelu", "relu")
    adapter.expect("norm", "layer", "batch")
    adapter.expect("add_audio_bos_eos", False, False)
    adapter.expect("enc_out_dim", embed_dim)
    adapter.expect("llm_embed_dim", out_dim)
    kernel = adapter.get("kernel_size")
    # config.json was written later and has the last word.
    prompts = adapter if main.get("audio_prompt_finetune", None) is None else main
    num_prompts = prompts.get("audio_prompt_num", 25)
    num_prompts = num_prompts if prompts.get("audio_prompt_finetune", False) else 0
    main.expect("audio_state_predictor_tuning", False, False)
    adapter.refuse_others(
        "freeze_.*|task_.*|.*prompt_.*|.*ctc.*|llm_.*|chat_template|ignore_id|lsm_weight"
    )

    num_mel_bins = top.size("input_dim")
    data = top.section("dataset_conf")
    data.section("resample_conf").expect("resample_rate", 16000, 16000)
    fbank = data.section("fbank_conf")
    fbank.expect("num_mel_bins", num_mel_bins, num_mel_bins)
    fbank.expect("frame_shift", 10, 10)
    fbank.expect("frame_length", 25, 25)
    if dither := fbank.get("dither", 0.0):
        notes.append(f"{file}: dither={dither} is not followed, no noise is added to the samples")
    return {
        "num_mel_bins": num_mel_bins,
        "embed_dim": embed_dim,
        **sizes,
        "adapter_dim": 2 * embed_dim,
        "out_dim": out_dim,
        "num_prompts": num_prompts,
        "adapter_kernel": kernel,
        **chunks,
    }


def _speech(folder: Path) -> dict:
    file = folder / "model.json"
    triple = read_json(file)
    if not isinstance(triple, list) or len(triple) != 3:
        raise ValueError(f"{file}: expected a list [input size, number of codes, settings]")
    embed_dim, num_codes, values = triple
    settings = Settings(values, f"{file}: ")
    settings.expect("transformer_attention_dim", embed_dim)
    settings.expect("encoder_output_dim", embed_dim, embed_dim)
    settings.expect("encoder_criterion", "ce", "ce")
    settings.expect("encoder_pre_norm_type", "ln", "ln")
    sizes = {
        "embed_dim": embed_dim,
        "num_layers": settings.get("transformer_num_blocks"),
        "num_heads": settings.get("transformer_attention_heads"),
        "mlp_dim": settings.get("transformer_linear_units"),
        "num_codes": num_codes,
    }
    # Settings that shape the model begin with one of these words; the others are the trainer's.
    settings.refuse_others("(?!transformer|encoder|decoder).*|.*drop.*|encoder_upsample_rate")
    return sizes


def _codec(folder: Path, found) -> dict:
    file = folder / "model.json"
    settings = Settings(read_json(file), f"{file}: ")
    settings.expect("resblock", "1")
    settings.expect("n_code_groups", 1)
    settings.expect("residul_layer", 1)
    *widths, kernel, stride = settings.sizes("global_feature_conv", 5)
    if (kernel, stride) != (3, 1):
        raise ValueError(
            f"{file}: global_feature_conv={[*widths, kernel, stride]} is not supported: expected "
            f"{[*widths, 3, 1]}"
        )
    num_global = settings.size("global_code_num")
    quantizer = "codec/quantizer.quantizer_modules"
    global_code_dim = _side(found, f"{quantizer}_globaltokens.0.embedding.weight", 1, 16)
    sizes = {
        "upsample_rates": settings.get("upsample_rates"),
        "upsample_kernels": settings.get("upsample_kernel_sizes"),
        "channels": settings.get("upsample_initial_channel"),
        # Three widths are fixed in the release's code; the shapes show them.
        "encoder_channels": _side(found, "codec/encoder.conv_pre.weight_v", 0, 32),
        "code_dim": _side(found, f"{quantizer}.0.embedding.weight", 1, 512),
        "global_dim": num_global * global_code_dim,
        "num_codes": settings.get("n_codes"),
        "num_global_tokens": num_global,
        "global_conv": widths,
        "global_tokens": settings.sizes("global_tokens", num_global),
        "resblock_kernels": settings.get("resblock_kernel_sizes"),
        "resblock_dilations": settings.get("resblock_dilation_sizes"),
        "sample_rate_hz": settings.get("sampling_rate"),
        "codebook_loss_weight": settings.get("codebook_loss_lambda", 1.0),
        "commitment_loss_weight": settings.get("commitment_loss_lambda", 0.25),
    }
    settings.refuse_others(
        "(num|adam|lr|dist)_.*|batch_size|learning_rate|seed|segment_size|n_fft|hop_size|win_size"
        "|fmin|fmax.*"
    )
    return sizes
