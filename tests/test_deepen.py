"""vita_jax/deepen.py: more layers, the same numbers."""

import json

import jax
import numpy as np
import pytest
from runs import weights

import vita_jax
from vita_jax import checkpoint, cli
from vita_jax.models.vita import Vita
from vita_jax.quantize import quantize


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepen") / "tiny"
    checkpoint.initialize("vita_tiny", folder, overrides=["audio.num_layers=3"])
    return folder


def test_the_same_answers(folder, tmp_path, capsys):
    deep = tmp_path / "deep"
    assert cli.main(["deepen", str(folder), str(deep), "vision=4", "audio=5", "llm=3"]) == 0
    assert "init_from" in capsys.readouterr().out
    before, after = vita_jax.load(folder), vita_jax.load(deep)
    layers = [getattr(after.config, part).num_layers for part in ("vision", "audio", "llm")]
    assert layers == [4, 5, 3]
    rng = np.random.default_rng(1)
    tiles = rng.standard_normal((1, 2, 28, 28, 3), np.float32)
    clip = (rng.standard_normal((1, 1, 60, 80), np.float32), np.ones((1, 1, 60), bool))
    for method, inputs in (("encode_tiles", (tiles,)), ("encode_audio", clip)):
        made = [
            jax.tree.leaves(Vita(e.config).apply({"params": e.params}, *inputs, method=method))
            for e in (before, after)
        ]
        assert np.std(made[0][0]) > 0
        for one, other in zip(*made, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)
    told = [e.chat("What is this?", max_new_tokens=8, speak=False).text for e in (before, after)]
    assert told[0] == told[1]
    # Which layers: each old one once, unchanged, and copies whose outputs are zero.
    old, new = weights(folder), weights(deep)
    assert set(old) == set(new)
    source, copied = [0, 0, 1, 1, 2], [1, 3]
    for name in ("attn/out", "attn/out_bias", "mlp/down", "mlp/down_bias", "attn/q", "mlp/up"):
        path = f"audio/encoder/blocks/{name}"
        expected = old[path][source]
        if name.split("_")[0] in ("attn/out", "mlp/down"):
            expected[copied] = 0
        np.testing.assert_array_equal(new[path], expected)
    for path in old:
        if "/blocks/" not in path:
            np.testing.assert_array_equal(new[path], old[path])
    noted = json.loads((deep / "provenance.json").read_text())["deepened"]
    assert noted["num_layers"] == {"vision": 4, "audio": 5, "llm": 3}


def test_weights_of_8_bits(folder, tmp_path):
    quantize(folder, tmp_path / "int8")
    words = [str(tmp_path / "int8"), str(tmp_path / "deep"), "llm=4"]
    assert cli.main(["deepen", *words]) == 0
    small, deep = weights(tmp_path / "int8"), weights(tmp_path / "deep")
    np.testing.assert_array_equal(deep["llm/blocks/mlp/up"][::2], small["llm/blocks/mlp/up"])
    assert deep["llm/blocks/mlp/up"].dtype == np.float32


def test_refused(folder, tmp_path, capsys):
    for words, message in (
        (["audio=2"], "audio=2: it has 3 layers; give 4 to 6"),
        (["audio=7"], "audio=7: it has 3 layers; give 4 to 6"),
        (["ears=4"], "ears: no part to deepen; one of vision, audio, llm"),
        (["audio"], "audio: write PART=LAYERS"),
        (["audio=-4"], "audio=-4: write PART=LAYERS"),
    ):
        assert cli.main(["deepen", str(folder), str(tmp_path / "deep"), *words]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "deep").exists()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "note").write_text("mine")
    assert cli.main(["deepen", str(folder), str(tmp_path / "used"), "audio=4"]) == 2
    assert "exists already" in capsys.readouterr().err
