"""vita_jax/optim.py: the schedule, and what each parameter gets of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vita_jax import params as trees
from vita_jax.config import OptimConfig, vita_tiny
from vita_jax.models.vita import init_params
from vita_jax.optim import make_optimizer, schedule

PARAMS = {"vision": {"up": jnp.full(3, 2.0)}, "llm": {"up": jnp.full(3, 2.0), "bias": jnp.ones(2)}}
PATHS = ["vision/up", "llm/up", "llm/bias"]
PLAIN = OptimConfig(learning_rate=0.1, warmup_ratio=0.0, clip_norm=1e9)


def step(config, grads=None, num_steps=1000, params=PARAMS):
    optimizer = make_optimizer(config, num_steps, PATHS)
    grads = jax.tree.map(jnp.ones_like, params) if grads is None else grads
    updates, state = optimizer.update(grads, optimizer.init(params), params)
    return optax.apply_updates(params, updates), state


def test_warm_up_and_cosine():
    rate = schedule(OptimConfig(learning_rate=2.0, warmup_ratio=0.1), 100)
    found = [float(rate(s)) for s in (0, 5, 10, 55, 100, 200)]
    np.testing.assert_allclose(found, [0, 1, 2, 1, 0, 0], atol=1e-6)
    assert float(schedule(PLAIN, 100)(0)) == pytest.approx(0.1)  # no warm-up, no division by 0


@pytest.mark.peer
def test_schedule_equals_transformers():
    import torch
    import transformers

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=3.0)
    peer = transformers.get_cosine_schedule_with_warmup(optimizer, 4, 100)
    rate = schedule(OptimConfig(learning_rate=3.0, warmup_ratio=0.031), 100)
    for number in range(100):
        assert float(rate(number)) == pytest.approx(peer.get_last_lr()[0], abs=1e-6)
        optimizer.step()
        peer.step()


def test_rates_by_path():
    new, _ = step(dataclasses.replace(PLAIN, rates={"vision/.*": 0.1}))
    # The first step of Adam is the rate itself.
    np.testing.assert_allclose(2 - new["llm"]["up"], 0.1, rtol=1e-4)
    np.testing.assert_allclose(2 - new["vision"]["up"], 0.01, rtol=1e-4)
    with pytest.raises(ValueError, match="'audio/.*' matches no parameter"):
        step(dataclasses.replace(PLAIN, rates={"audio/.*": 0.1}))


def test_weight_decay_leaves_biases():
    grads = jax.tree.map(jnp.zeros_like, PARAMS)
    new, _ = step(dataclasses.replace(PLAIN, weight_decay=0.5), grads)
    np.testing.assert_allclose(new["llm"]["up"], 2 - 0.1 * 0.5 * 2, rtol=1e-6)
    np.testing.assert_array_equal(new["llm"]["bias"], 1)


def test_clip_is_of_all_parameters_together():
    # Adam forgets the scale of a gradient but its second moment does not.
    _, state = step(dataclasses.replace(PLAIN, clip_norm=1.0))
    nu = optax.tree_utils.tree_get(state, "nu")
    norm = sum(float(leaf.sum()) for leaf in jax.tree.leaves(nu)) / 0.001
    assert norm == pytest.approx(1.0, rel=1e-4)


def test_momentum_dtype():
    _, state = step(dataclasses.replace(PLAIN, momentum_dtype="bfloat16"))
    assert {x.dtype.name for x in jax.tree.leaves(optax.tree_utils.tree_get(state, "mu"))} == {
        "bfloat16"
    }
    assert {x.dtype.name for x in jax.tree.leaves(optax.tree_utils.tree_get(state, "nu"))} == {
        "float32"
    }


def test_equals_optax_adamw():
    config = dataclasses.replace(PLAIN, weight_decay=0.1, no_decay=())
    peer = optax.adamw(schedule(config, 10), 0.9, 0.999, 1e-8, weight_decay=0.1)
    optimizer = make_optimizer(config, 10, PATHS)
    ours, theirs = PARAMS, PARAMS
    state, peer_state = optimizer.init(ours), peer.init(theirs)
    for i in range(4):
        grads = jax.tree.map(lambda x, i=i: jnp.sin(x * (i + 1)), PARAMS)
        updates, state = optimizer.update(grads, state, ours)
        ours = optax.apply_updates(ours, updates)
        updates, peer_state = peer.update(grads, peer_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


def test_muon_makes_updates_of_weights_orthogonal():
    """Of each layer's matrix by itself; tables, heads, norms and biases get what AdamW gives."""
    model = vita_tiny()
    flat = {f"llm/{p}": x for p, x in trees.flatten(init_params(model, 0)["llm"]).items()}
    weights = [p for p in flat if "/attn/" in p or "/mlp/" in p if "bias" not in p]
    grads = {p: np.random.default_rng(i).standard_normal(x.shape, np.float32) for i, (p, x) in
             enumerate(flat.items())}  # fmt: skip
    updates = {}
    for muon_rate in (0.0, 0.3):
        config = dataclasses.replace(PLAIN, muon_rate=muon_rate)
        optimizer = make_optimizer(config, 1000, flat, model)
        state = optimizer.init(trees.unflatten(flat))
        found, state = optimizer.update(trees.unflatten(grads), state, trees.unflatten(flat))
        updates[muon_rate] = trees.flatten(found)
    assert len(weights) == 7
    for path in flat:
        if path not in weights:
            np.testing.assert_array_equal(updates[0.3][path], updates[0.0][path], err_msg=path)
    for path in weights:
        inputs = 2 if path.endswith("/out") else 1
        for layer in np.asarray(updates[0.3][path]):
            matrix = layer.reshape(np.prod(layer.shape[:inputs]), -1)
            size = 0.2 * 0.3 * max(matrix.shape) ** 0.5
            values = np.linalg.svd(matrix, compute_uv=False) / size
            # Five iterations bring all but the least of them near one.
            assert values.max() < 1.3 and np.quantile(values, 0.05) > 0.6, path
    moments = trees.flatten(optax.tree_utils.tree_get(state, "nu"))
    assert not any(getattr(moments.get(path), "size", 0) for path in weights)
