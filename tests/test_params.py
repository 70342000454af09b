"""vita_jax/params.py: trees by path, and what patterns pick of them."""

import numpy as np
import pytest

from vita_jax import params as trees

TREE = {
    "vision": {"projector": {"up": np.zeros((2, 3)), "bias": np.zeros(3)}},
    "audio": {"encoder": {"cmvn": {"mean": np.zeros(4)}, "out": np.zeros(5)}},
    "llm": {"head": np.zeros(6)},
    "codec": {"norm": {"scale": np.zeros(7), "running_mean": np.zeros(7)}, "g": np.zeros(8)},
}


def test_flat_and_back():
    flat = trees.flatten(TREE)
    assert list(flat)[0] == "vision/projector/up" and len(flat) == 8
    assert trees.flatten(trees.unflatten(flat)) == flat
    assert trees.count(TREE) == 6 + 3 + 5 + 6 + 7  # without statistics and lengths


def test_patterns_match_whole_paths():
    paths = list(trees.flatten(TREE))
    assert trees.match((r"llm/.*", r"vision/.*"), paths) == [
        "vision/projector/up", "vision/projector/bias", "llm/head",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"'llm' matches no parameter; there are .*llm/head"):
        trees.match((r"vision/.*", "llm"), paths)
    with pytest.raises(ValueError, match=r"pattern '\(': missing \)"):
        trees.match(("(",), paths)


def test_split_and_merge():
    trained, frozen = trees.split(TREE, (r"audio/.*", r"vision/projector/up", r"codec/norm/.*"))
    assert set(trees.flatten(trained)) == {
        "audio/encoder/out", "vision/projector/up", "codec/norm/scale", "codec/norm/running_mean",
    }  # fmt: skip
    assert "audio/encoder/cmvn/mean" in trees.flatten(frozen)  # fixed: it never trains
    assert trees.flatten(trees.merge(trained, frozen)).keys() == trees.flatten(TREE).keys()
    with pytest.raises(AssertionError):
        trees.merge(trained, TREE)
