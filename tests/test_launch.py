"""launch/: that the scripts start what they should. The programs they start are stand-ins here."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from vita_jax import cli
from vita_jax.config import load_config

ROOT = Path(__file__).parent.parent
STAND_IN = """#!/bin/sh
printf '%s\\0' "$@" >> commands; printf '\\n' >> commands
if [ "$1 $2" = "data starter" ]; then mkdir -p "$4"; fi
while [ $# -gt 1 ]; do if [ "$1" = --workdir ]; then mkdir -p "$2/$MADE"; fi; shift; done
"""


@pytest.fixture
def commands(tmp_path):
    """A function that runs all_stages.sh in a copy of launch/ and returns what it started, when
    every stage leaves `made` in its folder.
    """
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("vita", "pip"):
        path = tmp_path / ".venv" / "bin" / name
        path.write_text(STAND_IN)
        path.chmod(0o755)
    for installed in (tmp_path / "setup.cfg", tmp_path / ".venv" / "installed[data]"):
        shutil.copy(ROOT / "setup.cfg", installed)

    def run(*arguments, made="model", status=0):
        script = ["bash", str(tmp_path / "launch" / "all_stages.sh"), *arguments]
        environment = {**os.environ, "MADE": made}
        assert subprocess.run(script, capture_output=True, env=environment).returncode == status
        if not (tmp_path / "commands").exists():
            return []
        lines = (tmp_path / "commands").read_text().splitlines()
        (tmp_path / "commands").unlink()
        return [line.split("\0")[:-1] for line in lines]

    return run


def check_order(stages):
    """Each stage starts from models of stages before it; no stage is missing."""
    made = set()
    for args, config in stages:
        sources = {word.rpartition("=")[2] for word in config.init_from}
        assert sources <= made | {"checkpoints/parts"} and (sources or "stage0" in args.config)
        made.add(f"{args.workdir}/model")
    return [Path(args.config).name for args, _ in stages]


def with_tokens_before_the_last(commands, runs, data):
    """The commands that train; codec tokens are made of speech, and of what is held out, between
    the last two.
    """
    *trains, tokens, held_out, last = commands
    start = ["data", "codec-tokens", f"{runs}/s3_1/model"]
    assert tokens == [*start, f"{data}/speech", f"{data}/codec_tokens"]
    assert held_out == [*start, f"{data}/held_out/speech", f"{data}/held_out/codec_tokens"]
    return [*trains, last]


def load(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    args = cli.parse(words)
    return args, load_config(args.config, args.overrides, args.tiny)


def test_all_stages_tiny(commands, monkeypatch):
    made, *others = commands("--tiny")
    assert made == ["data", "starter", "tests/data/speech", "build/all_stages/data"]
    *trains, chat, plot = others
    trains = with_tokens_before_the_last(trains, "build/all_stages/runs", "build/all_stages/data")
    stages = [load(words, monkeypatch) for words in trains]
    files = sorted(path.name for path in (ROOT / "configs").glob("stage*.py"))
    assert check_order(stages) == files
    for args, config in stages:
        assert config.model.name == "vita_tiny"
        whole = load_config(args.config)
        names = {name.replace("build/all_stages/", "") for name in config.data.mixture}
        assert names == set(whole.data.mixture)
        held_out = tuple(name.replace("build/all_stages/", "") for name in config.data.held_out)
        assert held_out == whole.data.held_out
        assert config.data.spoken_share == whole.data.spoken_share
    chat = cli.parse(chat)
    assert chat.checkpoint == stages[-1][0].workdir + "/model" and Path(ROOT, chat.audio).is_file()
    assert chat.out and cli.parse(plot).falling
    workdirs = [args.workdir + "/" for args, _ in stages]
    assert plot == ["plot", *workdirs, "--out", "build/all_stages/curves.png", "--falling"]
    assert commands("--tiny") == others  # the data are there


def test_all_stages(commands, monkeypatch):
    *trains, chat = commands()
    trains = with_tokens_before_the_last(trains, "runs", "data")
    stages = [load(words, monkeypatch) for words in trains]
    files = sorted(path.name for path in (ROOT / "configs").glob("stage[123]*.py"))
    assert check_order(stages) == files
    assert not any(args.tiny or args.overrides for args, _ in stages)
    chat = cli.parse(chat)
    assert chat.checkpoint == stages[-1][0].workdir + "/model"
    assert Path(ROOT, chat.audio).is_file() and Path(ROOT, chat.image[0]).is_file()


@pytest.mark.parametrize("words", [("--tiny",), ()])
def test_a_stage_that_was_stopped_is_the_last(commands, words):
    """`vita train` saves and exits 0 when it is told to stop; there is no model then."""
    assert len([c for c in commands(*words, made="saves", status=1) if c[0] == "train"]) == 1


def test_other_words_are_refused(commands):
    assert commands("--small", status=2) == commands("--tiny", "x", status=2) == []


def test_demo_takes_the_shipped_model_where_there_is_one(commands, tmp_path):
    shutil.copy(ROOT / "setup.cfg", tmp_path / ".venv" / "installed")

    def started():
        script = ["bash", str(tmp_path / "launch" / "demo.sh")]
        printed = subprocess.run(script, capture_output=True, check=True, text=True).stdout
        lines = (tmp_path / "commands").read_text().splitlines()
        (tmp_path / "commands").unlink()
        return printed, [cli.parse(line.split("\0")[:-1]) for line in lines]

    printed, (init, demo) = started()
    assert "random weights" in printed and init.preset == "vita_nano"
    assert demo.verb == "demo" and demo.checkpoint == init.target

    shipped = tmp_path / "vita_jax" / "checkpoints" / "nano"
    shipped.mkdir(parents=True)
    (shipped / "config.json").touch()
    printed, (demo,) = started()
    assert printed == "" and demo.verb == "demo"
    assert tmp_path / demo.checkpoint == shipped and str(cli.SHIPPED).endswith(demo.checkpoint)


def test_bench_gpu(commands, tmp_path):
    def started(*words):
        script = ["bash", str(tmp_path / "launch" / "bench_gpu.sh"), *words]
        environment = {**os.environ, "PYTHON": str(tmp_path / ".venv" / "bin" / "vita")}
        subprocess.run(script, capture_output=True, check=True, env=environment)
        lines = (tmp_path / "commands").read_text().splitlines()
        (tmp_path / "commands").unlink()
        return [cli.parse(line.split("\0")[2:-1]) for line in lines]

    for words, model in (((), "vita_7b"), (("vita_tiny",), "vita_tiny")):
        (table,) = started(*words)
        assert (table.what, table.model, table.dtype) == ("all", model, "bfloat16")
    first, full, dots = started("train")
    assert first.what == "train" and Path(ROOT, first.model).is_file()
    assert (full.overrides[-1], dots.overrides[-1]) == ("remat=full", "remat=dots")
