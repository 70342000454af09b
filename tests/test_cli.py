"""vita_jax/cli.py: the verbs, and one clear line with exit code 2 for what cannot work."""

import json
import os
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import PIL.Image
import pytest
import soundfile
from safetensors.numpy import load_file, save_file

from vita_jax import cli
from vita_jax.infer import voice


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    assert cli.main(["init", "vita_tiny", str(folder)]) == 0
    return folder


@pytest.fixture
def files(tmp_path):
    PIL.Image.fromarray(np.arange(30 * 40 * 3, dtype=np.uint8).reshape(30, 40, 3)).save(
        tmp_path / "a.png"
    )
    soundfile.write(tmp_path / "a.wav", 0.1 * np.sin(np.arange(8000) / 9), 16000)
    return tmp_path


def refused(capsys, *words):
    """The one line that `vita WORDS` ends with; it must be the only one and the exit code 2."""
    assert cli.main([str(word) for word in words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "Traceback" not in line
    return line


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for verb in ("chat", "init", "convert", "info"):
        assert f"\n    {verb} " in text
        with pytest.raises(SystemExit):
            cli.main([verb, "--help"])


def test_chat_writes_reply_and_timeline(checkpoint, files, capsys, monkeypatch):
    monkeypatch.setattr(voice, "MAX_CODES", 30)
    words = [
        "chat",
        checkpoint,
        "--image",
        files / "a.png",
        "--audio",
        files / "a.wav",
        "--text",
        "What?",
    ]
    words += [
        "--out",
        files / "reply.wav",
        "--max-new-tokens",
        "30",
        "--temperature",
        "2",
        "--dtype",
        "float32",
    ]
    assert cli.main([str(word) for word in words]) == 0
    out = capsys.readouterr().out
    for part in (
        "untrained",
        "seen:   ",
        "heard:  48 frames",
        "state:",
        "first token",
        "first sound",
    ):
        assert part in out
    samples, rate = soundfile.read(files / "reply.wav")
    assert rate == 24000 and len(samples) and np.abs(samples).max() > 0
    assert PIL.Image.open(files / "reply.png").size == (1600, 500)


def test_interactive_remembers(checkpoint, files, capsys, monkeypatch):
    lines = iter(
        [
            "Hello",
            f"/image {files / 'a.png'}",
            "/image",
            "What is it?",
            "/image nowhere.png",
            "And?",
            "/quit",
        ]
    )
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert cli.main(["chat", str(checkpoint), "--interactive", "--max-new-tokens", "3"]) == 0
    out, err = capsys.readouterr()
    read = [int(line.split()[1]) for line in out.splitlines() if line.startswith("read:")]
    assert len(read) == 2 and read[1] > read[0]
    assert "nowhere.png" in err and "/image: expected /image F" in out


def test_a_fresh_process_finds_what_was_compiled(checkpoint, tmp_path):
    """`vita compile`, then `vita chat` in another process: not one program is compiled there."""
    compiled = tmp_path / "cache"
    environment = os.environ | {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
    }
    code = (
        "import jax, sys; from vita_jax import cli; missed = []; "
        "jax.monitoring.register_event_listener(lambda name, **_: missed.append(name)); "
        "code = cli.main(sys.argv[1:]); "
        "print('missed', sum(name.endswith('/cache_misses') for name in missed)); sys.exit(code)"
    )
    sizes = ["--max-tokens", "700", "--max-new-tokens", "4"]

    def run(*words):
        command = [sys.executable, "-c", code, *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout

    assert str(compiled) in run("compile", str(checkpoint), "--max-audio", "0.3", *sizes)
    assert len(list(compiled.iterdir())) > 20
    assert "missed 0" in run("chat", str(checkpoint), "--text", "Hello", *sizes)


def test_info_of_preset_file_and_folder(checkpoint, capsys):
    for name in ("vita_7b", checkpoint, checkpoint / "config.json"):
        assert cli.main(["info", str(name)]) == 0
    assert "8,322,947,072" in capsys.readouterr().out


def damaged_png(path, size=(40, 30)):
    """A PNG whose header claims `size`, with a right checksum."""
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", *size)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("missing.png", None, "no such "),
        ("empty.png", b"", "empty"),
        ("text.png", b"this is a text file", "not a picture"),
        ("cut.png", lambda f: (f / "a.png").read_bytes()[:-200], "cut"),
        ("zero.png", lambda f: damaged_png(f / "a.png", (0, 0)), "0x0"),
        ("thin.png", lambda f: damaged_png(f / "a.png", (2010, 10)), "200"),
        ("huge.png", lambda f: damaged_png(f / "a.png", (10001, 10001)), "100"),
        ("missing.wav", None, "no such "),
        ("empty.wav", b"", "empty"),
        ("text.wav", b"this is a text file, not a sound", "not"),
        ("cut.wav", lambda f: (f / "a.wav").read_bytes()[:-4000], "cut"),
        ("nothing.wav", lambda f: sound(f, np.zeros(0)), "no samples"),
        ("nan.wav", lambda f: sound(f, np.full(8000, np.nan)), "NaN"),
        ("long.wav", lambda f: sound(f, np.zeros(201 * 16000)), "200"),
        ("missing.mp4", None, "no such "),
        ("text.mp4", b"this is a text file", "not a video"),
        ("sound.mp4", lambda f: (f / "a.wav").read_bytes(), "video"),
    ],
)
def test_bad_files(checkpoint, files, capsys, name, content, expected):
    path = files / name
    if content is not None:
        path.write_bytes(content(files) if callable(content) else content)
    flag = {"png": "--image", "wav": "--audio", "mp4": "--video"}[name.rsplit(".", 1)[1]]
    before = sorted(files.iterdir())
    line = refused(
        capsys, "chat", checkpoint, flag, path, "--text", "What?", "--out", files / "reply.wav"
    )
    assert str(path) in line
    assert expected in line
    assert sorted(files.iterdir()) == before


def sound(folder, samples):
    soundfile.write(folder / "made.wav", samples, 16000, subtype="FLOAT")
    data = (folder / "made.wav").read_bytes()
    (folder / "made.wav").unlink()
    return data


def test_bad_words(checkpoint, files, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "SHIPPED", tmp_path / "none")
    over = refused(capsys, "chat", checkpoint, "--text", "x" * 6200)
    more = refused(capsys, "chat", checkpoint, "--text", "x" * 6212)
    count = [int(line.split(" over the limit of 6200")[0].split()[-1]) for line in (over, more)]
    assert count[1] == count[0] + 12
    line = refused(
        capsys, "chat", checkpoint, "--text", "<image> and <image>", "--image", files / "a.png"
    )
    assert "2 <image>" in line and "1 images" in line
    assert "--interactive" in refused(capsys, "chat", checkpoint)
    assert "vita init" in refused(capsys, "chat", "--text", "Hi")
    assert ".wav" in refused(
        capsys, "chat", checkpoint, "--text", "Hi", "--out", files / "reply.mp3"
    )
    assert "nowhere" in refused(
        capsys, "chat", checkpoint, "--text", "Hi", "--out", files / "nowhere" / "r.wav"
    )
    assert "temperature" in refused(
        capsys, "chat", checkpoint, "--text", "Hi", "--temperature", "-1"
    )
    assert "(data, fsdp, tensor)" in refused(
        capsys, "chat", checkpoint, "--text", "Hi", "--mesh", "2"
    )
    assert "three numbers" in refused(capsys, "chat", checkpoint, "--text", "Hi", "--mesh", "a")
    assert "devices" in refused(capsys, "chat", checkpoint, "--text", "Hi", "--mesh", "99,1,1")
    assert "vita_7b" in refused(capsys, "init", "vita_8b", files / "m")
    assert "depth" in refused(capsys, "init", "vita_tiny", files / "m", "llm.depth=1")
    assert "exists" in refused(capsys, "init", "vita_tiny", checkpoint)
    assert "tokenizer" in refused(capsys, "init", "vita_7b", files / "m")
    assert "preset" in refused(capsys, "info", files / "m")
    assert not (files / "m").exists()


@pytest.fixture
def broken(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "broken")


def test_checkpoint_with_a_tensor_missing(broken, capsys):
    tensors = load_file(broken / "llm.safetensors")
    del tensors["norm/scale"]
    save_file(tensors, broken / "llm.safetensors")
    line = refused_all(capsys, "chat", broken, "--text", "Hi")
    assert "llm/norm/scale" in line and "missing" in line


def test_checkpoint_with_whole_numbers(broken, capsys):
    tensors = load_file(broken / "llm.safetensors")
    tensors["norm/scale"] = tensors["norm/scale"].astype(np.int32)
    save_file(tensors, broken / "llm.safetensors")
    line = refused_all(capsys, "chat", broken, "--text", "Hi")
    assert "llm/norm/scale" in line and "I32" in line


def test_checkpoint_with_an_unknown_key(broken, capsys):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"colour": "red"}))
    assert "colour" in refused(capsys, "chat", broken, "--text", "Hi")


def test_checkpoint_with_another_vocabulary(broken, checkpoint, capsys):
    from vita_jax.data.tokenizer import load_bundled

    load_bundled("vita_nano").save(broken)
    assert "vocab" in refused(capsys, "chat", broken, "--text", "Hi")


def test_folder_that_is_no_checkpoint(files, capsys):
    assert "config.json" in refused(capsys, "chat", files, "--text", "Hi")


def refused_all(capsys, *words):
    """All of what `vita WORDS` says on its way out with exit code 2."""
    assert cli.main([str(word) for word in words]) == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text
