"""Folders of 8-bit weights: near what they were made from, half of bfloat16, read as any folder."""

import contextlib
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from runs import run, saved, weights
from safetensors.numpy import load_file, save_file

from vita_jax import checkpoint, cli
from vita_jax import params as trees
from vita_jax.batch import Batch
from vita_jax.config import vita_tiny
from vita_jax.models.vita import Vita
from vita_jax.quantize import quantize, to_int8
from vita_jax.sharding import make_mesh

PARTS = ("vision", "audio", "llm", "speech", "codec")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantize") / "tiny"
    checkpoint.initialize("vita_tiny", folder, seed=7)
    (folder / "source" / "codec").mkdir(parents=True)
    (folder / "source" / "codec" / "model.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def quantized(folder):
    quantize(folder, folder.with_name("int8"))
    return folder.with_name("int8")


@pytest.fixture
def copy(quantized, tmp_path):
    return shutil.copytree(quantized, tmp_path / "copy")


def stored(folder):
    """{path: array} as the files hold it."""
    files = {part: load_file(folder / f"{part}.safetensors") for part in PARTS}
    return {f"{part}/{name}": value for part, file in files.items() for name, value in file.items()}


def test_values_are_within_half_a_step(folder, quantized):
    exact, held, read = weights(folder), stored(quantized), weights(quantized)
    assert set(read) == set(exact)
    for path, value in exact.items():
        if held[path].dtype == np.int8:
            scale = held[path + ".scale"]
            assert np.abs(held[path]).max() == 127 and read[path].dtype == np.float32
            np.testing.assert_array_equal(read[path], held[path] * scale)
            assert np.all(np.abs(read[path] - value) <= 0.501 * scale), path
        else:
            np.testing.assert_array_equal(read[path], value.astype(held[path].dtype), path)
    assert {path.rsplit("/", 1)[0] for path in held if held[path].dtype == ml_dtypes.bfloat16} > {
        "codec/decoder/conv_pre", "codec/encoder/timbre",
    }  # fmt: skip
    kept = {path for path, value in held.items() if value.dtype == np.float32}
    for path in ("audio/encoder/cmvn/mean", "codec/codebooks/code", "codec/decoder/conv_pre/g",
                 "llm/blocks/attn/q_bias", "llm/norm/scale", "vision/encoder/position_embedding",
                 "audio/encoder/subsampling/conv1"):  # fmt: skip
        assert path in kept
    for path, shape in {
        "llm/blocks/attn/q": (2, 1, 4, 16), "llm/blocks/attn/out": (2, 1, 1, 64),
        "llm/embedding": (320, 1), "llm/head": (1, 320), "audio/adapter/conv": (1, 1, 64),
    }.items():  # fmt: skip
        assert held[path + ".scale"].shape == shape


def test_about_half_of_bfloat16(folder, quantized):
    exact = stored(folder)
    for part in ("llm", "vision", "audio"):
        in_bfloat16 = sum(2 * v.size for path, v in exact.items() if path.startswith(part))
        # In a model as small as this, scales, biases and the header take as much as half again.
        assert (quantized / f"{part}.safetensors").stat().st_size < 0.75 * in_bfloat16, part


def test_logits_are_near(folder, quantized):
    tokens = jnp.arange(24).reshape(1, 24) * 11 % 300
    ones = jnp.ones_like(tokens)
    batch = Batch(tokens, jnp.arange(24)[None], ones, ones)
    exact, near = (
        Vita(config).apply({"params": params}, batch)
        for config, params in (checkpoint.load(x, dtype="float32") for x in (folder, quantized))
    )
    # A weight is off by 0.6% of its channel's deviation (step 3 deviations / 127, over sqrt(12));
    # 10 products one after the other make that 2%, their sum in residuals not much more.
    error = jnp.std(near - exact) / jnp.std(exact)
    assert 0.001 < error < 0.04


@pytest.mark.parametrize("mesh", [(1, 1, 2), (1, 2, 2)])
def test_load_on_a_mesh_reads_shards(quantized, mesh, monkeypatch):
    whole = trees.flatten(checkpoint.load(quantized, dtype="float32")[1])
    read, inner = [], checkpoint.Scaled.__getitem__

    def spy(self, at):
        read.append((tuple(self.get_shape()), inner(self, at).shape))
        return inner(self, at)

    monkeypatch.setattr(checkpoint.Scaled, "__getitem__", spy)
    _, params = checkpoint.load(quantized, make_mesh(mesh), "float32")
    for path, value in trees.flatten(params).items():
        np.testing.assert_array_equal(np.asarray(value), whole[path], path)
    assert {got for shape, got in read if shape == (320, 64)} == {(320 // mesh[1] // mesh[2], 64)}
    assert {got for shape, got in read if shape == (2, 64, 4, 16)} == {(2, 64 // mesh[1], 2, 16)}


@pytest.mark.parametrize("mesh", [None, (1, 2, 2)], ids=str)
def test_weights_multiplied_in_8_bits(folder, quantized, mesh):
    """The same numbers as those of the float32 that int8 and scales stand for, up to rounding."""
    mesh = mesh and make_mesh(mesh)
    config, exact = checkpoint.load(quantized, dtype="float32")
    _, kept = checkpoint.load(quantized, mesh, "float32", int8=True)
    int8 = {path for path, value in trees.flatten(kept).items() if value.dtype == jnp.int8}
    assert int8 > {"llm/head", "llm/blocks/attn/out", "llm/blocks/mlp/up", "speech/ar/mlp/down"}
    assert int8 > {"vision/encoder/blocks/attn/qkv", "vision/projector/up"}
    assert int8 > {"audio/encoder/blocks/attn/position", "audio/encoder/blocks/mlp/down"}
    assert not any("embedding" in path or "codec" in path for path in int8)
    tokens = jnp.arange(24).reshape(1, 24) * 11 % 300
    ones, pieces = jnp.ones_like(tokens), jax.random.normal(jax.random.key(0), (1, 4, 16))
    batch = Batch(tokens, jnp.arange(24)[None], ones, ones)

    def spoken(model):
        args = ones[:, :4], tokens[:, :6] % 64, jnp.arange(6)[None], ones[:, :6]
        return model.speech.logits(model.speech(pieces, *args))

    def seen(model):
        return model.encode_tiles(jax.random.normal(jax.random.key(1), (1, 1, 28, 28, 3)))

    def heard(model):
        frames = jax.random.normal(jax.random.key(2), (1, 1, 43, 80))
        return model.encode_audio(frames, jnp.ones((1, 1, 43), bool))[0]

    def run(params, dtype, **how):
        return Vita(config.with_dtype(dtype)).apply({"params": params}, **how)

    methods = [{"method": method} for method in (spoken, seen, heard)]
    for how in ({"batch": batch}, *methods):
        expected = np.asarray(run(exact, "float32", **how))
        with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
            for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 0.03)):
                got = np.asarray(jax.jit(functools.partial(run, dtype=dtype, **how))(kept))
                assert np.abs(got - expected).max() < tolerance * np.abs(expected).max()
    with pytest.raises(ValueError, match="no weights of 8 bits"):
        checkpoint.load(folder, int8=True)


def test_slices(quantized):
    file = quantized / "llm.safetensors"
    whole = checkpoint.read(file, "blocks/mlp/up")
    np.testing.assert_array_equal(checkpoint.read(file, "blocks/mlp/up", 1), whole[1])
    with checkpoint.opened(file) as held:
        values = held["blocks/mlp/up"]
        np.testing.assert_array_equal(values[0, 3:5, 7], whole[0, 3:5, 7])
        np.testing.assert_array_equal(values[0, 3, 1:], whole[0, 3, 1:])
        np.testing.assert_array_equal(values[:, 60:], whole[:, 60:])
        assert "blocks/mlp/up.scale" not in held


def test_init_from_and_resume(quantized, tmp_path):
    words = (f"init_from={quantized}", "data.max_tokens=768", "save_every=1", "num_steps=2")
    run(tmp_path, *words)
    start, made, state = weights(quantized), stored(tmp_path / "model"), saved(tmp_path, 2)
    assert {p: v.dtype for p, v in made.items()} == {p: v.dtype for p, v in start.items()}
    frozen = [path for path in made if not path.startswith("llm/")]
    assert all(np.array_equal(made[path], start[path]) for path in frozen)
    moved = made["llm/blocks/mlp/up"] - start["llm/blocks/mlp/up"]
    assert 0 < np.abs(moved).max() < 0.1
    for gone in ("model", "saves/2"):
        shutil.rmtree(tmp_path / gone)
    run(tmp_path, *words)
    assert saved(tmp_path, 2) == state


def test_folder_holds_all_it_needs(folder, quantized):
    names = [{str(f.relative_to(x)) for f in x.rglob("*")} for x in (folder, quantized)]
    assert names[0] == names[1]
    for name in ("config.json", "LICENSE.txt", "source/codec/model.json"):
        assert (folder / name).read_bytes() == (quantized / name).read_bytes()
    provenance = json.loads((quantized / "provenance.json").read_text())
    how = provenance.pop("quantized")
    assert provenance == json.loads((folder / "provenance.json").read_text())
    assert how["from"] == "tiny" and how["made_by"] == "vita quantize"


def edit(folder, change, part="llm"):
    tensors = load_file(folder / f"{part}.safetensors")
    change(tensors)
    save_file(tensors, folder / f"{part}.safetensors")


def flat_scale(llm):
    llm["head.scale"] = llm["head.scale"][0]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda llm: llm.pop("head.scale"),
         r"llm/head: I8 needs llm/head.scale, floating-point, \[64, 320\] or 1 .*; found none"),
        (flat_scale, r"llm/head: I8 needs llm/head.scale.*; found F32 \[320\]"),
        (lambda llm: llm.update({"head.scale": np.ones((1, 319), np.float32)}),
         r"llm/head: I8 needs llm/head.scale.*; found F32 \[1, 319\]"),
        (lambda llm: llm.update({"head.scale": np.ones((1, 320), np.int32)}),
         r"llm/head: I8 needs llm/head.scale.*; found I32 \[1, 320\]"),
        (lambda llm: llm.pop("head"), r"2 tensors"),
        (lambda llm: llm.update({"head": llm["head"].astype(np.float32)}),
         r"extra: llm/head.scale \[1, 320\]"),
        (lambda llm: llm.update({"norm/scale": llm["norm/scale"].astype(np.int8)}),
         r"llm/norm/scale: I8 needs llm/norm/scale.scale"),
    ],
)  # fmt: skip
def test_misfits_are_refused(folder, copy, change, words):
    edit(copy, change)
    expected = {path: v.shape for path, v in stored(folder).items() if path.startswith("llm/")}
    found = {f"llm/{n}": e for n, e in checkpoint.header(copy / "llm.safetensors").items()}
    with pytest.raises(ValueError, match=words) as error:
        checkpoint.refuse(checkpoint.mismatches(found, expected), copy)
    assert str(copy) in str(error.value)
    if "2 tensors" in words:
        for line in ("missing: llm/head [64, 320]", "extra: llm/head.scale [1, 320]"):
            assert line in str(error.value)
    else:
        assert "\n" not in str(error.value)


def test_load_refuses_misfits(copy):
    edit(copy, lambda llm: llm.pop("head.scale"))
    with pytest.raises(ValueError, match="llm/head: I8 needs llm/head.scale.*found none"):
        checkpoint.load(copy)


def test_twice_is_refused(folder, quantized, tmp_path, capsys):
    assert cli.main(["quantize", str(quantized), str(tmp_path / "new")]) == 2
    assert "quantized already; give the folder it was made from" in capsys.readouterr().err
    with pytest.raises(ValueError, match="exists already"):
        quantize(folder, quantized)
    assert list(tmp_path.iterdir()) == []


def test_nan_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "nan")
    edit(tmp_path / "nan", lambda llm: llm["blocks/mlp/up"].__setitem__((1, 2, 3), np.nan))
    with pytest.raises(ValueError, match="llm/blocks/mlp/up: NaN or infinity"):
        quantize(tmp_path / "nan", tmp_path / "new")
    assert [f.name for f in tmp_path.iterdir()] == ["nan"]


def test_zeros_and_the_smallest_numbers():
    values = np.array([[0, 1e-44, 3e-38, 1e-30], [0, 0, -1, 1e38]], np.float32).T
    whole, scale = to_int8(values, (0,), "x")
    assert whole.dtype == np.int8 and scale.shape == (1, 2)
    assert np.all(np.abs(whole * scale - values) <= 0.501 * scale)
    whole, _ = to_int8(np.zeros((3, 2)), (0,), "x")
    assert not whole.any()


def test_the_verb(folder, tmp_path, capsys):
    assert cli.main(["quantize", str(folder), str(tmp_path / "new")]) == 0
    assert "MB of" in capsys.readouterr().out
    config, params = checkpoint.load(tmp_path / "new")
    assert config.llm == vita_tiny().with_dtype("bfloat16").llm
    assert {x.dtype for x in jax.tree.leaves(params["llm"])} == {jnp.dtype("bfloat16")}
