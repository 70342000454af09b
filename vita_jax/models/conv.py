"""Convolutions of the codec and of its discriminators, fast forward and backward on any device.

Goes in: float32[B, *space, C] and a kernel [*width, C / groups, out]. Comes out: float32[B,
*space', out]. Accelerators run XLA's convolution as it is. On CPUs that is slow with few channels,
with groups and in gradients past a stride, so there such a convolution is written as one without.
Read next: `codec.py`.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class _How(NamedTuple):
    """All settings of a convolution but the groups are tuples, a number for each space axis."""

    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    spread: tuple[int, ...]
    padding: tuple[int, ...]
    groups: int


def convolve(x, kernel, *, stride=1, dilation=1, spread=1, padding=0, groups=1):
    """Cross-correlates `x` with `kernel` along one or two axes; the kernel is not flipped.

    Args:
      x: float32[B, *space, C].
      kernel: dtype[*width, C / groups, out].
      stride: positions from one output to the next. These four are an int, or one for each axis.
      dilation: positions from one weight to the next.
      spread: positions from one input to the next, zeros between them, as a transposed convolution
        has it.
      padding: zeros at either end of each axis.
      groups: parts that channels and outputs are cut into; each part of the outputs sees its own
        part of the channels.

    Returns:
      float32[B, *space', out], each axis ((space - 1) * spread + 2 * padding - (width - 1) *
      dilation) // stride + 1 long.
    """
    settings = (stride, dilation, spread, padding)
    axes = x.ndim - 2
    how = _How(*((s,) * axes if isinstance(s, int) else tuple(s) for s in settings), groups)
    return _convolve(x, kernel.astype(jnp.float32), how)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(x, kernel, how):
    return jax.lax.platform_dependent(
        x, kernel, cpu=functools.partial(_on_cpu, how=how), default=functools.partial(_xla, how=how)
    )


def _forward(x, kernel, how):
    return _convolve(x, kernel, how), (x, kernel)


def _backward(how, inputs, gradient):
    def gradients(to_x, to_kernel):
        def of(x, kernel, gradient):
            (dx,) = jax.vjp(lambda x: to_x(x, kernel, how), x)[1](gradient)
            (dkernel,) = jax.vjp(lambda kernel: to_kernel(x, kernel, how), kernel)[1](gradient)
            return dx, dkernel

        return of

    return jax.lax.platform_dependent(
        *inputs,
        gradient,
        cpu=gradients(_on_cpu, functools.partial(_on_cpu, for_kernel=True)),
        default=gradients(_xla, _xla),
    )


_convolve.defvjp(_forward, _backward)


def _xla(x, kernel, how):
    space = "HW"[-len(how.stride) :]
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=how.stride,
        padding=[(p, p) for p in how.padding],
        lhs_dilation=how.spread,
        rhs_dilation=how.dilation,
        dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"),
        feature_group_count=how.groups,
    )


def _on_cpu(x, kernel, how, for_kernel=False):
    """As `_xla`, in the form whose value and gradient for `x`, or for the kernel, is fastest."""
    kernel, how = _merged(kernel, how)
    channels, features = kernel.shape[-2:]
    slow = how.groups > 1 or _few(channels, features)
    if how.stride[-1] > 1 or how.spread[-1] > 1:
        slow |= for_kernel or (x.ndim == 4)
    return _by_blocks(x, kernel, how) if slow and how.dilation[-1] == 1 else _xla(x, kernel, how)


def _few(channels, features):
    """Whether vector units would idle: measured."""
    return channels * features < 256 or min(channels, features) < 8


def _merged(kernel, how):
    """Groups with few channels as fewer and larger ones, zeros between them: each is a convolution
    of its own, to be compiled and to be run.
    """
    *width, channels, features = kernel.shape
    own = features // how.groups
    number = 1
    while min(channels, own) * number < 16 and how.groups % (2 * number) == 0:
        number *= 2
    kernel = kernel.reshape(*width, channels, how.groups // number, number, own)
    kernel = jnp.einsum("...cgmf,mn->...ncgmf", kernel, np.eye(number, dtype=np.float32))
    kernel = kernel.reshape(*width, number * channels, features)
    return kernel, how._replace(groups=how.groups // number)


def _by_blocks(x, kernel, how):
    """Blocks of neighbours along the last axis become channels, of inputs and of outputs, until
    neither stride nor spread is left there and channels are enough; a convolution for each group.
    """
    stride, spread, padding = how.stride[-1], how.spread[-1], how.padding[-1]
    *rows, width, channels, features = kernel.shape
    length, features = x.shape[-2], features // how.groups
    # Inputs and outputs in a block; both span as many positions.
    inputs, outputs = (n // math.gcd(stride, spread) for n in (stride, spread))
    while _few(inputs * channels, outputs * features):
        inputs, outputs = 2 * inputs, 2 * outputs
    size = max(((length - 1) * spread + 2 * padding - (width - 1)) // stride + 1, 0)
    count = -(-size // outputs)
    # Zeros in front make the first block of outputs start in the first block of inputs.
    front, offset = divmod(padding, spread)
    reach = (width - 1 - offset + (outputs - 1) * stride) // (inputs * spread) + 1
    blocks = count + reach - 1
    back = blocks * inputs - front - length
    still = (0, 0, 0)
    x = jax.lax.pad(x, 0.0, (*(still,) * (x.ndim - 2), (front, back, 0), still))
    x = x.reshape(*x.shape[:-2], blocks, inputs, how.groups, channels)
    # The tap that an input of the j-th block from here is for an output of this block, if any.
    position = spread * np.arange(reach * inputs).reshape(reach, inputs, 1) + offset
    taps = position - stride * np.arange(outputs)
    pick = (taps[..., None] == np.arange(width)).astype(np.float32)
    kernel = kernel.reshape(*rows, width, channels, how.groups, features)
    kernel = jnp.einsum("jiok,...kcgf->g...jicof", pick, kernel)
    kernel = kernel.reshape(how.groups, *rows, reach, inputs * channels, outputs * features)
    settings = ((*s[:-1], last) for s, last in zip(how[:4], (1, 1, 1, 0)))
    how = _How(*settings, 1)
    parts = [
        _xla(x[..., g, :].reshape(*x.shape[:-3], inputs * channels), kernel[g], how)
        for g in range(len(kernel))
    ]
    shape = (*parts[0].shape[:-1], outputs, features)
    y = jnp.stack([part.reshape(shape) for part in parts], axis=-2)
    return y.reshape(*y.shape[:-4], count * outputs, len(kernel) * features)[..., :size, :]
