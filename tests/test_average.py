"""vita_jax/average.py: means by hand, what is not averaged to the bit."""

import json
import shutil

import numpy as np
import pytest
from runs import weights

from vita_jax import checkpoint, cli
from vita_jax.quantize import quantize


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("average")
    for seed in (1, 2, 3):
        checkpoint.initialize("vita_tiny", place / str(seed), seed=seed)
    return [place / str(seed) for seed in (1, 2, 3)]


def test_means(folders, tmp_path, capsys):
    words = [str(tmp_path / "mean"), *map(str, folders), "--only", "vision/.*|llm/head"]
    assert cli.main(["average", *words]) == 0
    mean, first, *others = map(weights, (tmp_path / "mean", *folders))
    assert set(mean) == set(first)
    changed = {path for path in first if not np.array_equal(mean[path], first[path])}
    assert "llm/head" in changed and {path.split("/")[0] for path in changed} == {"vision", "llm"}
    for path in first:
        chosen = path.startswith("vision/") or path == "llm/head"
        each = [first[path], *(other[path] for other in others if chosen)]
        np.testing.assert_allclose(mean[path], sum(each) / len(each), rtol=0, atol=1e-7)
    noted = json.loads((tmp_path / "mean" / "provenance.json").read_text())
    assert noted["averaged"]["from"] == list(map(str, folders)) and noted["seed"] == 1
    assert "the mean of 3" in capsys.readouterr().out


def test_equal_numbers_stay(folders, tmp_path):
    for number in (1, 2):
        shutil.copytree(folders[0], tmp_path / str(number))
    copies = [str(tmp_path / str(number)) for number in (1, 2)]
    assert cli.main(["average", str(tmp_path / "mean"), str(folders[0]), *copies]) == 0
    mean, first = weights(tmp_path / "mean"), weights(folders[0])
    assert all(mean[path].tobytes() == first[path].tobytes() for path in first)


def test_weights_of_8_bits(folders, tmp_path):
    quantize(folders[1], tmp_path / "int8")
    assert (
        cli.main(["average", str(tmp_path / "mean"), str(tmp_path / "int8"), str(folders[0])]) == 0
    )
    mean, one, other = map(weights, (tmp_path / "mean", tmp_path / "int8", folders[0]))
    for path in other:
        np.testing.assert_allclose(mean[path], (one[path] + other[path]) / 2, rtol=0, atol=1e-7)


def test_refused(folders, tmp_path, capsys):
    checkpoint.initialize("vita_tiny", tmp_path / "deep", overrides=["llm.num_layers=3"])
    one, target = str(folders[0]), str(tmp_path / "mean")
    for words, message in (
        ([one], "give two or more"),
        ([one, str(tmp_path / "deep")], "deep: other sizes than"),
        ([one, str(folders[1]), "--only", "ears"], "--only ears: matches no parameter"),
        ([one, str(folders[1]), "--only", "llm("], "--only llm(: no regular expression"),
        ([one, str(tmp_path / "none")], "none"),
    ):
        assert cli.main(["average", target, *words]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "mean").exists()
