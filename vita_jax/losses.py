"""Losses: pure functions of arrays.

Goes in: hidden states or logits, and targets. Comes out: float32 sums over targets, to be divided
by their number, so that the pieces of a batch add up to the whole.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from vita_jax.models.attention import MASKED

# Query, noise, text: noise is rare. Source: the release's training code, where the head is off.
STATE_WEIGHTS = (1.0, 5.0, 1.0)
TEMPERATURE = 0.02  # of a match: what cosines are divided by
SAME = 0.999  # cosine of words that are the same
WORD_TEMPERATURE = 0.02  # of the words of a clip: sharp, as there are thousands to be told apart
NO_WORD = 0.35  # the cosine that a word has to be above, else a frame says none


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
    """Cross-entropy of the next token where there is a target; the logits of `chunk` tokens of each
    row exist at a time.

    Targets come first in their rows, and the chunks behind the last of them are passed over: of a
    question with its picture, most tokens are none. The backward pass computes logits again, unless
    a row is one chunk.

    Args:
      hidden: dtype[B, T, D].
      logits_of: float32[B, t, V] from dtype[B, t, D].
      targets: int32[B, T].
      weights: float32[B, T], 0 where there is no target.
      chunk: tokens of a row at a time.

    Returns:
      float32[B, T] -log p (nats) and bool[B, T] whether the target was the likeliest token; 0 and
      False where there is no target.
    """
    length = hidden.shape[1]
    chunk = min(chunk, length)
    order = jnp.argsort(weights == 0, axis=1, stable=True)

    def pieces(x):
        """[B, T, ...] as [chunks, B, chunk, ...], targets first, padded with zeros."""
        x = jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)
        x = jnp.pad(x, ((0, 0), (0, -length % chunk)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    def of_piece(hidden, targets):
        logits = logits_of(hidden)
        is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
        # A sum over the vocabulary stays where the vocabulary is sharded; a look-up would not.
        target = jnp.where(is_target, logits, 0).sum(axis=-1)
        right = jax.lax.stop_gradient(target >= logits.max(axis=-1))
        return jax.nn.logsumexp(logits, axis=-1) - target, right

    def nothing(hidden, targets):
        return jnp.zeros(targets.shape), jnp.zeros(targets.shape, bool)

    def piece(_, piece):
        hidden, targets, wanted = piece
        return None, jax.lax.cond(wanted.any(), of_piece, nothing, hidden, targets)

    if chunk < length:
        piece = jax.checkpoint(piece)
    found = jax.lax.scan(piece, None, tuple(map(pieces, (hidden, targets, weights > 0))))[1]
    back = jnp.argsort(order, axis=1)

    def whole(x):
        x = x.swapaxes(0, 1).reshape(x.shape[1], -1)[:, :length]
        return jnp.where(weights > 0, jnp.take_along_axis(x, back, axis=1), jnp.zeros_like(x))

    nats, right = map(whole, found)
    return nats, right


def match_pairs(pictures, words, real, others):
    """Cross-entropy of the words of each picture among all words, and of the pictures of all words,
    by the cosine of both vectors. Equal words are each other's.

    Args:
      pictures: float32[N, D].
      words: float32[N, D]; what all have in common does not count.
      real: bool[N] False where there is no pair.
      others: float32[C, D] words that are among all words, too, though of no picture here.

    Returns:
      float32[N] mean of both (nats), 0 where there is no pair, and bool[N] whether a picture's own
      words are the nearest.
    """
    number = len(words)
    words = jnp.concatenate([words, others])
    told = jnp.pad(real, (0, len(others)), constant_values=True)
    words -= (words * told[:, None]).sum(axis=0) / jnp.maximum(told.sum(), 1)
    pictures, words = (
        x * jax.lax.rsqrt((x * x).sum(axis=-1, keepdims=True) + 1e-9) for x in (pictures, words)
    )
    own = (words[:number] @ words.T > SAME) | jnp.eye(number, len(words), dtype=bool)
    scores = jnp.where(real[:, None] & told, pictures @ words.T / TEMPERATURE, MASKED)
    ours = jnp.where(own, scores, MASKED)

    def missed(axis):
        return jax.nn.logsumexp(scores, axis=axis) - jax.nn.logsumexp(ours, axis=axis)

    nats = (missed(1) + missed(0)[:number]) / 2
    return jnp.where(real, nats, 0), real & (ours.max(axis=1) == scores.max(axis=1))


def of_conversations(flags, segment_ids):
    """Whether any token of each conversation has its flag set.

    Args:
      flags: bool[B, T].
      segment_ids: int32[B, T] 1, 2, ... for the conversations of a row, 0 is padding.

    Returns:
      bool[B, T]: column i is of conversation i + 1.
    """
    rows = jnp.arange(flags.shape[0])[:, None]
    return jnp.zeros_like(flags).at[rows, segment_ids - 1].max(flags & (segment_ids > 0))


def state_targets(tokens, segment_ids, loss_mask, state_ids):
    """What each reply answers, told by its state token, where its prompt ends.

    Args:
      tokens: int32[B, T].
      segment_ids: int32[B, T], 0 is padding.
      loss_mask: float32[B, T] 1 where the token is a target.
      state_ids: the state tokens of query, noise and text.

    Returns:
      float32[B, T, 3] weight of each class, 0 where no reply starts. Their sum is the number of
      next-token targets: divided by that, `state_loss` is a mean over replies by class weight.
    """
    targets, weights = next_token_targets(tokens, segment_ids, loss_mask)
    starts = weights * (loss_mask == 0)
    classes = starts[..., None] * (targets[..., None] == jnp.array(state_ids))
    classes *= jnp.array(STATE_WEIGHTS)
    return classes * (weights.sum() / jnp.maximum(classes.sum(), 1))


def state_loss(logits, targets):
    """Cross-entropy of what replies answer.

    Args:
      logits: float32[B, T, 3].
      targets: float32[B, T, 3] as `state_targets` gives them, or some rows of those.

    Returns:
      float32[] weighted sum of -log p (nats), float32[] replies whose likeliest class is the right
      one, and float32[] replies.
    """
    nats = -(jax.nn.log_softmax(logits) * targets).sum()
    starts = targets.sum(axis=-1) > 0
    right = starts & (logits.argmax(axis=-1) == targets.argmax(axis=-1))
    return nats, right.sum(dtype=jnp.float32), starts.sum(dtype=jnp.float32)


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


def word_logits(frames, table):
    """CTC logits by cosine: of the blank, which takes what is near no word, and of each token.

    Args:
      frames: dtype[B, T, D].
      table: dtype[V, D], a row for each token.

    Returns:
      float32[B, T, V + 1].
    """
    frames, table = (
        x * jax.lax.rsqrt((x * x).sum(axis=-1, keepdims=True) + 1e-9)
        for x in (frames.astype(jnp.float32), table.astype(jnp.float32))
    )
    blank = ((0, 0), (0, 0), (1, 0))
    return jnp.pad(frames @ table.T, blank, constant_values=NO_WORD) / WORD_TEMPERATURE


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


def edit_distance(found, expected):
    """Fewest units to add, drop or replace, so that one sequence becomes the other.

    Args:
      found: int32[B, T], zeros behind its end.
      expected: int32[B, S], zeros behind its end.

    Returns:
      int32[B]. Source: Levenshtein 1966.
    """
    columns = jnp.arange(expected.shape[1] + 1)
    start = jnp.broadcast_to(columns, (found.shape[0], len(columns)))

    def add(row, unit):
        replaced = row[:, :-1] + (unit[:, None] != expected)
        best = jnp.minimum(row[:, 1:] + 1, replaced)
        best = jnp.concatenate([row[:, :1] + 1, best], axis=1)
        # Adding units of `expected` one after the other: the least of what stands to the left.
        best = jax.lax.cummin(best - columns, axis=1) + columns
        return jnp.where(unit[:, None] > 0, best, row), None

    last, _ = jax.lax.scan(add, start, found.T)
    return jnp.take_along_axis(last, (expected > 0).sum(axis=1, keepdims=True), axis=1)[:, 0]
