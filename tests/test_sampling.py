"""vita_jax/infer/sampling.py: each setting does what it says, against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vita_jax.infer.sampling import Sampler, penalize, penalize_seen, sample

LOGITS = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))


def draws(number=400, **settings):
    arrays = Sampler(**settings).arrays()
    arrays.pop("penalty")
    keys = jax.random.split(jax.random.key(0), number)
    return np.asarray(jax.jit(jax.vmap(lambda key: sample(key, LOGITS, **arrays)[0]))(keys))


def test_temperature_zero_is_greedy():
    assert set(draws(50)) == {0}


def test_frequencies_follow_the_distribution():
    counts = np.bincount(draws(4000, temperature=1.0), minlength=4) / 4000
    np.testing.assert_allclose(counts, [0.4, 0.3, 0.2, 0.1], atol=0.03)
    hot = np.bincount(draws(4000, temperature=100.0), minlength=4) / 4000
    np.testing.assert_allclose(hot, 0.25, atol=0.03)


def test_top_k_keeps_the_k_likeliest_and_renormalises():
    counts = np.bincount(draws(4000, temperature=1.0, top_k=2), minlength=4) / 4000
    np.testing.assert_allclose(counts, [4 / 7, 3 / 7, 0, 0], atol=0.03)


@pytest.mark.parametrize(
    "top_p, kept", [(0.39, {0}), (0.41, {0, 1}), (0.85, {0, 1, 2}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_least_set_that_reaches_it(top_p, kept):
    assert set(draws(1000, temperature=1.0, top_p=top_p)) == kept


def test_forbidden_tokens_are_never_drawn():
    logits = LOGITS.at[0, 0].set(-jnp.inf)
    keys = jax.random.split(jax.random.key(0), 200)
    arrays = Sampler(temperature=1.0, top_k=2).arrays()
    arrays.pop("penalty")
    drawn = jax.vmap(lambda key: sample(key, logits, **arrays)[0])(keys)
    assert set(np.asarray(drawn)) == {1, 2}


def test_penalty_counts_every_occurrence():
    logits = jnp.array([[2.0, -2.0, 3.0]])
    out = penalize(logits, jnp.array([[-1, 0, 0, 1]]), 1.5)
    np.testing.assert_allclose(out, [[2 / 1.5**2, -2 / 1.5, 3.0]], rtol=1e-6)


def test_seen_penalty_lowers_whatever_the_sign():
    logits = jnp.array([[2.0, -2.0, 3.0]])
    out = penalize_seen(logits, jnp.array([[True, True, False]]), 1.25)
    np.testing.assert_allclose(out, [[1.6, -2.5, 3.0]], rtol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"penalty": 0},
        {"penalty_window": -1},
    ],
)
def test_bad_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampler(**wrong)
