"""Attention, in one place: over a dense mask, or over packed rows in blocks; by a kernel on a TPU
and, in 16 bits, on a GPU.

Goes in: queries, keys and values dtype[B, T, N, H], and who may see whom. Read next: `layers.py`.
"""

from __future__ import annotations

import functools

import einops
import flax.struct
import jax
import jax.numpy as jnp

from vita_jax.sharding import on_shards

MASKED = -1e30  # finite, so that a row with nothing to see gives numbers and not NaN
LANES = 128  # what sizes are multiples of
BLOCK = 512  # tokens of a row that the TPU's kernel works on at a time


@flax.struct.dataclass
class Segments:
    """A mask whose scores never exist for a whole row: each token sees itself and what came before
    in its own conversation.

    Attributes:
      ids: int32[B, T] 1, 2, ... for the conversations packed in a row, 0 is padding. What comes out
        for padding has no meaning.
      order: int32[B, T] what came before, if not the tokens to the left: those whose number is not
        higher. Tokens of one number see each other both ways. None: the tokens to the left.
    """

    ids: jax.Array
    order: jax.Array | None = None


def attention(q, k, v, mask):
    """Scaled dot-product attention, several query heads to a key head.

    Args:
      q: dtype[B, T, N, H].
      k, v: dtype[B, S, K, H], K divides N.
      mask: bool[B, 1, T, S] True where attention is allowed, Segments (then S = T), or None for
        everywhere.

    Returns:
      dtype[B, T, N, H].
    """
    kernels = {}  # chosen from when the program is lowered, so a TPU that is not there will do
    if isinstance(mask, Segments):
        ids, order, default = mask.ids, mask.order, _in_blocks
        arrays = (q, k, v, ids) if order is None else (q, k, v, ids, order)
        if order is None:
            kernels["tpu"] = splash
        seen = conversation_mask
    else:
        arrays, default, seen = (q, k, v, mask), _dense, lambda mask: mask
    if _fits_cudnn(q, k, mask):
        kernels["cuda"] = lambda q, k, v, *who: cudnn(q, k, v, seen(*who))
    if not kernels:
        return default(*arrays)
    return jax.lax.platform_dependent(*arrays, default=default, **kernels)


def conversation_mask(segment_ids, order=None):
    """bool[B, 1, T, T]: the mask that `Segments` stands for, with nothing to see for padding."""
    order = jnp.arange(segment_ids.shape[1])[None] if order is None else order
    same = (segment_ids[:, :, None] == segment_ids[:, None]) & (segment_ids[:, None] > 0)
    return (same & (order[:, None] <= order[:, :, None]))[:, None]


def probabilities(q, k, mask):
    """How much each query takes of each key, several query heads to a key head: rows sum to 1.

    Args:
      q: dtype[B, T, N, H].
      k: dtype[B, S, K, H], K divides N.
      mask: bool[B, 1, T, S] True where attention is allowed, or None for everywhere.

    Returns:
      float32[B, K, G, T, S].
    """
    b, t, n, h = q.shape
    heads = k.shape[2]
    # Query heads of a key head one below the other: plain batched products, which CPUs are fast at.
    q = einops.rearrange(q, "B T (K G) H -> B K (G T) H", K=heads)
    scores = jnp.einsum("BKRH,BSKH->BKRS", q, k, preferred_element_type=jnp.float32) * h**-0.5
    scores = scores.reshape(b, heads, n // heads, t, -1)
    if mask is not None:
        scores = jnp.where(mask[:, :, None], scores, MASKED)
    return jax.nn.softmax(scores, axis=-1)


def _dense(q, k, v, mask):
    """Attention by XLA: all scores of a layer are in memory at once."""
    b, t = q.shape[:2]
    weights = probabilities(q, k, mask).astype(v.dtype)
    y = jnp.einsum("BKRS,BSKH->BKRH", weights.reshape(b, k.shape[2], -1, k.shape[1]), v)
    return einops.rearrange(y, "B K (G T) H -> B T (K G) H", T=t)


def _in_blocks(q, k, v, segment_ids, order=None):
    """Attention within `Segments` by XLA: at most four blocks of queries one after the other, each
    over the keys up to its end (over all, if an order is given), and computed again in the backward
    pass.
    """
    mask, size = conversation_mask(segment_ids, order), -(-q.shape[1] // (4 * LANES)) * LANES
    block, pieces = jax.checkpoint(_dense), []
    for i in range(0, q.shape[1], size):
        end = i + size if order is None else None
        pieces.append(
            block(q[:, i : i + size], k[:, :end], v[:, :end], mask[:, :, i : i + size, :end])
        )
    return jnp.concatenate(pieces, axis=1)


def _fits_cudnn(q, k, mask) -> bool:
    """Whether there is a GPU whose kernel takes such arrays. One query alone, as when a reply is
    written, is left to XLA: all that counts there is how fast keys and values are read.
    """
    return (
        jax.default_backend() == "gpu"
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 128
        and q.shape[1] > 1
        and (mask is None or q.shape[1] % 2 == k.shape[1] % 2 == 0)
    )


def cudnn(q, k, v, mask):
    """Attention by cuDNN's kernel for NVIDIA's GPUs: scores exist block by block.

    Args:
      q: dtype[B, T, N, H], 16 bits.
      k, v: dtype[B, S, K, H], K divides N.
      mask: bool[B, 1, T, S] or None.

    Returns:
      dtype[B, T, N, H]. Source: arXiv 2205.14135 (flash attention).
    """
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")


def splash(q, k, v, segment_ids, interpret: bool = False):
    """Attention within `Segments` by JAX's "splash" kernel for TPUs: scores exist block by block,
    and blocks that no token may see are left out.

    Args:
      q: dtype[B, T, N, H].
      k, v: dtype[B, T, K, H], K divides N.
      segment_ids: int32[B, T], 0 is padding.
      interpret: runs the kernel step by step on any device, for tests.

    Returns:
      dtype[B, T, N, H]. Source: arXiv 2205.14135 (flash attention).
    """
    b, t, n, h = q.shape
    block = min(BLOCK, t + -t % LANES)
    q = (q * h**-0.5).reshape(b, t, k.shape[2], -1, h)  # the kernel does not scale
    q, k, v, ids = (
        jnp.pad(x, ((0, 0), (0, -t % block)) + ((0, 0),) * (x.ndim - 2))
        for x in (q, k, v, segment_ids)
    )
    heads = ("batch", "seq", "kv_heads", "head_dim")
    axes = (("batch", "seq", "kv_heads", None, "head_dim"), heads, heads, ("batch", "seq"))
    run = functools.partial(_splash_shard, block=block, interpret=interpret)
    y = on_shards(run, axes)(q, k, v, ids)
    return y[:, :t].reshape(b, t, n, h)


def _splash_shard(q, k, v, segment_ids, block, interpret):
    """dtype[B, T, K, G, H] from the arrays of one device, padded to blocks."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes,
        CausalMask,
        MultiHeadMask,
        SegmentIds,
        make_splash_mha,
    )

    b, t, kv_heads, group, h = q.shape
    blocks = "q kv kv_compute q_dkv kv_dkv kv_dkv_compute q_dq kv_dq"
    kernel = make_splash_mha(
        MultiHeadMask([CausalMask((t, t))] * (kv_heads * group)),
        block_sizes=BlockSizes(**{f"block_{name}": block for name in blocks.split()}),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    q, k, v = (x.reshape(b, t, -1, h).swapaxes(1, 2) for x in (q, k, v))
    y = jax.vmap(kernel)(q, k, v, SegmentIds(segment_ids, segment_ids))
    return y.swapaxes(1, 2).reshape(b, t, kv_heads, group, h)
