"""Published tensors <-> our parameters: one table of (published name, our path, rearrangement) per
part.

A table reads both ways: `assign` pairs each published name with the place it has in our tree, and
`Slot.ours` and `Slot.theirs` turn one tensor into the other. `release.py` walks whole folders with
them. Source of the names: the VITA-1.5 release (main safetensors, audio `final.pt`, speech decoder,
codec).
"""

from __future__ import annotations

import dataclasses
import math

import einops
import numpy as np

from vita_jax.config import CodecConfig


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of a table.

    Attributes:
      published: published tensor name; `{}` stands for the layer index.
      path: our parameter path; with `{}` in the name, the parameter has a leading layer axis.
      pattern: einops pattern from the published tensor to ours (without the layer axis). Its right
        side has no parentheses, so our shape gives every size.
    """

    published: str
    path: str
    pattern: str


@dataclasses.dataclass(frozen=True)
class Slot:
    """One published tensor and where it goes: all of `path`, or its slice `layer`."""

    published: str
    path: str
    layer: int | None
    pattern: str
    shape: tuple[int, ...]  # of our tensor, without the layer axis

    @property
    def published_shape(self) -> tuple[int, ...]:
        left, right = self.pattern.split("->")
        sizes = dict(zip(right.split(), self.shape)) | {"1": 1}
        groups = left.replace("(", " ( ").replace(")", " ) ").split()
        shape, inside = [], None
        for token in groups:
            if token == "(":
                inside = []
            elif token == ")":
                shape.append(math.prod(inside))
                inside = None
            elif inside is not None:
                inside.append(sizes[token])
            else:
                shape.append(sizes[token])
        return tuple(shape)

    def ours(self, tensor: np.ndarray) -> np.ndarray:
        """The published tensor in our layout."""
        right = self.pattern.split("->")[1].split()
        return einops.rearrange(tensor, self.pattern, **dict(zip(right, self.shape)))

    def theirs(self, tensor: np.ndarray) -> np.ndarray:
        """Our tensor (or its layer slice) in the published layout."""
        left, right = self.pattern.split("->")
        return einops.rearrange(tensor, f"{right} -> {left}")


def assign(rules, shapes: dict) -> list[Slot]:
    """Every published tensor that fills the parameters of `shapes`.

    Args:
      rules: a part's table.
      shapes: {our path: object with .shape}, as `params.flatten(jax.eval_shape(...))` gives.

    Raises:
      KeyError: a rule names a path the model does not have; a parameter that no rule fills.
    """
    slots = []
    for rule in rules:
        shape = tuple(shapes[rule.path].shape)
        if "{}" in rule.published:
            slots += [
                Slot(rule.published.format(i), rule.path, i, rule.pattern, shape[1:])
                for i in range(shape[0])
            ]
        else:
            slots.append(Slot(rule.published, rule.path, None, rule.pattern, shape))
    if unfilled := sorted(set(shapes) - {rule.path for rule in rules}):
        raise KeyError(f"no published tensor for {', '.join(unfilled)}")
    return slots


def to_params(tensors, slots) -> dict:
    """{our path: array} from {published name: array}, all in memory (small models, tests).

    Raises:
      ValueError: tensors that are missing or of another shape, all of them listed.
    """
    check_shapes({name: tensor.shape for name, tensor in tensors.items()}, slots)
    layers: dict = {}
    for slot in slots:
        layers.setdefault(slot.path, []).append(slot.ours(tensors[slot.published]))
        if slot.layer is None:
            (layers[slot.path],) = layers[slot.path]
    return {
        path: np.stack(value) if isinstance(value, list) else value
        for path, value in layers.items()
    }


def to_published(flat: dict, slots) -> dict:
    """{published name: array} from {our path: array}: the inverse of `to_params`."""
    return {
        slot.published: slot.theirs(
            flat[slot.path] if slot.layer is None else flat[slot.path][slot.layer]
        )
        for slot in slots
    }


def check_shapes(shapes: dict, slots) -> None:
    """Raises ValueError listing every tensor of `slots` that `shapes` lacks or holds in another
    shape.
    """
    problems = []
    for slot in slots:
        found = shapes.get(slot.published)
        if found is None:
            problems.append(f"missing {slot.published} {list(slot.published_shape)}")
        elif tuple(found) != slot.published_shape:
            problems.append(
                f"{slot.published}: expected {list(slot.published_shape)}, found {list(found)}"
            )
    if problems:
        raise ValueError(f"{len(problems)} tensors do not fit:\n  " + "\n  ".join(problems))


_ATTENTION_NORMS = (
    Rule("input_layernorm.weight", "attn_norm/scale", "d -> d"),
    Rule("post_attention_layernorm.weight", "mlp_norm/scale", "d -> d"),
)
_GATED_MLP = (
    Rule("mlp.gate_proj.weight", "mlp/gate", "f d -> d f"),
    Rule("mlp.up_proj.weight", "mlp/up", "f d -> d f"),
    Rule("mlp.down_proj.weight", "mlp/down", "d f -> f d"),
)
_GATED_ATTENTION = (
    Rule("self_attn.q_proj.weight", "attn/q", "(n h) d -> d n h"),
    Rule("self_attn.k_proj.weight", "attn/k", "(n h) d -> d n h"),
    Rule("self_attn.v_proj.weight", "attn/v", "(n h) d -> d n h"),
    Rule("self_attn.o_proj.weight", "attn/out", "d (n h) -> n h d"),
)
_QKV_BIAS = (
    Rule("self_attn.q_proj.bias", "attn/q_bias", "(n h) -> n h"),
    Rule("self_attn.k_proj.bias", "attn/k_bias", "(n h) -> n h"),
    Rule("self_attn.v_proj.bias", "attn/v_bias", "(n h) -> n h"),
)


def below(rules, published: str, path: str):
    """`rules` with both names put under a prefix."""
    return tuple(Rule(published + rule.published, path + rule.path, rule.pattern) for rule in rules)


VISION = (
    Rule("embeddings.class_embedding", "encoder/class_embedding", "1 1 d -> d"),
    Rule("embeddings.position_embedding", "encoder/position_embedding", "1 p d -> p d"),
    Rule("embeddings.patch_embedding.weight", "encoder/patch/kernel", "d c h w -> h w c d"),
    Rule("embeddings.patch_embedding.bias", "encoder/patch/bias", "d -> d"),
) + below(
    (
        Rule("attn.qkv.weight", "attn/qkv", "(three n h) d -> d three n h"),
        Rule("attn.qkv.bias", "attn/qkv_bias", "(three n h) -> three n h"),
        Rule("attn.proj.weight", "attn/out", "d (n h) -> n h d"),
        Rule("attn.proj.bias", "attn/out_bias", "d -> d"),
        Rule("mlp.fc1.weight", "mlp/up", "f d -> d f"),
        Rule("mlp.fc1.bias", "mlp/up_bias", "f -> f"),
        Rule("mlp.fc2.weight", "mlp/down", "d f -> f d"),
        Rule("mlp.fc2.bias", "mlp/down_bias", "d -> d"),
        Rule("norm1.weight", "attn_norm/scale", "d -> d"),
        Rule("norm1.bias", "attn_norm/bias", "d -> d"),
        Rule("norm2.weight", "mlp_norm/scale", "d -> d"),
        Rule("norm2.bias", "mlp_norm/bias", "d -> d"),
        Rule("ls1", "attn_scale", "d -> d"),
        Rule("ls2", "mlp_scale", "d -> d"),
    ),
    "encoder.layers.{}.",
    "encoder/blocks/",
)

PROJECTOR = (
    Rule("0.weight", "projector/up", "f d -> d f"),
    Rule("0.bias", "projector/up_bias", "f -> f"),
    Rule("2.weight", "projector/down", "d f -> f d"),
    Rule("2.bias", "projector/down_bias", "d -> d"),
)

AUDIO_ENCODER = (
    Rule("encoder.global_cmvn.mean", "encoder/cmvn/mean", "m -> m"),
    Rule("encoder.global_cmvn.istd", "encoder/cmvn/istd", "m -> m"),
    Rule("encoder.enc.0.core.conv.0.weight", "encoder/subsampling/conv1", "o i h w -> h w i o"),
    Rule("encoder.enc.0.core.conv.0.bias", "encoder/subsampling/conv1_bias", "o -> o"),
    Rule("encoder.enc.0.core.conv.2.weight", "encoder/subsampling/conv2", "o i h w -> h w i o"),
    Rule("encoder.enc.0.core.conv.2.bias", "encoder/subsampling/conv2_bias", "o -> o"),
    Rule("encoder.enc.0.core.out.0.weight", "encoder/subsampling/out", "d (c m) -> m c d"),
    Rule("encoder.enc.0.core.out.0.bias", "encoder/subsampling/out_bias", "d -> d"),
    Rule("encoder.enc.1.embed.0.weight", "encoder/embed/kernel", "o i -> i o"),
    Rule("encoder.enc.1.embed.0.bias", "encoder/embed/bias", "o -> o"),
    Rule("encoder.enc.1.embed.1.weight", "encoder/embed_norm/scale", "d -> d"),
    Rule("encoder.enc.1.embed.1.bias", "encoder/embed_norm/bias", "d -> d"),
    Rule("encoder.enc.1.after_norm.weight", "encoder/norm/scale", "d -> d"),
    Rule("encoder.enc.1.after_norm.bias", "encoder/norm/bias", "d -> d"),
) + below(
    (
        Rule("self_attn.linear_q.weight", "attn/q", "(n h) d -> d n h"),
        Rule("self_attn.linear_q.bias", "attn/q_bias", "(n h) -> n h"),
        Rule("self_attn.linear_k.weight", "attn/k", "(n h) d -> d n h"),
        Rule("self_attn.linear_k.bias", "attn/k_bias", "(n h) -> n h"),
        Rule("self_attn.linear_v.weight", "attn/v", "(n h) d -> d n h"),
        Rule("self_attn.linear_v.bias", "attn/v_bias", "(n h) -> n h"),
        Rule("self_attn.linear_pos.weight", "attn/position", "(n h) d -> d n h"),
        Rule("self_attn.pos_bias_u", "attn/content_bias", "n h -> n h"),
        Rule("self_attn.pos_bias_v", "attn/position_bias", "n h -> n h"),
        Rule("self_attn.linear_out.weight", "attn/out", "d (n h) -> n h d"),
        Rule("self_attn.linear_out.bias", "attn/out_bias", "d -> d"),
        Rule("feed_forward.w_1.weight", "mlp/up", "f d -> d f"),
        Rule("feed_forward.w_1.bias", "mlp/up_bias", "f -> f"),
        Rule("feed_forward.w_2.weight", "mlp/down", "d f -> f d"),
        Rule("feed_forward.w_2.bias", "mlp/down_bias", "d -> d"),
        Rule("norm1.weight", "attn_norm/scale", "d -> d"),
        Rule("norm1.bias", "attn_norm/bias", "d -> d"),
        Rule("norm2.weight", "mlp_norm/scale", "d -> d"),
        Rule("norm2.bias", "mlp_norm/bias", "d -> d"),
    ),
    "encoder.enc.1.encoders.{}.",
    "encoder/blocks/",
)

AUDIO_ADAPTER = (
    Rule("adpter.conv1d2.weight", "adapter/conv", "o i k -> k i o"),
    Rule("adpter.conv1d2.bias", "adapter/conv_bias", "o -> o"),
    Rule("adpter.bn2.weight", "adapter/norm/scale", "o -> o"),
    Rule("adpter.bn2.bias", "adapter/norm/bias", "o -> o"),
    Rule("adpter.project.weight", "adapter/out", "d o -> o d"),
    Rule("adpter.project.bias", "adapter/out_bias", "d -> d"),
)

AUDIO_PROMPTS = (Rule("prompt_embeddings.weight", "prompts", "p d -> p d"),)

LLM = (
    Rule("model.embed_tokens.weight", "embedding", "v d -> v d"),
    Rule("model.norm.weight", "norm/scale", "d -> d"),
    Rule("lm_head.weight", "head", "v d -> d v"),
) + below(
    _ATTENTION_NORMS + _GATED_MLP + _GATED_ATTENTION + _QKV_BIAS, "model.layers.{}.", "blocks/"
)

SPEECH = (
    (
        Rule("embedding.weight", "embedding", "v d -> v d"),
        Rule("norm.weight", "norm/scale", "d -> d"),
        Rule("out_fnn.weight", "head", "v d -> d v"),
        Rule("out_fnn.bias", "head_bias", "v -> v"),
    )
    + below(_ATTENTION_NORMS + _GATED_MLP + _GATED_ATTENTION, "layers_pre_nn.{}.", "nar/")
    + below(_ATTENTION_NORMS + _GATED_MLP + _GATED_ATTENTION, "layers.{}.", "ar/")
)


def codec_rules(config: CodecConfig, parts=("decoder", "encoder")) -> tuple[Rule, ...]:
    """The codec's table: codebooks and `parts`. `num_batches_tracked` has no place in the model."""
    rules = _CODEBOOKS
    if "decoder" in parts:
        rules += _codec_convs(config, config.resblock_dilations, "generator.", "decoder/", "ups")
        rules += below(_WEIGHT_NORM, "generator.conv_post.", "decoder/conv_post/")
    if "encoder" in parts:
        dilations = config.resblock_dilations[::-1]
        rules += _codec_convs(config, dilations, "encoder.", "encoder/", "downs")
        for i in range(len(config.upsample_rates) * len(dilations)):
            rules += below(_SCALE_AND_BIAS, f"encoder.normalize.{i}.", f"encoder/norms_{i}/")
        rules += below(_CODEC_ENCODER, "encoder.", "encoder/")
    return rules


def _codec_convs(config, dilations, published, path, resampling):
    """What codec decoder and encoder share: first, resampling and residual convolutions."""
    rules = below(_WEIGHT_NORM, "conv_pre.", "conv_pre/")
    for stage in range(len(config.upsample_rates)):
        rules += below(_WEIGHT_NORM, f"ups.{stage}.", f"{resampling}_{stage}/")
        for i, block in enumerate(dilations, start=stage * len(dilations)):
            for j in range(len(block)):
                for theirs, ours in (("convs1", "dilated"), ("convs2", "plain")):
                    names = f"resblocks.{i}.{theirs}.{j}.", f"resblocks_{i}/{ours}_{j}/"
                    rules += below(_WEIGHT_NORM, *names)
    return below(rules, published, path)


_CODEBOOKS = (
    Rule("quantizer.quantizer_modules.0.embedding.weight", "codebooks/code", "v d -> v d"),
    Rule(
        "quantizer.quantizer_modules_globaltokens.{}.embedding.weight",
        "codebooks/global",
        "v d -> v d",
    ),
)
_WEIGHT_NORM = (  # of a transposed convolution the published first axis, "o", is its input
    Rule("weight_g", "g", "o 1 1 -> o"),
    Rule("weight_v", "v", "o i k -> k i o"),
    Rule("bias", "bias", "o -> o"),
)
_SCALE_AND_BIAS = (
    Rule("weight", "scale", "c -> c"),
    Rule("bias", "bias", "c -> c"),
)
_CODEC_ENCODER = (
    Rule("conv_post.weight", "conv_post/kernel", "o i k -> k i o"),
    Rule("conv_post.bias", "conv_post/bias", "o -> o"),
    Rule("linear.0.weight", "unused", "o i -> i o"),
    Rule("linear.0.bias", "unused_bias", "o -> o"),
    Rule("GlobalTokenEncoder.conv.0.weight", "timbre/conv_0", "o i k -> k i o"),
    Rule("GlobalTokenEncoder.conv.2.weight", "timbre/conv_1", "o i k -> k i o"),
    Rule("GlobalTokenEncoder.conv.4.weight", "timbre/conv_2", "o i k -> k i o"),
    Rule("GlobalTokenEncoder.fn.0.weight", "timbre/out", "o i -> i o"),
    Rule("GlobalTokenEncoder.fn.0.bias", "timbre/out_bias", "o -> o"),
    Rule("GlobalTokenEncoder.fn.2.weight", "timbre/norm/scale", "c -> c"),
    Rule("GlobalTokenEncoder.fn.2.bias", "timbre/norm/bias", "c -> c"),
    Rule("GlobalTokenEncoder.fn.2.running_mean", "timbre/norm/running_mean", "c -> c"),
    Rule("GlobalTokenEncoder.fn.2.running_var", "timbre/norm/running_var", "c -> c"),
)
