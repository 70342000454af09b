"""vita_jax/infer/sampling.py: each setting does what it says, against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vita_jax.infer.sampling import Sampler, penalize, penalize_seen, sample

LOGITS = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))


def draws(number=400, **settings):
    return many_draws(LOGITS, number, **settings)


def many_draws(logits, number, **settings):
    """One draw a row, each with a key of its own."""
    keys = jax.random.split(jax.random.key(0), number)
    sampling = {name: np.full(number, x) for name, x in Sampler(**settings).arrays().items()}
    return np.asarray(jax.jit(sample)(keys, jnp.repeat(logits, number, axis=0), sampling))


def test_each_row_has_settings_of_its_own():
    both = [Sampler(), Sampler(temperature=1.0, top_k=2)] * 200
    sampling = {name: np.array([s.arrays()[name] for s in both]) for name in both[0].arrays()}
    keys = jax.random.split(jax.random.key(0), 400)
    drawn = np.asarray(sample(keys, jnp.repeat(LOGITS, 400, axis=0), sampling))
    assert set(drawn[::2]) == {0} and set(drawn[1::2]) == {0, 1}


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
    drawn = many_draws(logits, 200, temperature=1.0, top_k=2)
    assert set(np.asarray(drawn)) == {1, 2}


def test_penalty_counts_every_occurrence():
    logits = jnp.array([[2.0, -2.0, 3.0]])
    out = penalize(logits, jnp.array([[2, -1, 0, 0, 1]]), *map(jnp.array, ([1.5], [4])))
    np.testing.assert_allclose(out, [[2 / 1.5**2, -2 / 1.5, 3.0]], rtol=1e-6)


def test_seen_penalty_lowers_whatever_the_sign():
    logits = jnp.array([[2.0, -2.0, 3.0]])
    out = penalize_seen(logits, jnp.array([[True, True, False]]), jnp.array([1.25]))
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
