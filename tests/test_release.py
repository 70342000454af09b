"""Published folders in and out: every tensor, byte by byte, in its file; and nothing half-done."""

import dataclasses
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from published import (
    AUDIO,
    BF16,
    INV_FREQ,
    VISION,
    assert_same_bytes,
    audio_settings,
    below,
    cmvn_frames,
    cmvn_stats,
    codec_settings,
    draw,
    in_float32,
    llm_settings,
    mixed,
    refused,
    slots_of,
    speech_settings,
    vision_settings,
    vita_settings,
    write_json,
    write_release,
    write_shards,
    write_yaml,
)
from safetensors.numpy import load_file, save_file

from vita_jax import checkpoint, release, tables
from vita_jax import params as trees
from vita_jax.config import VitaConfig, vita_7b, vita_tiny
from vita_jax.data.tokenizer import Tokenizer, byte_tokenizer
from vita_jax.models import vita

TINY = vita_tiny()


def without_voice(config, name="VITA"):
    return dataclasses.replace(config, name=name, speech=None, codec=None)


@pytest.fixture(scope="module")
def published():
    """All tensors of the main model in mixed dtypes."""
    return mixed(draw(slots_of(TINY, "main")))


@pytest.fixture(scope="module")
def silent(published, tmp_path_factory):
    """The release's folder without the voice, and so without .pt files."""
    folder = tmp_path_factory.mktemp("release") / "VITA"
    write_release(folder, TINY, published)
    return folder


@pytest.fixture
def source(silent, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(silent, tmp_path / "VITA")


@pytest.fixture(scope="module")
def converted(silent, tmp_path_factory):
    target = tmp_path_factory.mktemp("converted") / "vita"
    return target, release.convert(silent, target)


def test_convert(silent, published, converted):
    target, provenance = converted
    config, params = checkpoint.load(target, dtype="float32")
    assert config == without_voice(TINY)
    flat = trees.flatten(params)
    expected = tables.to_params(in_float32(published), slots_of(TINY, "main"))
    assert set(flat) == set(expected)
    for path, value in expected.items():
        np.testing.assert_array_equal(np.asarray(flat[path]), value, err_msg=path)
    stored = load_file(target / "llm.safetensors")
    assert stored["head"].dtype == BF16 and stored["embedding"].dtype == np.float16
    assert stored["blocks/mlp/up"].dtype == np.float32  # one layer bfloat16, one float16
    assert stored["blocks/attn_norm/scale"].dtype == np.float32
    assert Tokenizer.load(target).encode("hello") == byte_tokenizer().encode("hello")
    assert "research" in (target / "LICENSE.txt").read_text()
    for name in ("config.json", "generation_config.json", "audio/train.yaml", "audio/global_cmvn"):
        assert (target / "source" / name).read_bytes() == (silent / name).read_bytes()
    assert not list((target / "source").rglob("*.safetensors"))


def test_provenance(published, converted):
    target, provenance = converted
    assert json.loads((target / "provenance.json").read_text()) == json.loads(
        json.dumps(provenance)
    )
    assert provenance["trained"] is True and provenance["source"] == "VITA"
    assert provenance["set_aside"] == list(INV_FREQ)
    assert provenance["drawn"] == provenance["computed"] == []
    assert set(provenance["tensors"]) == set(published)
    assert provenance["tensors"]["lm_head.weight"]["dtype"] == "BF16"
    assert any("dither=1.0" in note for note in provenance["notes"])


def test_there_and_back(silent, converted, tmp_path):
    back = tmp_path / "back"
    release.to_torch(converted[0], back)
    files = {str(f.relative_to(silent)) for f in silent.rglob("*") if f.is_file()}
    assert {str(f.relative_to(back)) for f in back.rglob("*") if f.is_file()} == files
    for name in files:
        if name.endswith(".safetensors"):
            expected = {n: t for n, t in load_file(silent / name).items() if n not in INV_FREQ}
            assert_same_bytes(load_file(back / name), expected)
            with checkpoint.safe_open(back / name, "np") as file:
                assert file.metadata() == {"format": "pt"}
        elif not name.endswith(".index.json"):
            assert (back / name).read_bytes() == (silent / name).read_bytes()
    index = json.loads((silent / "model.safetensors.index.json").read_text())
    for name in INV_FREQ:
        del index["weight_map"][name]
    assert json.loads((back / "model.safetensors.index.json").read_text()) == index
    release.convert(back, tmp_path / "again")
    for part in ("vision", "audio", "llm"):
        expected = (converted[0] / f"{part}.safetensors").read_bytes()
        assert (tmp_path / "again" / f"{part}.safetensors").read_bytes() == expected


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16], ids=["fp32", "fp16", "bf16"])
def test_one_dtype_there_and_back(source, published, tmp_path, dtype):
    tensors = {name: value.astype(dtype) for name, value in published.items()}
    for file in source.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, source / "model.safetensors")
    release.convert(source, tmp_path / "new")
    for part in ("vision", "audio", "llm"):
        held = load_file(tmp_path / "new" / f"{part}.safetensors")
        assert {value.dtype for value in held.values()} == {np.dtype(dtype)}
    release.to_torch(tmp_path / "new", tmp_path / "back")
    assert_same_bytes(load_file(tmp_path / "back" / "model.safetensors"), tensors)


def test_every_misfit_is_in_one_error(source, published, tmp_path):
    tensors = dict(published)
    del tensors["model.norm.weight"], tensors[VISION + "encoder.layers.1.ls1"]
    tensors["lm_head.bias"] = np.zeros(4, np.float32)
    tensors["model.mm_projector.0.weight"] = np.zeros((4, 5), np.float32)
    tensors["model.embed_tokens.weight"] = np.zeros((320, 64), np.int8)
    write_json(source / "config.json", vita_settings(TINY))
    write_shards(source, tensors)
    with pytest.raises(ValueError, match="5 tensors:") as error:
        release.convert(source, tmp_path / "new")
    for line in (
        "missing: model.norm.weight [64]",
        f"missing: {VISION}encoder.layers.1.ls1 [32]",
        "extra: lm_head.bias [4]",
        "model.mm_projector.0.weight: expected shape [64, 128], found [4, 5]",
        "or 1 where values share a scale; found none",  # of the whole numbers
    ):
        assert line in str(error.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("fills", [0, 1, 60])
def test_interrupted_conversion_leaves_nothing(silent, tmp_path, monkeypatch, fills):
    fill, left = checkpoint.Writer.fill, [fills]

    def stop(self, *args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return fill(self, *args)

    monkeypatch.setattr(checkpoint.Writer, "fill", stop)
    with pytest.raises(KeyboardInterrupt):
        release.convert(silent, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_interrupted_way_back_leaves_nothing(converted, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Writer, "fill", stop)
    with pytest.raises(KeyboardInterrupt):
        release.to_torch(converted[0], tmp_path / "back")
    assert list(tmp_path.iterdir()) == []


def test_unreadable_files_are_named(source, tmp_path):
    train = source / "audio" / "train.yaml"
    train.write_text("input_dim: [80\nmodel_conf: {")
    refused(source, "train.yaml: not YAML", "audio/train.yaml")
    write_yaml(train, audio_settings(TINY))
    shard = source / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    refused(source, "not a whole safetensors file", shard.name)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002.safetensors: no such file"):
        release.convert(source, tmp_path / "new")
    shard.write_bytes(whole)
    (source / "config.json").write_text('{"model_type": ')
    refused(source, "config.json: not JSON", "config.json")


def test_what_is_not_a_published_folder(source, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        release.convert(tmp_path / "nowhere", tmp_path / "new")
    write_json(source / "config.json", {"model_type": "mixtral"})
    refused(source, r"vita-Qwen2 or qwen2.*\(found: mixtral\)", "")
    write_json(source / "config.json", vita_settings(TINY))
    shutil.copytree(source / "audio", source / "audio2")
    refused(source, "audio and .*audio2 hold the same part", "audio2")
    shutil.rmtree(source / "audio2")
    shutil.rmtree(source / "audio")
    refused(source, "no train.yaml of the audio encoder", "")


def test_only_converted_checkpoints_go_back(tmp_path):
    checkpoint.initialize("vita_tiny", tmp_path / "drawn")
    with pytest.raises(ValueError, match="not made by `vita convert`"):
        release.to_torch(tmp_path / "drawn", tmp_path / "back")
    assert [folder.name for folder in tmp_path.iterdir()] == ["drawn"]


def test_a_tokenizer_with_more_ids_than_rows_is_refused(source, published):
    cut = {n: published[n][:200] for n in ("model.embed_tokens.weight", "lm_head.weight")}
    write_shards(source, published | cut)
    refused(source, "ids go up to .*llm.vocab_size is 200", "")


def test_a_folder_in_use_is_not_touched(silent, tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(ValueError, match="exists already"):
        release.convert(silent, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


# What training starts from: Qwen2.5, InternViT and audio-encoder folders side by side.


@pytest.fixture
def plain(published, tmp_path):
    """The folders of training's start; the audio encoder has settings and statistics only."""
    folder = tmp_path / "parts"
    write_json(folder / "Qwen2.5" / "config.json", llm_settings(TINY, "qwen2"))
    byte_tokenizer().save(folder / "Qwen2.5")
    llm = {slot.published for slot in slots_of(TINY, "main") if slot.path.startswith("llm/")}
    write_shards(folder / "Qwen2.5", {name: published[name] for name in llm})
    write_json(folder / "InternViT" / "config.json", vision_settings(TINY))
    save_file(below(published, VISION), folder / "InternViT" / "model.safetensors")
    write_yaml(folder / "audio" / "train.yaml", audio_settings(TINY))
    write_json(folder / "audio" / "global_cmvn", cmvn_stats(cmvn_frames()))
    return folder


def assert_statistics(mean, istd):
    """Those of `cmvn_frames`, but for the bin without variance, whose deviation is a floor."""
    frames = cmvn_frames()
    np.testing.assert_allclose(mean, frames.mean(0), rtol=1e-6)
    live = np.arange(len(mean)) != 3
    np.testing.assert_allclose(istd[live], 1 / frames.std(0)[live], rtol=1e-5)
    assert np.isfinite(istd).all() and istd[3] > 1e4


def test_plain_folders(plain, published, tmp_path, caplog):
    provenance = release.convert(plain, tmp_path / "new", seed=3)
    config, params = checkpoint.load(tmp_path / "new", dtype="float32")
    assert config == without_voice(TINY, "Qwen2.5")
    flat = {path: np.asarray(value) for path, value in trees.flatten(params).items()}
    mean, istd = flat.pop("audio/encoder/cmvn/mean"), flat.pop("audio/encoder/cmvn/istd")
    assert_statistics(mean, istd)
    assert sorted(provenance["computed"]) == ["audio/encoder/cmvn/istd", "audio/encoder/cmvn/mean"]
    expected = tables.to_params(in_float32(published), slots_of(TINY, "main"))
    drawn = trees.flatten(vita.init_params(config, 3))
    read = {path for path in flat if path.startswith(("llm/", "vision/encoder/"))}
    for path, value in flat.items():
        source = expected if path in read else drawn
        np.testing.assert_array_equal(value, source[path], err_msg=path)
    assert set(provenance["drawn"]) == set(flat) - read
    assert "drawn from seed 3: audio/adapter, audio/encoder, vision/projector" in caplog.text

    release.to_torch(tmp_path / "new", tmp_path / "back")
    for file in ("Qwen2.5/model-00001-of-00002.safetensors", "InternViT/model.safetensors"):
        assert_same_bytes(load_file(tmp_path / "back" / file), load_file(plain / file))
    again = (tmp_path / "back" / "audio" / "global_cmvn").read_bytes()
    assert again == (plain / "audio" / "global_cmvn").read_bytes()


def test_plain_folders_need_the_whole_vision_encoder(plain, tmp_path):
    (plain / "InternViT" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"missing: {VISION}embeddings.class_embedding"):
        release.convert(plain, tmp_path / "new")


def test_statistics_in_kaldi_text(plain, tmp_path):
    stats = cmvn_stats(cmvn_frames())
    rows = [*stats["mean_stat"], stats["frame_num"]], [*stats["var_stat"], 0]
    text = " [\n  " + "\n  ".join(" ".join(map(repr, row)) for row in rows) + " ]\n"
    (plain / "audio" / "global_cmvn").write_text(text)
    release.convert(plain, tmp_path / "new")
    stored = load_file(tmp_path / "new" / "audio.safetensors")
    assert_statistics(stored["encoder/cmvn/mean"], stored["encoder/cmvn/istd"])


def test_statistics_of_another_size_or_form(plain):
    file = plain / "audio" / "global_cmvn"
    write_json(file, cmvn_stats(cmvn_frames(40)))
    refused(plain, "holds 40 mel bins, train.yaml says 80", "audio/global_cmvn")
    file.write_text("<Nnet> 80 80")
    refused(plain, "not JSON and not Kaldi's text", "audio/global_cmvn")
    file.unlink()
    with pytest.raises(ValueError, match=r"missing: .*global_cmvn.mean \[80\]"):
        release.convert(plain, plain.parent / "new")


# PyTorch's own files.


def to_tensor(value):
    import torch

    return torch.from_numpy(np.asarray(value, np.float32)).to(getattr(torch, value.dtype.name))


def from_tensors(tensors):
    import torch

    return {
        name: t.view(torch.int16).numpy().view(BF16) if t.dtype is torch.bfloat16 else t.numpy()
        for name, t in tensors.items()
    }


@dataclasses.dataclass
class Whole:
    """The release's folder with the audio encoder's final.pt and the voice, and what is where."""

    folder: Path
    audio: dict  # what final.pt has and the main files have not
    overridden: dict
    speech: dict
    codec: dict


@pytest.fixture
def whole(published, tmp_path):
    import torch

    folder = tmp_path / "VITA"
    write_json(folder / "config.json", vita_settings(TINY))
    byte_tokenizer().save(folder)
    audio = {n: t for n, t in published.items() if ".adpter." in n or "global_cmvn" in n}
    write_shards(folder, {n: t for n, t in published.items() if n not in audio})
    audio = below(audio, AUDIO)

    write_yaml(folder / "audio" / "train.yaml", audio_settings(TINY))
    tensors = {name: to_tensor(value) for name, value in audio.items()}
    older = {n: to_tensor(t) + 1 for n, t in below(published, AUDIO).items() if "norm1" in n}
    others = {"ctc.weight": torch.ones(3), "llm.model.norm.weight": torch.ones(2)}
    torch.save(tensors | older | others, folder / "audio" / "final.pt")

    decoder, codec = folder / "vita_tts_ckpt" / "decoder", folder / "vita_tts_ckpt" / "codec"
    speech = {n: t.astype(BF16) for n, t in draw(slots_of(TINY, "speech"), 1).items()}
    write_json(decoder / "model.json", speech_settings(TINY))
    tensors = {name: to_tensor(value) for name, value in speech.items()}
    prefix = {"layers_prefix.0.mlp.up_proj.weight": torch.ones(2)}
    torch.save({"model": tensors | prefix, "epoch": 3}, decoder / "final.pt")

    sounds = draw(slots_of(TINY, "codec"), 2)
    write_json(codec / "model.json", codec_settings(TINY))
    nested = {key: {} for key in ("generator", "quantizer", "encoder")}
    for name, value in sounds.items():
        key, inner = name.split(".", 1)
        nested[key][inner] = torch.nn.Parameter(to_tensor(value))
    nested["encoder"]["GlobalTokenEncoder.fn.2.num_batches_tracked"] = torch.tensor(5)
    torch.save(nested, codec / "final.pt")
    return Whole(folder, audio, older, speech, sounds)


@pytest.mark.peer
def test_whole_release(whole, published, tmp_path):
    provenance = release.convert(whole.folder, tmp_path / "new")
    config, params = checkpoint.load(tmp_path / "new", dtype="float32")
    assert config.speech == TINY.speech
    assert config.codec == dataclasses.replace(TINY.codec, weight_norm=False)
    flat = {path: np.asarray(value) for path, value in trees.flatten(params).items()}
    expected = tables.to_params(
        in_float32(published), slots_of(TINY, "main")
    )  # not what is overridden
    expected |= tables.to_params(in_float32(whole.speech), slots_of(TINY, "speech"))
    for path, value in expected.items():
        np.testing.assert_array_equal(flat[path], value, err_msg=path)

    direction = whole.codec["generator.ups.1.weight_v"]
    length = np.sqrt((direction**2).sum((1, 2), keepdims=True))
    kernel = (whole.codec["generator.ups.1.weight_g"] * direction / length).transpose(2, 1, 0)
    np.testing.assert_allclose(flat["codec/decoder/ups_1/kernel"], kernel, rtol=1e-5)
    stored = load_file(tmp_path / "new" / "codec.safetensors")
    assert stored["decoder/ups_1/g"].shape == (16,)  # kept apart, as published

    overridden = provenance["overridden"]["audio/final.pt"]
    assert sorted(overridden) == sorted(AUDIO + name for name in whole.overridden)
    assert provenance["set_aside"] == [
        "codec/encoder.GlobalTokenEncoder.fn.2.num_batches_tracked",
        "decoder/epoch",
        "decoder/layers_prefix.0.mlp.up_proj.weight",
        AUDIO + "ctc.weight",
        AUDIO + "llm.model.norm.weight",
    ]


@pytest.mark.peer
def test_whole_release_there_and_back(whole, tmp_path):
    import torch

    back = tmp_path / "back"
    release.convert(whole.folder, tmp_path / "new")
    release.to_torch(tmp_path / "new", back)
    for shard in whole.folder.glob("*.safetensors"):
        assert_same_bytes(load_file(back / shard.name), load_file(shard))
    audio = torch.load(back / "audio" / "final.pt", weights_only=True)
    assert_same_bytes(from_tensors(audio), whole.audio)
    decoder = torch.load(back / "vita_tts_ckpt" / "decoder" / "final.pt", weights_only=True)
    assert list(decoder) == ["model"]
    assert_same_bytes(from_tensors(decoder["model"]), whole.speech)
    codec = torch.load(back / "vita_tts_ckpt" / "codec" / "final.pt", weights_only=True)
    assert set(codec) == {"generator", "quantizer", "encoder"}
    codec = {f"{key}.{name}": t for key, part in codec.items() for name, t in part.items()}
    assert_same_bytes(from_tensors(codec), whole.codec)
    for name in ("config.json", "tokenizer.json", "audio/train.yaml"):
        assert (back / name).read_bytes() == (whole.folder / name).read_bytes()
    for part in ("decoder", "codec"):
        settings = f"vita_tts_ckpt/{part}/model.json"
        assert (back / settings).read_bytes() == (whole.folder / settings).read_bytes()
    release.convert(back, tmp_path / "again")
    for part in checkpoint.PARTS:
        first = (tmp_path / "new" / f"{part}.safetensors").read_bytes()
        assert (tmp_path / "again" / f"{part}.safetensors").read_bytes() == first


@pytest.mark.peer
def test_plain_folders_with_a_trained_audio_encoder(plain, published, tmp_path):
    import torch

    encoder = {n: t for n, t in below(published, AUDIO).items() if n.startswith("encoder.")}
    torch.save({n: to_tensor(t) for n, t in encoder.items()}, plain / "audio" / "final.pt")
    provenance = release.convert(plain, tmp_path / "new")
    drawn = {"/".join(path.split("/")[:2]) for path in provenance["drawn"]}
    assert drawn == {"vision/projector", "audio/adapter"}
    assert provenance["computed"] == []  # the stored statistics count, not the file's
    stored = load_file(tmp_path / "new" / "audio.safetensors")
    assert_same_bytes(
        {"mean": stored["encoder/cmvn/mean"]}, {"mean": encoder["encoder.global_cmvn.mean"]}
    )


@pytest.mark.peer
def test_misfits_of_pt_files_are_listed(whole, tmp_path):
    import torch

    file = whole.folder / "vita_tts_ckpt" / "codec" / "final.pt"
    nested = torch.load(file, weights_only=True)
    del nested["generator"]["conv_post.weight_g"]
    nested["quantizer"]["quantizer_modules2.0.embedding.weight"] = torch.ones(2, 2)
    torch.save(nested, file)
    with pytest.raises(ValueError, match="2 tensors:") as error:
        release.convert(whole.folder, tmp_path / "new")
    assert "missing: codec/generator.conv_post.weight_g [1, 1, 1]" in str(error.value)
    assert "extra: codec/quantizer.quantizer_modules2.0.embedding" in str(error.value)
    assert not (tmp_path / "new").exists()


class Trap:
    """Leaves a file behind when it is unpickled without care."""

    def __init__(self, file):
        self._file = file

    def __reduce__(self):
        return Path.touch, (self._file,)


@pytest.mark.peer
def test_pt_files_that_could_run_code_are_refused(source):
    import torch

    file, sprung = source / "audio" / "final.pt", source.parent / "sprung"
    torch.save({"encoder.weight": Trap(sprung)}, file)
    refused(source, "refused; it holds more than tensors", "audio/final.pt")
    file.write_text("a text file")
    refused(source, "not a whole file of torch.save", "audio/final.pt")
    torch.save([torch.ones(2)], file)
    refused(source, "expected a state dict, found list", "audio/final.pt")
    assert not sprung.exists()


def test_pt_files_without_pytorch(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it fails, as if not installed
    (source / "audio" / "final.pt").write_bytes(b"")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'vita_jax\[convert\]'"):
        release.convert(source, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# Memory.


def one_layer_each() -> VitaConfig:
    """The release's widths, one layer a part."""
    config = vita_7b()
    parts = {
        part: dataclasses.replace(getattr(config, part), num_layers=1)
        for part in ("vision", "audio", "llm")
    }
    return dataclasses.replace(config, **parts, speech=None, codec=None)


@pytest.mark.slow
def test_memory_stays_below_6_gb(tmp_path):
    """3 GB there and back. What is read is a file with holes, so only the copies fill the disk.

    By arithmetic for the rest: a tensor is held as read and as written, one at a time. The largest
    of the whole model, the two tables of the vocabulary, are here as large as with 28 layers.
    """
    config = one_layer_each()
    source = tmp_path / "VITA"
    write_json(source / "config.json", vita_settings(config))
    byte_tokenizer().save(source)
    write_yaml(source / "audio" / "train.yaml", audio_settings(config))
    zero = np.float16(0)
    shapes = {
        s.published: np.broadcast_to(zero, s.published_shape) for s in slots_of(config, "main")
    }
    writer = checkpoint.Writer(source / "model.safetensors", shapes)
    largest = max(np.prod(slot.published_shape) for slot in slots_of(vita_7b(), "main"))
    assert largest == max(value.size for value in shapes.values()) == 152064 * 3584
    program = """
        import resource, sys
        from vita_jax import release
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        start = peak()
        release.convert(sys.argv[1], sys.argv[2])
        there = peak()
        release.to_torch(sys.argv[2], sys.argv[3])
        print(start, there, peak())
    """
    command = [sys.executable, "-c", textwrap.dedent(program), source]
    done = subprocess.run(
        [*command, tmp_path / "new", tmp_path / "back"], check=True, capture_output=True, text=True
    )
    peaks = [int(number) for number in done.stdout.split()]
    print(f"{writer.num_bytes / 1e9:.2f} GB; peak before, there, back: {peaks}")
    assert writer.num_bytes > 2.7e9
    assert max(peaks) < 6e9
    assert (tmp_path / "back" / "model.safetensors").stat().st_size > 2.7e9
    for name in ("new", "back"):
        shutil.rmtree(tmp_path / name)
