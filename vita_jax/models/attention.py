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


@flax.struct.dataclass
class Slots:
    """A mask over the slots of a cache: each of the next tokens sees every slot up to its own.

    Attributes:
      start: int32[B] slot of the first of these tokens.
      size: (T, S), how many these are, and slots that are looked at.
    """

    start: jax.Array
    size: tuple[int, int] = flax.struct.field(pytree_node=False)


def attention(q, k, v, mask):
    """Scaled dot-product attention, several query heads to a key head.

    Args:
      q: dtype[B, T, N, H].
      k, v: dtype[B, S, K, H], K divides N.
      mask: bool[B, 1, T, S] True where attention is allowed, Segments (then S = T), Slots, or None
        for everywhere.

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
    elif isinstance(mask, Slots):
        seen = functools.partial(slot_mask, size=mask.size)
        arrays, default = (q, k, v, mask.start), lambda *a: _dense(*a[:3], seen(a[3]))
        if q.shape[1] >= LANES:
            kernels["tpu"] = splash_slots
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


def slot_mask(start, size):
    """bool[B, 1, T, S]: the mask that `Slots` stands for."""
    query = start[:, None, None, None] + jnp.arange(size[0])[:, None]
    return jnp.arange(size[1]) <= query


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
    t = q.shape[1]
    q, k, v, ids = (_padded(x, 0, -t % _block(t)) for x in (q, k, v, segment_ids))
    return _splash(q, k, v, ids, ids, _block(t), interpret)[:, :t]


def splash_slots(q, k, v, start, interpret: bool = False):
    """Attention over `Slots` by the same kernel, for reading a prompt.

    The slots are turned round until the new ones are the last: what a query sees of these is then
    known beforehand, and of all others it sees those in use.

    Args:
      q: dtype[B, T, N, H].
      k, v: dtype[B, S, K, H], K divides N.
      start: int32[B] slot of the first query.
      interpret: as in `splash`.

    Returns:
      dtype[B, T, N, H].
    """
    t, s = q.shape[1], k.shape[1]
    behind = -t % _block(t)
    front = -(s + behind) % _block(t)

    def new_last(x):
        return _padded(
            jax.vmap(functools.partial(jnp.roll, axis=0))(x, s - t - start), front, behind
        )

    age = jnp.arange(front + s + behind) - front - (s - t)  # below 0: read before
    in_use = (age >= -start[:, None]).astype(jnp.int32)
    q = _padded(q, 0, behind)
    ids = jnp.ones(q.shape[:2], jnp.int32)
    return _splash(q, new_last(k), new_last(v), ids, in_use, _block(t), interpret)[:, :t]


def _block(t):
    """Tokens that the kernel works on at a time, if there are so many queries."""
    return min(BLOCK, t + -t % LANES)


def _padded(x, front, behind):
    """[B, T, ...] with zeros before and behind its tokens."""
    return jnp.pad(x, ((0, 0), (front, behind)) + ((0, 0),) * (x.ndim - 2))


def _splash(q, k, v, ids, key_ids, block, interpret):
    """dtype[B, T, N, H] from arrays of whole blocks: each query sees the keys of its own id, up to
    its own place counted from the end.
    """
    b, t, n, h = q.shape
    q = (q * h**-0.5).reshape(b, t, k.shape[2], -1, h)  # the kernel does not scale
    heads = ("batch", "seq", "kv_heads", "head_dim")
    rows = ("batch", "seq")
    axes = (("batch", "seq", "kv_heads", None, "head_dim"), heads, heads, rows, rows)
    run = functools.partial(_splash_shard, block=block, interpret=interpret)
    return on_shards(run, axes)(q, k, v, ids, key_ids).reshape(b, t, n, h)


def _splash_shard(q, k, v, ids, key_ids, block, interpret):
    """dtype[B, T, K, G, H] from the arrays of one device, padded to blocks."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes,
        CausalMask,
        MultiHeadMask,
        SegmentIds,
        make_splash_mha,
    )

    b, t, kv_heads, group, h = q.shape
    mask = CausalMask((t, k.shape[1]), offset=k.shape[1] - t)
    blocks = "q kv kv_compute q_dkv kv_dkv kv_dkv_compute q_dq kv_dq"
    kernel = make_splash_mha(
        MultiHeadMask([mask] * (kv_heads * group)),
        block_sizes=BlockSizes(**{f"block_{name}": block for name in blocks.split()}),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    q, k, v = (x.reshape(b, x.shape[1], -1, h).swapaxes(1, 2) for x in (q, k, v))
    y = jax.vmap(kernel)(q, k, v, SegmentIds(ids, key_ids))
    return y.swapaxes(1, 2).reshape(b, t, kv_heads, group, h)
