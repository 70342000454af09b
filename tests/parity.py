"""What the parity tests share: weights through the tables, compiled calls, bounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vita_jax import params as trees
from vita_jax import peer, tables
from vita_jax.batch import TEXT_TOKEN
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
    model = peer.qwen2(config).eval()
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


def packed(config, x, x_lens, y, y_lens, padded=False):
    """Arguments of `Speech`: utterances one behind the other in one row, padding at its end. With
    `padded`, positions as if all texts had the longest one's size: so the release trains.
    """
    text = np.concatenate([row[:n] for row, n in zip(x, x_lens)] + [x[0, :3]])[None]
    segments, tokens = np.repeat([*range(1, len(x_lens) + 1), 0], [*x_lens, 3]), []
    for row, (n, codes, length) in enumerate(zip(x_lens, y, y_lens)):
        inside = [config.bos_id, *[TEXT_TOKEN] * n, config.sos_id, *codes[:length], config.eos_id]
        gap = (max(x_lens) - n) * padded
        tokens += [(t, i + gap * (i > n), row + 1) for i, t in enumerate(inside)]
    tokens = np.array([*tokens, (0, 0, 0), (0, 0, 0)], np.int32)
    return (jnp.asarray(text), jnp.asarray(segments)[None], *jnp.asarray(tokens.T[:, None]))


def assert_close(actual, expected, bound=1e-4):
    """max |error| <= bound * max |value|; prints the figure (pytest -s shows it)."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    error, scale = np.abs(actual - expected).max(), np.abs(expected).max()
    assert error <= bound * scale, f"max |error| {error:.3g} > {bound:g} x {scale:.3g}"
    return error / scale


def perturbed(params, seed=1):
    """The parameters with a little noise on each, so that a forgotten one shows."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), params)


def torch_gradients(model, rules, params):
    """{path: gradient} that a torch module holds after `backward`, in our layout."""
    held = {}
    for name, parameter in model.named_parameters():
        for theirs, published in (("original0", "weight_g"), ("original1", "weight_v")):
            name = name.replace(f"parametrizations.weight.{theirs}", published)
        if parameter.grad is not None:
            held[name] = parameter.grad.numpy()
    slots = [s for s in tables.assign(rules, trees.flatten(params)) if s.published in held]
    assert len(slots) == len(held)
    return tables.to_params(held, slots)
