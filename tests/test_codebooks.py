"""vita_jax/codebooks.py: codewords that are out of use come back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vita_jax import codebooks, train_state


def test_perplexity():
    counts = np.array([[5, 5, 5, 5], [7, 0, 0, 0], [0, 0, 0, 0], [2, 2, 0, 0]], np.float32)
    np.testing.assert_allclose(codebooks.perplexity(counts), [4, 1, 1, 2], rtol=1e-5)
    report = codebooks.report(counts[[0, 3]].astype(int))
    assert report == pytest.approx({"perplexity": 3, "dead": 0.25})


def test_codewords_in_use_stay():
    codebook, use = jnp.arange(8.0).reshape(4, 2), jnp.ones(4)
    indices, vectors = jnp.array([0, 1, 2, 3]), 100 + jnp.zeros((4, 2))
    same, use, counts = codebooks.reseed(codebook, use, indices, vectors, jax.random.key(0))
    np.testing.assert_array_equal(same, codebook)
    np.testing.assert_allclose(use, 1, rtol=1e-6)
    np.testing.assert_array_equal(counts, 1)


def test_a_dead_codeword_moves_to_a_vector():
    """Never taken, a codeword lives for 59 steps."""
    codebook, use = jnp.arange(8.0).reshape(4, 2), jnp.ones(4)
    indices = jnp.array([0, 1, 2, 2])
    step = jax.jit(codebooks.reseed)
    for i in range(200):
        vectors = 100.0 + i + jnp.arange(8.0).reshape(4, 2) / 10
        new, use, _ = step(codebook, use, indices, vectors, jax.random.key(i))
        if (np.asarray(new) != np.asarray(codebook)).any():
            break
    assert i + 1 == 59
    np.testing.assert_array_equal(new[:3], codebook[:3])
    assert (np.asarray(new[3]) == np.asarray(vectors)).all(axis=1).any() and use[3] == 1


def test_a_drawn_codebook_starts_from_data():
    vectors = jax.random.normal(jax.random.key(1), (50, 3))
    new, use, counts = codebooks.reseed(
        jnp.full((16, 3), 9.0), jnp.zeros(16), jnp.zeros(50, int), vectors, jax.random.key(0)
    )
    # The one that was taken by all is in use.
    np.testing.assert_array_equal(new[0], 9)
    rows = {tuple(row) for row in np.asarray(vectors).tolist()}
    assert all(tuple(row) in rows for row in np.asarray(new[1:]).tolist())
    assert len({tuple(row) for row in np.asarray(new[1:]).tolist()}) > 8
    np.testing.assert_array_equal(use[1:], 1)
    assert counts[0] == 50 and counts[1:].sum() == 0


def test_use_has_the_type_that_a_step_gives_it():
    """A weak type would be another program: the first step would compile twice."""
    params = {"codec": {"codebooks": {"local": jnp.zeros((2, 8, 3))}}}
    begun = train_state.start(params, optax.sgd(1.0)).use["local"]
    _, use, _ = jax.vmap(codebooks.reseed, in_axes=(0, 0, 0, 0, None))(
        params["codec"]["codebooks"]["local"], begun, jnp.zeros((2, 5), int),
        jnp.zeros((2, 5, 3)), jax.random.key(0),
    )  # fmt: skip
    assert jax.typeof(begun) == jax.typeof(use)


def test_a_collapsed_codebook_recovers():
    """Codewords follow their vectors, as a codec's do; most start where no vector comes."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(16, 4)) * 3
    codebook, use = jnp.asarray(rng.normal(size=(16, 4)) * 0.1 + 20), jnp.zeros(16)

    @jax.jit
    def step(codebook, use, vectors, key):
        indices = jnp.argmin(((vectors[:, None] - codebook) ** 2).sum(-1), axis=1)
        near = jnp.zeros_like(codebook).at[indices].add(0.2 * (vectors - codebook[indices]) / 8)
        return *codebooks.reseed(codebook + near, use, indices, vectors, key), indices

    used = []
    for i in range(400):
        vectors = centres[rng.integers(16, size=128)] + 0.1 * rng.normal(size=(128, 4))
        codebook, use, counts, _ = step(codebook, use, jnp.asarray(vectors), jax.random.key(i))
        used.append(float(codebooks.perplexity(counts)))
    assert used[0] < 3 and np.mean(used[-20:]) > 10
