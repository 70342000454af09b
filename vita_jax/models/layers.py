"""What the transformers share: parameters with named axes, norms, rotary positions, blocks, the KV
cache.

Goes in and comes out: activations dtype[B, T, D]. Norms and softmax work in float32 whatever the
dtype. Read next: `llm.py`.
"""

from __future__ import annotations

import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from vita_jax.models.attention import Slots, attention

ACTIVATIONS = ("batch", "seq", "act_embed")
SCALE = ".scale"  # what the name of an int8 weight's scales ends with


@flax.struct.dataclass
class Drawn(nn.LogicallyPartitioned):
    """A parameter with its axis names and what it is drawn from at the start: N(mean, std^2). Of a
    weight, the first `num_inputs` axes of a layer are summed over when it is used.
    """

    mean: float = flax.struct.field(default=0.0, pytree_node=False)
    std: float = flax.struct.field(default=0.0, pytree_node=False)
    num_inputs: int = flax.struct.field(default=0, pytree_node=False)


def drawn(axes, std: float = 0.0, mean: float = 0.0, num_inputs: int = 0):
    """The initialiser of a parameter that starts as N(mean, std^2)."""

    def init(key, shape):
        value = jnp.full(shape, mean) + (std * jax.random.normal(key, shape) if std else 0)
        return Drawn(value, axes, mean=mean, std=std, num_inputs=num_inputs)

    return init


def gelu(x):
    """GELU by the error function itself, as PyTorch has it: JAX's own takes the complement, which
    costs a CPU more.
    """
    return 0.5 * x * (1 + jax.lax.erf(x * 2**-0.5))


def weight(module: nn.Module, name: str, shape, axes, num_inputs: int = 1) -> jax.Array:
    """A parameter drawn from N(0, 1 / fan_in); the first `num_inputs` axes are summed over when it
    is used. If the collection `lora` has a pair for it, their product is added (`lora.py`).
    """
    std = math.prod(shape[:num_inputs]) ** -0.5
    value = module.param(name, drawn(axes, std, num_inputs=num_inputs), shape)
    if not module.has_variable("lora", name):
        return value
    pair = module.get_variable("lora", name)
    # A batch axis of one: products without any would be kept for the backward pass (`REMAT`).
    a, b = pair["a"][None], pair["b"][None]
    axes = ((a.ndim - 1,), (1,)), ((0,), (0,))
    return value.astype(jnp.float32) + jax.lax.dot_general(a, b, axes, precision="highest")[0]


def product(module: nn.Module, name: str, equation: str, x, kernel, out_dtype=None):
    """`x` times `kernel`, the weight `name` of `module`, by an einsum.

    A weight may be int8, with float32 scales of 1 along its inputs beside it. It is multiplied as
    it is, summed in float32, and what comes out is multiplied by the scale of its channel.

    Args:
      module: whose weight it is.
      name: its name.
      equation: einsum.
      x: dtype[...].
      kernel: what `weight` gave.
      out_dtype: of the result and of the sums; None is that of `x`.
    """
    scale = module.get_variable("params", name + SCALE)
    sums = out_dtype if scale is None else jnp.float32
    y = jnp.einsum(equation, x, kernel.astype(x.dtype), preferred_element_type=sums)
    return y if scale is None else (y * scale).astype(out_dtype or x.dtype)


def bias(
    module: nn.Module, name: str, shape, axes, std: float = 0.0, mean: float = 0.0
) -> jax.Array:
    """A parameter that starts at `mean`, or around it."""
    return module.param(name, drawn(axes, std, mean), shape)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, in float32. Source: arXiv 1910.07467."""

    eps: float

    @nn.compact
    def __call__(self, x):
        scale = bias(self, "scale", (x.shape[-1],), ("act_embed",), mean=1.0)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * scale.astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm over the last axis, in float32."""

    eps: float

    @nn.compact
    def __call__(self, x):
        scale = bias(self, "scale", (x.shape[-1],), ("act_embed",), mean=1.0)
        shift = bias(self, "bias", (x.shape[-1],), ("act_embed",))
        y = x.astype(jnp.float32)
        y = y - y.mean(axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * scale.astype(jnp.float32) + shift.astype(jnp.float32)).astype(x.dtype)


def rotary(x, positions, theta: float):
    """Turns the two halves of each head by its position. Source: arXiv 2104.09864, half-split form.

    Args:
      x: dtype[B, T, N, H].
      positions: int32[B, T].
      theta: longest wavelength over 2 pi.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


@flax.struct.dataclass
class Cache:
    """Keys and values of what came before.

    Attributes:
      k, v: dtype[L, B, S, K, H], or int8.
      length: int32[B] slots in use; the next token of a row is written there.
      scales: of int8 keys and values, float32[L, B, S, K, 1] each; else None.
    """

    k: jax.Array
    v: jax.Array
    length: jax.Array
    scales: tuple[jax.Array, jax.Array] | None = None

    def write(self, layer, k, v) -> Cache:
        """The cache with `k`, `v` dtype[B, T, K, H] in the next T slots of `layer`."""
        rows = jnp.arange(k.shape[0])[:, None]
        slots = self.length[:, None] + jnp.arange(k.shape[1])

        def put(whole, new):
            return whole.at[layer, rows, slots].set(new.astype(whole.dtype))

        if self.scales is None:
            return self.replace(k=put(self.k, k), v=put(self.v, v))
        (k, k_scale), (v, v_scale) = _to_int8(k), _to_int8(v)
        scales = put(self.scales[0], k_scale), put(self.scales[1], v_scale)
        return self.replace(k=put(self.k, k), v=put(self.v, v), scales=scales)

    def read(self, layer, num_seen: int):
        """Keys and values dtype[B, S, K, H] of the first `num_seen` slots of `layer`."""

        def seen(x):
            size = (1, x.shape[1], num_seen, *x.shape[3:])
            return jax.lax.dynamic_slice(x, (layer, 0, 0, 0, 0), size)[0]

        k, v = seen(self.k), seen(self.v)
        if self.scales is None:
            return k, v
        return k * seen(self.scales[0]), v * seen(self.scales[1])

    def causal_mask(self, num_tokens: int, num_seen: int | None = None) -> Slots:
        """The next `num_tokens` tokens see every slot up to their own, of the first `num_seen`
        (None: all).
        """
        return Slots(self.length, (num_tokens, num_seen or self.k.shape[2]))


def _to_int8(x):
    """int8 of dtype[..., H], and the float32[..., 1] they are multiples of."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(x).max(axis=-1, keepdims=True) / 127, jnp.finfo(jnp.float32).tiny)
    return jnp.round(x / scale).astype(jnp.int8), scale


def init_cache(
    num_layers: int, batch_size: int, num_slots: int, config, int8: bool = False
) -> Cache:
    """An empty cache for `num_slots` tokens; `config` has num_kv_heads (or num_heads), head_dim and
    dtype. With `int8`, keys and values are rounded to 8 bits, with a scale for each token and head.
    """
    heads = getattr(config, "num_kv_heads", config.num_heads)

    def empty(size, dtype):
        return nn.with_logical_constraint(
            jnp.zeros((num_layers, batch_size, num_slots, heads, size), dtype),
            ("layers", "batch", "seq", "kv_heads", "head_dim"),
        )

    x = empty(config.head_dim, jnp.int8 if int8 else config.dtype)
    scales = (empty(1, jnp.float32), empty(1, jnp.float32)) if int8 else None
    return Cache(k=x, v=x, length=jnp.zeros(batch_size, jnp.int32), scales=scales)


def stack(block, config, num_layers: int, name: str):
    """`block` repeated: parameters get a leading layer axis, compile time does not grow with depth.
    `config.remat` says what is kept of a layer for the backward pass.

    The result is called as `(x, cache), _ = stacked((x, cache), jnp.arange(num_layers),
    *same_for_all_layers)`; `block.__call__((x, cache), layer, *args)` returns `((x, cache), None)`.
    """
    if config.remat != "none":
        keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        policy = {"full": None, "dots": keep}[config.remat]
        block = nn.remat(block, prevent_cse=False, policy=policy)
    return nn.scan(
        block,
        variable_axes={"params": 0, "lora": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast, nn.broadcast),
        length=num_layers,
        unroll=num_layers if config.remat == "none" else 1,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(config, name=name)


class GatedAttention(nn.Module):
    """Grouped-query attention with rotary positions. Source: Qwen2.5 technical report, section 2;
    LLaMA.

    `config` is an LlmConfig or a SpeechConfig.
    """

    config: object

    @nn.compact
    def __call__(self, x, positions, mask, cache, layer):
        """Attends from `x` to itself, or to all that the cache holds once `x` is written to it.

        Args:
          x: dtype[B, T, D].
          positions: int32[B, T].
          mask: bool[B, 1, T, S], Segments, Slots or None.
          cache: Cache of S slots or more, or None (then S = T).
          layer: int32[] index into the cache.

        Returns:
          dtype[B, T, D] and the cache with the keys and values of `x`.
        """
        c = self.config
        q, keys, values = project(self, x, positions)
        if cache is not None:
            cache = cache.write(layer, keys, values)
            num_seen = mask.size[1] if isinstance(mask, Slots) else mask.shape[-1]
            keys, values = cache.read(layer, num_seen)
        y = attention(q, keys.astype(x.dtype), values.astype(x.dtype), mask)
        shape = (c.num_heads, c.head_dim, c.embed_dim)
        out = weight(self, "out", shape, ("heads", "head_dim", "embed"), num_inputs=2)
        return product(self, "out", "BTNH,NHD->BTD", y, out), cache


def project(module, x, positions):
    """Queries dtype[B, T, N, H], keys and values dtype[B, T, K, H] of dtype[B, T, D] by the weights
    of a `GatedAttention`, `module`; queries and keys turned to their `positions`, int32[B, T].
    """
    c = module.config

    def heads(name, number, axis):
        kernel = weight(
            module, name, (c.embed_dim, number, c.head_dim), ("embed", axis, "head_dim")
        )
        y = product(module, name, "BTD,DNH->BTNH", x, kernel)
        if c.qkv_bias:
            shift = bias(module, name + "_bias", (number, c.head_dim), (axis, "head_dim"))
            y = y + shift.astype(x.dtype)
        return y

    q = rotary(heads("q", c.num_heads, "heads"), positions, c.rope_theta)
    k = rotary(heads("k", c.num_kv_heads, "kv_heads"), positions, c.rope_theta)
    return q, k, heads("v", c.num_kv_heads, "kv_heads")


class GatedMlp(nn.Module):
    """SwiGLU. Source: arXiv 2002.05202."""

    config: object

    @nn.compact
    def __call__(self, x):
        d, f = self.config.embed_dim, self.config.mlp_dim

        def layer(name, x, shape, axes):
            return product(self, name, "BTD,DF->BTF", x, weight(self, name, shape, axes))

        gate = layer("gate", x, (d, f), ("embed", "mlp"))
        up = layer("up", x, (d, f), ("embed", "mlp"))
        return layer("down", nn.silu(gate) * up, (f, d), ("mlp", "embed"))


class GatedBlock(nn.Module):
    """The block of the LLM and of both speech decoders: pre-norm attention and gated MLP."""

    config: object

    @nn.compact
    def __call__(self, carry, layer, positions, mask):
        x, cache = carry
        c = self.config
        y, cache = GatedAttention(c, name="attn")(
            RMSNorm(c.norm_eps, name="attn_norm")(x), positions, mask, cache, layer
        )
        x = x + y
        x = x + GatedMlp(c, name="mlp")(RMSNorm(c.norm_eps, name="mlp_norm")(x))
        return (nn.with_logical_constraint(x, ACTIVATIONS), cache), None
