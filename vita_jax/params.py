"""Parameter trees by path: a tree is nested dicts, a path is its keys joined by "/"."""

from __future__ import annotations

import math

from flax.traverse_util import flatten_dict, unflatten_dict

# Not counted: normalisation statistics, and the lengths of weight-normalised kernels (folding them
# into the kernel leaves one number a weight).
UNCOUNTED = ("mean", "istd", "running_mean", "running_var", "g")


def flatten(tree) -> dict:
    """{path: leaf} of a nested dict."""
    return flatten_dict(tree, sep="/")


def unflatten(flat: dict) -> dict:
    """The nested dict of {path: leaf}."""
    return unflatten_dict(flat, sep="/")


def count(tree) -> int:
    """Parameters in a tree of arrays or shapes, statistics left out and weight norm folded."""
    return sum(
        math.prod(leaf.shape)
        for path, leaf in flatten(tree).items()
        if path.rsplit("/", 1)[-1] not in UNCOUNTED
    )
