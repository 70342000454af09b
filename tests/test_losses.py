"""vita_jax/losses.py: next tokens in pieces and whole, targets of packed rows, CTC."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vita_jax.losses import (
    ctc_loss,
    ctc_read,
    ctc_targets,
    next_token_loss,
    next_token_targets,
)

B, T, D, V = 3, 13, 8, 50


def arrays():
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((B, T, D)).astype(np.float32)
    head = rng.standard_normal((D, V)).astype(np.float32)
    targets = rng.integers(0, V, (B, T))
    return hidden, head, targets, (rng.random((B, T)) < 0.7).astype(np.float32)


@pytest.mark.parametrize("chunk", [1, 4, 13, 1000])
def test_pieces_add_up_to_the_plain_loss(chunk):
    hidden, head, targets, weights = arrays()

    def plain(hidden, head):
        nats = optax.softmax_cross_entropy_with_integer_labels(hidden @ head, targets)
        return (nats * weights).sum()

    def ours(hidden, head):
        return next_token_loss(hidden, lambda x: x @ head, targets, weights, chunk)[0]

    expected, grads = jax.value_and_grad(plain, (0, 1))(hidden, head)
    found, our_grads = jax.jit(jax.value_and_grad(ours, (0, 1)))(hidden, head)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for a, b in zip(our_grads, grads):
        np.testing.assert_allclose(a, b, atol=1e-5)
    right = next_token_loss(hidden, lambda x: x @ head, targets, weights, chunk)[1]
    assert right == (((hidden @ head).argmax(axis=-1) == targets) * weights).sum()


def test_whole_logits_are_never_in_memory():
    _, head, targets, weights = arrays()
    long, wide = 4096, 2048
    shape = jax.ShapeDtypeStruct((1, long, D), jnp.float32)
    row = jax.ShapeDtypeStruct((1, long), jnp.int32)

    def memory(chunk):
        def loss(hidden, head, targets):
            ones = jnp.ones(targets.shape)
            return next_token_loss(hidden, lambda x: x @ head, targets, ones, chunk)[0]

        wide_head = jax.ShapeDtypeStruct((D, wide), jnp.float32)
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(shape, wide_head, row).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(64) < long * wide * 4 / 8 < memory(long)


def test_targets_stay_in_their_conversation():
    tokens = np.array([[5, 6, 7, 8, 9, 0]])
    segments = np.array([[1, 1, 1, 2, 2, 0]])
    mask = np.array([[0, 0, 1, 1, 1, 1]], np.float32)
    targets, weights = next_token_targets(tokens, segments, mask)
    np.testing.assert_array_equal(
        weights, [[0, 1, 0, 1, 0, 0]]
    )  # 8 starts one, so none predicts it
    np.testing.assert_array_equal(targets[weights > 0], [7, 9])


def ctc_batch(b=4, t=12, v=7, s=4):
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((b, t, v)).astype(np.float32)
    labels = rng.integers(1, v, (b, s))
    return logits, np.array([12, 9, 10, 12]), labels, np.array([4, 2, 3, 1])


def test_ctc_sums_over_all_alignments():
    logits, labels = np.log(np.array([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.1, 0.6, 0.3]])), [1, 2]
    p = np.exp(logits)
    total = 0
    for path in itertools.product(range(3), repeat=3):
        read = [k for k, _ in itertools.groupby(path) if k]
        total += (read == labels) * np.prod([p[t, k] for t, k in enumerate(path)])
    found = ctc_loss(logits[None], np.array([3]), np.array([labels]), np.array([2]))
    np.testing.assert_allclose(found, [-np.log(total)], rtol=1e-5)


def test_ctc_does_not_see_padding():
    logits, frames, labels, lengths = ctc_batch()
    found = ctc_loss(logits, frames, labels, lengths)
    for i in range(len(logits)):
        alone = ctc_loss(
            logits[i : i + 1, : frames[i]], frames[i : i + 1],
            labels[i : i + 1, : lengths[i]], lengths[i : i + 1],
        )  # fmt: skip
        np.testing.assert_allclose(alone, found[i : i + 1], rtol=1e-5)


def test_ctc_targets_by_clip():
    tokens = np.array([[7, 8, 5, 6, 9, 0], [4, 0, 0, 0, 0, 0]])
    segments = np.array([[1, 1, 2, 2, 2, 0], [1, 0, 0, 0, 0, 0]])
    positions = np.array([[0, 1, 0, 1, 2, 0], [0, 0, 0, 0, 0, 0]])
    labels, lengths = ctc_targets(tokens, positions, segments, 3, 4)
    np.testing.assert_array_equal(lengths, [2, 3, 0, 1, 0, 0])
    np.testing.assert_array_equal(labels[:4], [[8, 9, 0, 0], [6, 7, 10, 0], [0] * 4, [5, 0, 0, 0]])


def test_ctc_read_drops_repetitions_and_blanks():
    best = np.array([[0, 3, 3, 0, 3, 1, 1, 2], [2, 2, 1, 1, 4, 4, 4, 4]])
    units = ctc_read(np.eye(5, dtype=np.float32)[best], np.array([8, 4]))
    np.testing.assert_array_equal(units, [[3, 3, 1, 2, 0, 0, 0, 0], [2, 1, 0, 0, 0, 0, 0, 0]])


@pytest.mark.peer
def test_ctc_equals_torch():
    import torch

    logits, frames, labels, lengths = ctc_batch()
    x = torch.tensor(logits, requires_grad=True)
    peer = torch.nn.CTCLoss(reduction="none")(
        x.log_softmax(-1).transpose(0, 1), torch.tensor(labels), torch.tensor(frames),
        torch.tensor(lengths),
    )  # fmt: skip
    peer.sum().backward()
    np.testing.assert_allclose(ctc_loss(logits, frames, labels, lengths), peer.detach(), rtol=1e-5)
    grad = jax.grad(lambda x: ctc_loss(x, frames, labels, lengths).sum())(logits)
    np.testing.assert_allclose(grad, x.grad, atol=1e-5)


@pytest.mark.peer
def test_next_token_loss_equals_torch():
    import torch

    hidden, head, targets, weights = arrays()
    x = torch.tensor(hidden, requires_grad=True)
    labels = torch.where(torch.tensor(weights) > 0, torch.tensor(targets), -100)
    peer = torch.nn.functional.cross_entropy(
        (x @ torch.tensor(head)).reshape(-1, V), labels.reshape(-1)
    )
    peer.backward()

    def ours(hidden):
        nats, _ = next_token_loss(hidden, lambda x: x @ head, targets, weights, 5)
        return nats / weights.sum()

    loss, grad = jax.value_and_grad(ours)(hidden)
    np.testing.assert_allclose(loss, peer.item(), rtol=1e-5)
    np.testing.assert_allclose(grad, x.grad, atol=1e-5)
