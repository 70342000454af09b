"""What the parity tests share: weights through the tables, compiled calls, bounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vita_jax import bench, tables
from vita_jax import params as trees
from vita_jax.models.llm import Llm
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


def qwen2(config):
    """Qwen2 of transformers with random weights, the same as our parameters, and their slots."""
    import torch

    torch.manual_seed(0)
    model = bench.qwen2(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, so that a forgotten one shows
            parameter.copy_(0.2 * torch.randn_like(parameter) + (parameter.ndim == 1))
    weights = {"w." + name: value.numpy() for name, value in model.state_dict().items()}
    tokens = jnp.zeros((1, 1), jnp.int32)
    touch = lambda llm: llm(llm.embed(tokens), tokens, None)  # noqa: E731
    shapes = shapes_of(Llm(config), method=touch)
    return (
        model,
        recorded_params(weights, tables.LLM, shapes),
        tables.assign(tables.LLM, shapes),
    )


def assert_close(actual, expected, bound=1e-4):
    """max |error| <= bound * max |value|; prints the figure (pytest -s shows it)."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    error, scale = np.abs(actual - expected).max(), np.abs(expected).max()
    assert error <= bound * scale, f"max |error| {error:.3g} > {bound:g} x {scale:.3g}"
    return error / scale
