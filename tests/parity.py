"""What the parity tests share: weights through the tables, compiled calls, bounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vita_jax import params as trees
from vita_jax import tables
from vita_jax.models.vita import draw


def shapes_of(module, *args, **kwargs):
    """{path: shape} of a module's parameters."""
    init = lambda: module.init(jax.random.key(0), *args, **kwargs)["params"]  # noqa: E731
    return trees.flatten(nn.unbox(jax.eval_shape(init)))


def random_params(module, *args, **kwargs):
    """Seeded parameters of a module that would be initialised with these arguments."""
    init = lambda: module.init(jax.random.key(0), *args, **kwargs)["params"]  # noqa: E731
    boxed = trees.flatten(jax.eval_shape(init))
    return trees.unflatten({path: draw(path, box, 0) for path, box in boxed.items()})


def run(module, params, *args, **static):
    """`module.apply`, compiled: op by op, every operation would be compiled by itself."""
    return _compiled(module, tuple(static.items()))(params, args)


@functools.cache
def _compiled(module, static):
    return jax.jit(lambda params, args: module.apply({"params": params}, *args, **dict(static)))


def recorded_params(tensors, rules, shapes, prefix="w."):
    """The recorded state dict as our parameter tree."""
    published = {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
    flat = tables.to_params(published, tables.assign(rules, shapes))
    return jax.tree.map(jnp.asarray, trees.unflatten(flat))


def assert_close(actual, expected, bound=1e-4):
    """max |error| <= bound * max |value|; prints the figure (pytest -s shows it)."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    error, scale = np.abs(actual - expected).max(), np.abs(expected).max()
    assert error <= bound * scale, f"max |error| {error:.3g} > {bound:g} x {scale:.3g}"
    return error / scale
