"""Attention: each path against the dense mask, the TPU's kernel step by step on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vita_jax.models.attention import (
    Segments,
    Slots,
    attention,
    conversation_mask,
    splash,
    splash_slots,
)
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


@pytest.mark.parametrize("length, seen", [(130, 200), (128, 128), (5, 7)])
def test_kernel_over_slots_equals_dense_mask(length, seen):
    q, k, v, _ = draw(num_heads=4, num_kv_heads=2, head_dim=16)
    q, k, v = q[:3, :length], k[:3, :seen], v[:3, :seen]
    start = jnp.array([0, seen - length, (seen - length) // 2])  # nothing was read before, to all
    who = np.arange(seen) <= (start[:, None] + np.arange(length))[:, :, None]
    expected = attention(q, k, v, jnp.asarray(who)[:, None])
    slots = jax.jit(lambda *arrays: attention(*arrays, Slots(start, (length, seen))))(q, k, v)
    np.testing.assert_allclose(slots, expected, atol=2e-6)
    kernel = jax.jit(lambda *arrays: splash_slots(*arrays, start, interpret=True))
    np.testing.assert_allclose(kernel(q, k, v), expected, atol=2e-6)
    if seen > length:
        with jax.set_mesh(make_mesh((1, 2, 2))):
            np.testing.assert_allclose(kernel(q, k, v), expected, atol=2e-6)


@pytest.mark.parametrize("length", [1, 127, 128, 300])
def test_prompts_are_lowered_for_a_tpu(length):
    """Its kernel is in the program where there are many queries; there need be no TPU."""
    q, k = jnp.zeros((1, length, 4, 128)), jnp.zeros((1, 400, 2, 128))
    slots = Slots(jnp.array([70]), (length, 400))
    run = jax.jit(lambda q, k: attention(q, k, k, slots))
    text = run.trace(q, k).lower(lowering_platforms=("tpu",)).as_text()
    assert ("tpu_custom_call" in text) == (length >= 128)


CASES = {"dense": conversation_mask, "packed": Segments, "all": lambda ids: None}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length, dtype", [(200, "bfloat16"), (1, "bfloat16"), (200, "float32")])
def test_lowered_for_a_gpu(case, length, dtype, monkeypatch):
    """cuDNN's kernel is in the program where it takes the arrays; there need be no GPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    version = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
    monkeypatch.setattr(version, lambda: 91000)
    ids = jnp.asarray(SEGMENTS[:, :length])
    arrays = [x[:, :length].astype(dtype) for x in draw(4, 2, 16)[:3]]
    run = jax.jit(lambda *arrays: attention(*arrays, CASES[case](ids)))
    text = run.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert ("cudnn$fmha" in text) == (length > 1 and dtype == "bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_gpu_kernel_equals_dense_mask(case):
    arrays, ids = draw(num_heads=4, num_kv_heads=2, head_dim=64), jnp.asarray(SEGMENTS)
    mask = None if case == "all" else conversation_mask(ids)
    in_16_bits = [x.astype(jnp.bfloat16) for x in arrays]
    (_, expected), expected_grads = both(lambda *a: attention(*a, mask), arrays, ids)
    (_, y), grads = both(lambda *a: attention(*a, CASES[case](ids)), in_16_bits, ids)
    np.testing.assert_allclose(y.astype(np.float32), expected, atol=0.03)
    for ours, theirs in zip(grads, expected_grads):
        error = np.abs(ours.astype(np.float32) - theirs).max() / np.abs(theirs).max()
        assert error < 0.03


def test_padding_gives_numbers():
    arrays, ids = draw(num_heads=4, num_kv_heads=2, head_dim=16), jnp.asarray(SEGMENTS)
    assert np.isfinite(splash(*arrays[:3], ids, interpret=True)).all()
    assert np.isfinite(attention(*arrays[:3], Segments(ids))).all()
