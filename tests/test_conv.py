"""vita_jax/models/conv.py: equal to XLA's convolution, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import assert_close

from vita_jax.models.conv import convolve

# (space, width, channels, features, settings); channels and features of all groups together.
CASES = {
    "few_channels": ((37,), (7,), 1, 8, {"padding": 3}),
    "one_feature": ((41,), (7,), 8, 1, {"padding": 3}),
    "many_channels": ((23,), (3,), 16, 32, {"padding": 1}),
    "dilated": ((50,), (11,), 16, 16, {"dilation": 5, "padding": 25}),
    "dilated_few": ((50,), (3,), 4, 4, {"dilation": 3, "padding": 3}),
    "stride_even": ((64,), (16,), 32, 64, {"stride": 8, "padding": 4}),
    "stride_odd": ((53,), (11,), 16, 32, {"stride": 5, "padding": 3}),
    "stride_few": ((47,), (5,), 2, 4, {"stride": 3, "padding": 1}),
    "stride_skips": ((30,), (2,), 16, 16, {"stride": 5}),
    "stride_dilated": ((40,), (3,), 4, 6, {"stride": 2, "dilation": 2, "padding": 2}),
    "stride_ends": ((24,), (5,), 16, 16, {"stride": 3, "padding": 6}),
    "spread_even": ((7,), (16,), 64, 32, {"spread": 8, "padding": 11}),
    "spread_odd": ((9,), (11,), 32, 16, {"spread": 5, "padding": 7}),
    "spread_few": ((9,), (5,), 4, 2, {"spread": 3, "padding": 3}),
    "spread_stride": ((19,), (5,), 8, 8, {"spread": 3, "stride": 2, "padding": 4}),
    "groups": ((67,), (41,), 32, 64, {"stride": 4, "padding": 20, "groups": 16}),
    "groups_plain": ((21,), (5,), 12, 6, {"padding": 2, "groups": 3}),
    "groups_spread": ((11,), (4,), 4, 8, {"spread": 2, "padding": 1, "groups": 2}),
    "groups_dilated": ((21,), (3,), 4, 8, {"dilation": 2, "groups": 2}),
    "plane": ((9, 33), (3, 9), 2, 8, {"padding": (1, 4)}),
    "plane_stride": ((9, 33), (3, 9), 16, 16, {"stride": (1, 2), "padding": (1, 4)}),
    "plane_dilated": (
        (11, 29), (3, 9), 16, 8, {"stride": (1, 2), "dilation": (2, 1), "padding": (2, 4)},
    ),
    "plane_rows": ((31, 3), (5, 1), 1, 16, {"stride": (3, 1), "padding": (2, 0)}),
    "plane_groups": ((7, 20), (3, 5), 4, 8, {"stride": (2, 2), "padding": (0, 2), "groups": 2}),
    "plane_spread": ((5, 6), (3, 4), 4, 4, {"spread": (1, 2), "padding": (1, 2)}),
}  # fmt: skip


def xla(x, kernel, stride=1, dilation=1, spread=1, padding=0, groups=1):
    """The convolution it has to be equal to."""
    axes = x.ndim - 2
    stride, dilation, spread, padding = (
        np.broadcast_to(setting, axes).tolist() for setting in (stride, dilation, spread, padding)
    )
    space = "XY"[:axes]
    return jax.lax.conv_general_dilated(
        x, kernel, stride, [(p, p) for p in padding], spread, dilation,
        (f"N{space}C", f"{space}IO", f"N{space}C"), groups, precision="highest",
    )  # fmt: skip


def case(name):
    """(inputs, kernel, settings) of a case, random."""
    space, width, channels, features, how = CASES[name]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *space, channels))
    kernel = rng.normal(size=(*width, channels // how.get("groups", 1), features))
    return x.astype(np.float32), kernel.astype(np.float32), how


def value_and_gradients(convolution, x, kernel):
    """The outputs, and the gradients for both arguments of a sum that weighs each output."""

    def total(x, kernel):
        y = convolution(x, kernel)
        weights = jax.random.normal(jax.random.key(1), y.shape)
        return jnp.sum(weights * y), y

    (_, y), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(x, kernel)
    return y, *gradients


@pytest.mark.parametrize("name", CASES)
def test_equals_xla(name):
    x, kernel, how = case(name)
    both = [functools.partial(convolution, **how) for convolution in (convolve, xla)]
    run = jax.jit(lambda *args: [value_and_gradients(convolution, *args) for convolution in both])
    for ours, theirs in zip(*run(x, kernel)):
        assert_close(ours, theirs, 1e-5)


@pytest.mark.parametrize("name", ["dilated", "stride_odd", "spread_odd", "groups", "plane_stride"])
def test_one_channel_at_a_time(name):
    """Against sums by hand, in double precision."""
    x, kernel, how = case(name)
    axes = range(1, x.ndim - 1)
    get = lambda key, default: np.broadcast_to(how.get(key, default), len(axes)).tolist()  # noqa: E731
    spread, padding, groups = get("spread", 1), get("padding", 0), how.get("groups", 1)
    wide = np.zeros(
        (len(x), *((n - 1) * s + 1 for n, s in zip(x.shape[1:-1], spread)), x.shape[-1])
    )
    wide[(slice(None), *(slice(None, None, s) for s in spread))] = x
    wide = np.pad(wide, ((0, 0), *((p, p) for p in padding), (0, 0)))
    stride, dilation = get("stride", 1), get("dilation", 1)
    size = [
        (wide.shape[i + 1] - (kernel.shape[i] - 1) * dilation[i] - 1) // stride[i] + 1
        for i in range(len(axes))
    ]
    expected = 0
    for tap in np.ndindex(*kernel.shape[: len(axes)]):
        at = [
            slice(t * d, t * d + (n - 1) * s + 1, s)
            for t, d, n, s in zip(tap, dilation, size, stride)
        ]
        seen = wide[(slice(None), *at)]
        seen = seen.reshape(*seen.shape[:-1], groups, -1)
        weights = kernel[tap].reshape(seen.shape[-1], groups, -1)
        expected = expected + np.einsum("...gc,cgf->...gf", seen, weights)
    expected = expected.reshape(len(x), *size, -1)
    assert_close(jax.jit(functools.partial(convolve, **how))(x, kernel), expected, 1e-5)


def test_within_other_transformations():
    """Twice in a program, rematerialised, one of them below the other."""
    x, kernel, how = case("stride_odd")

    def twice(convolution, x, kernel):
        block = jax.checkpoint(lambda x, kernel: jnp.tanh(convolution(x, kernel, **how)))
        y = block(x, kernel)
        return jnp.sum(block(y, jnp.tile(kernel, (1, 2, 1)) / 3) ** 2)

    run = jax.jit(jax.grad(twice, argnums=(1, 2)), static_argnums=0)
    for ours, theirs in zip(run(convolve, x, kernel), run(xla, x, kernel)):
        assert_close(ours, theirs, 1e-5)


def test_accelerators_keep_the_convolution_of_xla():
    x, kernel, how = case("groups")
    run = functools.partial(value_and_gradients, functools.partial(convolve, **how))
    lowered = {
        platform: jax.jit(run).trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "tpu")
    }
    counts = {platform: text.count("stablehlo.convolution") for platform, text in lowered.items()}
    # On a CPU one for each group, but 16 groups of few channels are computed as 2.
    assert how["groups"] == 16 and counts == {"tpu": 3, "cpu": 3 * 2}


def test_kernel_of_another_dtype():
    x, kernel, how = case("many_channels")
    y = convolve(x, kernel.astype(jnp.bfloat16), **how)
    assert y.dtype == jnp.float32
    assert_close(y, xla(x, kernel.astype(jnp.bfloat16).astype(np.float32), **how), 1e-5)
