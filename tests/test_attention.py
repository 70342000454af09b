"""Attention: the TPU's kernel, run step by step on the CPU, and blocks, against the dense mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vita_jax.models.attention import Segments, attention, conversation_mask, splash
from vita_jax.sharding import make_mesh

SEGMENTS = np.zeros((4, 200), np.int32)  # not a whole number of the kernel's blocks
for row, ends in enumerate(((70, 130, 190), (200,), (1, 2, 150), ())):  # padding; the last is empty
    for number, (start, end) in enumerate(zip((0, *ends), ends), 1):
        SEGMENTS[row, start:end] = number


def draw(num_heads, num_kv_heads, head_dim):
    """Queries, keys, values, and weights that make a number of the output."""
    heads = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    keys = jax.random.split(jax.random.key(0), 4)
    return [
        jax.random.normal(key, (*SEGMENTS.shape, n, head_dim)) for key, n in zip(keys, heads)
    ]  # fmt: skip


def both(function, arrays, ids):
    """The output of `function` where it has a meaning, and its gradients."""
    *arrays, weights = arrays
    real = (ids > 0)[..., None, None]

    def number(q, k, v):
        y = jnp.where(real, function(q, k, v), 0)
        return (y * weights).sum(), y

    return jax.jit(jax.value_and_grad(number, (0, 1, 2), has_aux=True))(*arrays)


@pytest.mark.parametrize("mesh", [None, (1, 2, 2), (2, 1, 4)], ids=str)
def test_kernel_equals_dense_mask(mesh):
    arrays, ids = draw(num_heads=4, num_kv_heads=2, head_dim=16), jnp.asarray(SEGMENTS)
    mask = conversation_mask(ids)
    (_, expected), expected_grads = both(lambda *a: attention(*a, mask), arrays, ids)
    run = lambda: both(lambda *a: splash(*a, ids, interpret=True), arrays, ids)  # noqa: E731
    if mesh is None:
        (_, y), grads = run()
    else:  # the second shape does not divide the kv heads
        with jax.set_mesh(make_mesh(mesh)):
            (_, y), grads = run()
    np.testing.assert_allclose(y, expected, atol=2e-6)
    for ours, theirs in zip(grads, expected_grads):
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert not np.allclose(expected, attention(*arrays[:3], None) * (ids > 0)[..., None, None])


def test_blocks_equal_dense_mask():
    arrays, ids = draw(num_heads=4, num_kv_heads=2, head_dim=16), jnp.asarray(SEGMENTS)
    mask = conversation_mask(ids)
    (_, expected), expected_grads = both(lambda *a: attention(*a, mask), arrays, ids)
    (_, y), grads = both(lambda *a: attention(*a, Segments(ids)), arrays, ids)
    np.testing.assert_allclose(y, expected, atol=2e-6)
    for ours, theirs in zip(grads, expected_grads):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_padding_gives_numbers():
    arrays, ids = draw(num_heads=4, num_kv_heads=2, head_dim=16), jnp.asarray(SEGMENTS)
    assert np.isfinite(splash(*arrays[:3], ids, interpret=True)).all()
    assert np.isfinite(attention(*arrays[:3], Segments(ids))).all()
