"""Parameter trees by path: a tree is nested dicts, a path is its keys joined by "/"."""

from __future__ import annotations

import math
import re

from flax.traverse_util import flatten_dict, unflatten_dict

# Normalisation statistics: no gradient changes them. The fixed ones never train; the others are
# measured anew by every step that trains their module.
FIXED = ("mean", "istd")
STATISTICS = (*FIXED, "running_mean", "running_var")
# Not counted: statistics, and the lengths of weight-normalised kernels (folding them into the
# kernel leaves one number a weight).
UNCOUNTED = (*STATISTICS, "g")


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


def match(patterns, paths) -> list[str]:
    """Those of `paths` that a pattern matches as a whole, in their order.

    Args:
      patterns: regular expressions.
      paths: parameter paths.

    Raises:
      ValueError: a pattern is no regular expression, or matches nothing.
    """
    paths, found = list(paths), set()
    for pattern in patterns:
        try:
            new = [path for path in paths if re.fullmatch(pattern, path)]
        except re.error as error:
            raise ValueError(f"pattern {pattern!r}: {error}") from None
        if not new:
            parts = sorted({"/".join(path.split("/")[:2]) for path in paths})
            raise ValueError(
                f"pattern {pattern!r} matches no parameter; there are {', '.join(parts)}"
            )
        found.update(new)
    return [path for path in paths if path in found]


def split(tree, patterns) -> tuple[dict, dict]:
    """The tree of what `match` finds and the tree of the rest, which has what is FIXED.

    Errors as `match`.
    """
    flat = flatten(tree)
    found = {path for path in match(patterns, flat) if path.rsplit("/", 1)[-1] not in FIXED}
    return (
        unflatten({path: leaf for path, leaf in flat.items() if path in found}),
        unflatten({path: leaf for path, leaf in flat.items() if path not in found}),
    )


def merge(*trees) -> dict:
    """One tree of several that share no path."""
    flats = [flatten(tree) for tree in trees]
    merged = {path: leaf for flat in flats for path, leaf in flat.items()}
    assert len(merged) == sum(map(len, flats)), "a path is in two trees"
    return unflatten(merged)
