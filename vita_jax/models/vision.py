"""Pictures: tiles -> InternViT -> pixel shuffle -> projector -> embeddings for the LLM.

Goes in: normalised pixels float32[N, px, px, 3], one picture tile or video frame each. Comes out:
dtype[N, P, D_llm].
Source: InternViT-300M-448px and the VITA-1.5 release's vision tower. Read next: `vita.py`.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vita_jax.config import VisionConfig
from vita_jax.models.attention import attention
from vita_jax.models.layers import ACTIVATIONS, LayerNorm, bias, gelu, product, stack, weight


class Vision(nn.Module):
    """Tiles to embeddings."""

    config: VisionConfig

    def setup(self):
        self.encoder = InternVit(self.config)
        self.projector = Projector(self.config)

    def __call__(self, pixels):
        """dtype[N, P, D_llm] from float32[N, px, px, 3]."""
        return self.projector(self.reduce(pixels))

    def reduce(self, pixels):
        """dtype[N, P, 4 * D]: patch states of the last block, scaled, four neighbours in one.

        The class token is dropped and there is no final norm, as in the release.
        """
        c = self.config
        h, w = pixels.shape[1] // c.patch_px, pixels.shape[2] // c.patch_px
        patches = self.encoder(pixels)[:, 1:] * c.embeddings_scale
        return pixel_shuffle(patches.reshape(-1, h, w, c.embed_dim)).reshape(
            -1, h * w // 4, 4 * c.embed_dim
        )


class InternVit(nn.Module):
    """Vision transformer with layer scale. Source: InternViT-300M-448px."""

    config: VisionConfig

    def setup(self):
        c = self.config
        self.patch = PatchEmbedding(c)
        self.class_embedding = bias(
            self, "class_embedding", (c.embed_dim,), ("act_embed",), std=0.02
        )
        self.position_embedding = bias(
            self, "position_embedding", (1 + c.grid**2, c.embed_dim), (None, "act_embed"),
            std=0.02,
        )  # fmt: skip
        self.blocks = stack(VisionBlock, c, c.num_layers, "blocks")

    def embed(self, pixels):
        """dtype[N, 1 + h * w, D]: the class token and the patches, with their positions."""
        c = self.config
        x = self.patch(pixels.astype(c.dtype))
        positions = resize_positions(self.position_embedding, x.shape[1:3]).astype(x.dtype)
        x = x.reshape(x.shape[0], -1, c.embed_dim)
        class_token = jnp.broadcast_to(
            self.class_embedding.astype(x.dtype), (x.shape[0], 1, c.embed_dim)
        )
        return jnp.concatenate([class_token, x], axis=1) + positions

    def __call__(self, pixels):
        """dtype[N, 1 + h * w, D] after the last block from float32[N, px, px, 3]."""
        x = self.embed(pixels)
        (x, _), _ = self.blocks((x, None), jnp.arange(self.config.num_layers), None, None)
        return x


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its kernel: pixels to patches dtype[N, h, w, D]."""

    config: VisionConfig

    @nn.compact
    def __call__(self, pixels):
        c, p = self.config, self.config.patch_px
        n, height, width, _ = pixels.shape
        kernel = weight(
            self, "kernel", (p, p, 3, c.embed_dim), (None, None, None, "embed"), num_inputs=3
        )
        shift = bias(self, "bias", (c.embed_dim,), ("act_embed",))
        x = pixels.reshape(n, height // p, p, width // p, p, 3)
        return jnp.einsum("NapbqC,pqCD->NabD", x, kernel.astype(x.dtype)) + shift.astype(x.dtype)


class VisionBlock(nn.Module):
    """Pre-norm attention and MLP (exact GELU), each scaled per channel before it is added."""

    config: VisionConfig

    @nn.compact
    def __call__(self, carry, layer, positions, mask):
        x, _ = carry
        c = self.config

        def scale(name):
            return bias(self, name, (c.embed_dim,), ("act_embed",), mean=1.0).astype(x.dtype)

        x = x + scale("attn_scale") * VisionAttention(c, name="attn")(
            LayerNorm(c.norm_eps, name="attn_norm")(x)
        )
        x = x + scale("mlp_scale") * VisionMlp(c, name="mlp")(
            LayerNorm(c.norm_eps, name="mlp_norm")(x)
        )
        return (nn.with_logical_constraint(x, ACTIVATIONS), None), None


class VisionAttention(nn.Module):
    """Full self-attention with one fused projection."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x):
        d, n, h = self.config.embed_dim, self.config.num_heads, self.config.head_dim
        qkv = weight(self, "qkv", (d, 3, n, h), ("embed", None, "heads", "head_dim"))
        shift = bias(self, "qkv_bias", (3, n, h), (None, "heads", "head_dim"))
        y = product(self, "qkv", "BTD,DcNH->BTcNH", x, qkv) + shift.astype(x.dtype)
        q, k, v = jnp.moveaxis(y, 2, 0)
        out = weight(self, "out", (n, h, d), ("heads", "head_dim", "embed"), num_inputs=2)
        y = product(self, "out", "BTNH,NHD->BTD", attention(q, k, v, None), out)
        return y + bias(self, "out_bias", (d,), ("act_embed",)).astype(x.dtype)


class VisionMlp(nn.Module):
    """Two layers with exact GELU."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        return two_layers(self, x, (c.embed_dim, c.mlp_dim, c.embed_dim))


class Projector(nn.Module):
    """Four neighbouring patches to one embedding of the LLM: two layers with exact GELU."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        return two_layers(self, x, (4 * c.embed_dim, c.out_dim, c.out_dim))


def two_layers(module, x, dims, activation=gelu):
    """`module`'s up and down projections of `dims` (in, hidden, out), with biases, `activation`
    between.
    """

    def layer(name, x, shape, axes, act_axis):
        kernel = weight(module, name, shape, axes)
        shift = bias(module, name + "_bias", shape[1:], (act_axis,))
        return product(module, name, "...D,DF->...F", x, kernel) + shift.astype(x.dtype)

    x = activation(layer("up", x, dims[:2], ("embed", "mlp"), "mlp"))
    return layer("down", x, dims[1:], ("mlp", "embed"), "act_embed")


def pixel_shuffle(x):
    """Each 2x2 neighbourhood as one vector, row by row: dtype[N, h, w, D] -> dtype[N, h/2, w/2, 4 *
    D].
    """
    n, h, w, d = x.shape
    return (
        x.reshape(n, h // 2, 2, w // 2, 2, d)
        .transpose(0, 1, 3, 2, 4, 5)
        .reshape(n, h // 2, w // 2, 4 * d)
    )


def resize_positions(table, size):
    """The position table for a grid of `size` patches, by bicubic interpolation (identity at its
    own size).

    Args:
      table: dtype[1 + g * g, D], the class token first (it is kept).
      size: (rows, columns).

    Returns:
      float32[1 + rows * columns, D]. Source: PyTorch's `interpolate(mode="bicubic",
      align_corners=False)`.
    """
    table = table.astype(jnp.float32)
    grid = int((table.shape[0] - 1) ** 0.5)
    if tuple(size) == (grid, grid):
        return table
    patches = table[1:].reshape(grid, grid, -1)
    rows, columns = _bicubic_matrix(grid, size[0]), _bicubic_matrix(grid, size[1])
    patches = jnp.einsum(
        "ai,bj,ijD->abD", rows, columns, patches, precision=jax.lax.Precision.HIGHEST
    )
    return jnp.concatenate([table[:1], patches.reshape(-1, table.shape[1])])


def _bicubic_matrix(num_in: int, num_out: int) -> np.ndarray:
    """float32[num_out, num_in] weights: cubic kernel with a = -0.75, no antialiasing."""
    a = -0.75
    matrix = np.zeros((num_out, num_in))
    for i in range(num_out):
        centre = (i + 0.5) * num_in / num_out - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            d = abs(centre - tap)
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[i, np.clip(tap, 0, num_in - 1)] += near if d <= 1 else far
    return matrix.astype(np.float32)
