"""Losses: pure functions of arrays.

Goes in: hidden states or logits, and targets. Comes out: float32 sums over targets, to be divided
by their number, so that the pieces of a batch add up to the whole.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax


def next_token_targets(tokens, segment_ids, loss_mask):
    """What each position should predict: the next token of its conversation.

    Args:
      tokens: int32[B, T].
      segment_ids: int32[B, T], 0 is padding.
      loss_mask: float32[B, T] 1 where the token is a target.

    Returns:
      int32[B, T] targets and float32[B, T] their weights, 0 where there is no target.
    """
    same = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
    weights = jnp.where(same, loss_mask[:, 1:], 0).astype(jnp.float32)
    end = ((0, 0), (0, 1))
    return jnp.pad(tokens[:, 1:], end), jnp.pad(weights, end)


def next_token_loss(hidden, logits_of, targets, weights, chunk: int):
    """Cross-entropy of the next token; the logits of `chunk` tokens of each row exist at a time.

    Both ways: the backward pass computes them again.

    Args:
      hidden: dtype[B, T, D].
      logits_of: float32[B, t, V] from dtype[B, t, D].
      targets: int32[B, T]; those of weight 0 may be anything.
      weights: float32[B, T].
      chunk: tokens of a row at a time.

    Returns:
      float32[] weighted sum of -log p (nats), and float32[] weight of targets that were the
      likeliest token.
    """
    length = hidden.shape[1]
    chunk = min(chunk, length)

    def pieces(x):
        """[B, T, ...] as [chunks, B, chunk, ...], padded with zeros."""
        x = jnp.pad(x, ((0, 0), (0, -length % chunk)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def add(sums, piece):
        hidden, targets, weights = piece
        logits = logits_of(hidden)
        is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
        # A sum over the vocabulary stays where the vocabulary is sharded; a look-up would not.
        target = jnp.where(is_target, logits, 0).sum(axis=-1)
        nats = jax.nn.logsumexp(logits, axis=-1) - target
        right = jax.lax.stop_gradient(target >= logits.max(axis=-1))
        return (sums[0] + (nats * weights).sum(), sums[1] + (right * weights).sum()), None

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(add, (zero, zero), jax.tree.map(pieces, (hidden, targets, weights)))[0]


def ctc_targets(tokens, positions, segment_ids, num_clips: int, max_labels: int):
    """The units that each clip says: unit 0 is the blank, unit i + 1 is token i.

    Args:
      tokens: int32[B, T] what the clips of a row say, one after the other.
      positions: int32[B, T] index of each token in its clip.
      segment_ids: int32[B, T] 1, 2, ... for the row's first, second, ... clip, 0 is padding.
      num_clips: U.
      max_labels: S, at least the labels of any clip.

    Returns:
      int32[B * U, S] labels and int32[B * U] how many are real.
    """
    rows = jnp.arange(tokens.shape[0])[:, None]
    clips = jnp.where(segment_ids > 0, segment_ids - 1, num_clips)  # padding falls off the end
    empty = jnp.zeros((tokens.shape[0], num_clips, max_labels), jnp.int32)
    labels = empty.at[rows, clips, positions].set(tokens + 1, mode="drop")
    return labels.reshape(-1, max_labels), (labels > 0).sum(axis=-1).reshape(-1)


def ctc_read(logits, num_frames):
    """The units of the likeliest alignment.

    Args:
      logits: float32[B, T, V].
      num_frames: int32[B] real frames.

    Returns:
      int32[B, T] units without repetitions and blanks, zeros behind them.
    """
    best = logits.argmax(axis=-1)
    before = jnp.pad(best[:, :-1], ((0, 0), (1, 0)))
    real = jnp.arange(best.shape[1]) < num_frames[:, None]
    said = real & (best != before) & (best != 0)
    at = jnp.where(said, jnp.cumsum(said, axis=1) - 1, best.shape[1])
    rows = jnp.arange(best.shape[0])[:, None]
    return jnp.zeros_like(best).at[rows, at].set(best, mode="drop")


def ctc_loss(logits, num_frames, labels, num_labels, blank_id: int = 0):
    """-log p of each label sequence, summed over its alignments (nats).

    Args:
      logits: float32[B, T, V].
      num_frames: int32[B] real frames; at least the labels and one more for each repetition.
      labels: int32[B, S], none of them the blank.
      num_labels: int32[B] real labels.
      blank_id: of the blank.

    Returns:
      float32[B]. Source: Graves et al. 2006, by Optax.
    """
    frames = jnp.arange(logits.shape[1]) >= num_frames[:, None]
    extra = jnp.arange(labels.shape[1]) >= num_labels[:, None]
    paddings = frames.astype(jnp.float32), extra.astype(jnp.float32)
    return optax.ctc_loss(logits, paddings[0], labels, paddings[1], blank_id=blank_id)
