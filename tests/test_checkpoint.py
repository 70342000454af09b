"""Checkpoint folders: what is saved comes back, shard by shard too, and misfits are refused."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vita_jax import checkpoint
from vita_jax import params as trees
from vita_jax.config import vita_7b, vita_tiny
from vita_jax.data.tokenizer import Tokenizer, byte_tokenizer, load_bundled
from vita_jax.models import vita
from vita_jax.models.codec import fold_weight_norm
from vita_jax.sharding import make_mesh

PROVENANCE = {"made_by": "a test", "trained": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    checkpoint.initialize("vita_tiny", folder, seed=7)
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def expected_params(config, seed, dtype):
    """What `load` should give for `initialize`."""
    tree = vita.init_params(config, seed)
    tree["codec"] = fold_weight_norm(tree["codec"])
    return {
        path: np.asarray(value).astype(
            "float32" if path.startswith(("codec/", "audio/encoder/cmvn/")) else dtype
        )
        for path, value in trees.flatten(tree).items()
    }


def assert_same(params, expected):
    params = trees.flatten(params)
    assert set(params) == set(expected)
    for path, value in expected.items():
        assert params[path].dtype == value.dtype, path
        np.testing.assert_array_equal(np.asarray(params[path]), value, err_msg=path)


def test_folder_holds_all_it_needs(folder):
    assert {file.name for file in folder.iterdir()} == {
        "config.json", "tokenizer.json", "provenance.json", "LICENSE.txt", "vision.safetensors",
        "audio.safetensors", "llm.safetensors", "speech.safetensors", "codec.safetensors",
    }  # fmt: skip
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance == {"made_by": "vita init", "trained": False, "seed": 7}
    assert "Apache" in (folder / "LICENSE.txt").read_text()
    assert Tokenizer.load(folder).vocab_size == byte_tokenizer().vocab_size
    stored = load_file(folder / "llm.safetensors")
    assert stored["blocks/attn/q"].shape == (2, 64, 4, 16)
    assert {value.dtype for value in stored.values()} == {np.dtype("float32")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_load(folder, dtype):
    config, params = checkpoint.load(folder, dtype=dtype)
    codec = dataclasses.replace(vita_tiny().codec, weight_norm=False)
    assert config == dataclasses.replace(vita_tiny().with_dtype(dtype), codec=codec)
    assert_same(params, expected_params(vita_tiny(), 7, dtype))
    shapes = trees.flatten(vita.param_shapes(config))
    assert {p: v.shape for p, v in trees.flatten(params).items()} == {
        path: s.shape for path, s in shapes.items()
    }


class Spy:
    """A slice or an open file of safetensors; notes in `read` the shape of whatever is read."""

    def __init__(self, inner, read):
        self._inner, self._read = inner, read

    def __enter__(self):
        return Spy(self._inner.__enter__(), self._read)

    def __exit__(self, *error):
        return self._inner.__exit__(*error)

    def keys(self):
        return self._inner.keys()

    def get_slice(self, name):
        return Spy(self._inner.get_slice(name), self._read)

    def get_shape(self):
        return self._inner.get_shape()

    def __getitem__(self, at):
        values = self._inner[at]
        self._read.append((tuple(self._inner.get_shape()), values.shape))
        return values


def test_load_on_a_mesh_reads_shards(folder, monkeypatch):
    read, opened = [], checkpoint.open_folder(folder)
    safe_open = checkpoint.safe_open
    monkeypatch.setattr(checkpoint, "open_folder", lambda folder: opened)
    monkeypatch.setattr(
        checkpoint, "safe_open", lambda *args, **kwargs: Spy(safe_open(*args, **kwargs), read)
    )
    _, params = checkpoint.load(folder, make_mesh((1, 2, 2)), "float32")
    assert_same(params, expected_params(vita_tiny(), 7, "float32"))
    assert len(params["llm"]["embedding"].addressable_shards) == 4
    # The LLM's input table, and its query projection.
    assert {got for shape, got in read if shape == (320, 64)} == {(80, 64)}
    assert {got for shape, got in read if shape == (2, 64, 4, 16)} == {(2, 32, 2, 16)}


def test_save_keeps_dtypes(tmp_path):
    config = dataclasses.replace(vita_tiny(), speech=None, codec=None)
    params = vita.init_params(config, 3)
    params["llm"] = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), params["llm"])
    params["vision"] = jax.tree.map(lambda a: a.astype(np.float16), params["vision"])
    checkpoint.save(tmp_path / "new", config, params, byte_tokenizer(), PROVENANCE, "none")
    assert not (tmp_path / "new" / "speech.safetensors").exists()
    stored = load_file(tmp_path / "new" / "llm.safetensors")
    assert stored["head"].dtype == ml_dtypes.bfloat16
    loaded, back = checkpoint.load(tmp_path / "new", dtype="float32")
    assert loaded.speech is None and loaded.codec is None
    flat = trees.flatten(params)
    assert_same(back, {path: np.asarray(value, np.float32) for path, value in flat.items()})


def test_writer_fills_slices_in_any_order(tmp_path):
    rng = np.random.default_rng(0)
    values = {
        "a": rng.standard_normal((3, 4, 5)).astype(np.float16),
        "b": rng.standard_normal((7,)).astype(ml_dtypes.bfloat16),
        "c": rng.standard_normal((2, 3)).astype(np.float32),
    }
    writer = checkpoint.Writer(tmp_path / "t.safetensors", values, {"format": "pt"})
    assert writer.num_bytes == sum(value.nbytes for value in values.values())
    filled = sum(writer.fill("a", values["a"][i], i) for i in (2, 0, 1))
    filled += writer.fill("c", values["c"].astype(np.float64)) + writer.fill("b", values["b"])
    assert filled == writer.num_bytes
    for name, value in load_file(tmp_path / "t.safetensors").items():
        assert value.dtype == values[name].dtype
        np.testing.assert_array_equal(value, values[name])
    with checkpoint.safe_open(tmp_path / "t.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    np.testing.assert_array_equal(
        checkpoint.read(tmp_path / "t.safetensors", "a", 1), values["a"][1]
    )


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    fill, calls = checkpoint.Writer.fill, []

    def stop_at_the_tenth(self, *args):
        calls.append(args)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return fill(self, *args)

    monkeypatch.setattr(checkpoint.Writer, "fill", stop_at_the_tenth)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.initialize("vita_tiny", tmp_path / "new")
    assert len(calls) == 10
    assert list(tmp_path.iterdir()) == []


def test_a_killed_write_is_no_checkpoint_and_is_replaced(tmp_path):
    unfinished = tmp_path / ".new.unfinished"
    with pytest.raises(RuntimeError), checkpoint.new_folder(tmp_path / "new") as new:
        assert new == unfinished
        raise RuntimeError
    unfinished.mkdir()
    (unfinished / "llm.safetensors").write_bytes(b"part of it")
    with pytest.raises(FileNotFoundError, match="config.json"):
        checkpoint.load(unfinished)
    with checkpoint.new_folder(tmp_path / "new") as new:
        assert list(new.iterdir()) == []
    assert [file.name for file in tmp_path.iterdir()] == ["new"]


def test_a_folder_in_use_is_not_touched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists already; remove it or choose another name"):
        checkpoint.initialize("vita_tiny", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    with checkpoint.new_folder(tmp_path / "empty") as new:
        (new / "file").write_text("")
    assert (tmp_path / "empty" / "file").exists()


def test_initialize_words(tmp_path):
    config = checkpoint.initialize(
        "vita_tiny", tmp_path / "a", 1, ["llm.num_layers=1", "max_tokens=99"], dtype="bfloat16"
    )
    assert (config.llm.num_layers, config.max_tokens) == (1, 99)
    assert load_file(tmp_path / "a" / "llm.safetensors")["head"].dtype == ml_dtypes.bfloat16
    loaded, params = checkpoint.load(tmp_path / "a", dtype="bfloat16")
    assert loaded.llm == dataclasses.replace(config.llm, dtype="bfloat16")
    drawn = trees.flatten(vita.init_params(config, 1))["llm/head"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(params["llm"]["head"]), drawn)


@pytest.mark.parametrize(
    "preset, kwargs, words",
    [
        ("vita_9b", {}, "vita_9b.*vita_7b, vita_nano, vita_tiny"),
        ("vita_tiny", {"overrides": ["llm.depth=2"]}, "unknown key 'llm.depth'"),
        ("vita_tiny", {"dtype": "int8"}, "dtype='int8'.*float32, bfloat16 or float16"),
        ("vita_tiny", {"overrides": ["llm.vocab_size=100"]}, "ids go up to .*vocab_size is 100"),
        ("vita_7b", {}, "vita_7b needs Qwen2's tokenizer.*--tokenizer DIR"),
    ],
)
def test_initialize_refuses(tmp_path, preset, kwargs, words):
    with pytest.raises(ValueError, match=words) as error:
        checkpoint.initialize(preset, tmp_path / "new", **kwargs)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_initialize_with_a_tokenizer_from_a_folder(folder, tmp_path):
    config = dataclasses.replace(vita_7b(), **{
        part: getattr(vita_tiny(), part) for part in ("vision", "audio", "llm", "speech", "codec")
    })  # fmt: skip
    assert config.name == "vita_7b"
    checkpoint.initialize(config, tmp_path / "new", tokenizer=folder)
    assert Tokenizer.load(tmp_path / "new").vocab_size == byte_tokenizer().vocab_size


def change(file, edit):
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def test_every_misfit_is_in_one_error(copy):
    def spoil(llm):
        del llm["blocks/mlp/gate"]
        llm["blocks/mlp/gates"] = np.zeros((2, 3), np.float32)
        llm["norm/scale"] = llm["norm/scale"][:-1]

    change(copy / "llm.safetensors", spoil)
    change(
        copy / "vision.safetensors", lambda v: v.update({"projector/up_bias": np.zeros(64, int)})
    )
    with pytest.raises(ValueError, match="4 tensors:") as error:
        checkpoint.load(copy)
    for line in (
        "missing: llm/blocks/mlp/gate [2, 64, 128]",
        "extra: llm/blocks/mlp/gates [2, 3]",
        "llm/norm/scale: expected shape [64], found [63]",
        "vision/projector/up_bias: expected F32, F16, BF16, found I64",
    ):
        assert line in str(error.value)
    assert str(copy) in str(error.value)


def test_one_missing_tensor_is_one_line(copy):
    change(copy / "speech.safetensors", lambda speech: speech.pop("head_bias"))
    with pytest.raises(ValueError, match=r"missing: speech/head_bias \[68\]") as error:
        checkpoint.load(copy)
    assert "\n" not in str(error.value)


def test_load_refuses_other_dtypes(folder):
    with pytest.raises(ValueError, match="dtype='float64': expected float32, bfloat16 or float16"):
        checkpoint.load(folder, dtype="float64")


def test_load_refuses_what_is_not_a_checkpoint(copy, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        checkpoint.load(tmp_path / "nowhere")

    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"colour": "blue"}))
    with pytest.raises(ValueError, match="config.json: unknown config key 'colour'"):
        checkpoint.load(copy)
    config["llm"]["vocab_size"] = 100
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="vocab_size is 100; use the tokenizer that belongs"):
        checkpoint.load(copy)
    config["llm"]["vocab_size"] = vita_tiny().llm.vocab_size
    (copy / "config.json").write_text(json.dumps(config))

    whole = (copy / "audio.safetensors").read_bytes()
    (copy / "audio.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="audio.safetensors: not a whole safetensors file"):
        checkpoint.load(copy)
    (copy / "audio.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="audio.safetensors: no such file"):
        checkpoint.load(copy)
    (copy / "audio.safetensors").write_bytes(whole)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        checkpoint.load(copy)


def test_a_tokenizer_of_another_model_is_refused(copy):
    load_bundled("vita_nano").save(copy)
    with pytest.raises(ValueError, match="ids go up to .*llm.vocab_size is 320"):
        checkpoint.load(copy)


def test_save_refuses_params_of_another_config(tmp_path):
    config = vita_tiny()
    params = vita.init_params(config, 0)
    del params["llm"]["norm"]
    with pytest.raises(ValueError, match="missing: llm/norm/scale"):
        checkpoint.save(tmp_path / "new", config, params, byte_tokenizer(), PROVENANCE, "none")
    assert list(tmp_path.iterdir()) == []
