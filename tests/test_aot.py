"""Compiling for a pod: what is asked for, what goes into the step, and what the compiler says."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from vita_jax import aot, cli
from vita_jax import config as configs
from vita_jax import params as trees
from vita_jax.models import vita
from vita_jax.sharding import batch_sharding, make_mesh

ROOT = pathlib.Path(__file__).parents[1]
STAGES = ROOT / "configs"


@pytest.mark.parametrize(
    "words, message",
    [
        ("v5e", "expected one of v4, v5e, v5p, v6e.*v5e:16x16"),
        ("v9:2x2", "expected one of v4"),
        ("v5p-128", "v5p:4x4x4 .64 chips"),
        ("v5e:0x4", "expected one of"),
        ("v5p:4x4", "v5p has 3 axes"),
    ],
)
def test_bad_pods_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        aot.pod(words)


def test_missing_compiler_is_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    stage = str(STAGES / "stage0_text.py")
    assert cli.main(["train", stage, "--compile-for", "v5e:2x2"]) == 2
    assert "pip install 'vita_jax[tpu-aot]'" in capsys.readouterr().err
    assert cli.main(["train", stage]) == 2
    assert "--workdir" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, tiles, clips",
    [
        ("stage0_text", False, False),
        ("stage1_1_vision_alignment", True, False),
        ("stage2_1a_speech_encoder", False, True),
        ("stage2_1b_speech_adapter", False, True),
        ("stage2_2_audio_sft", True, True),
    ],
)
def test_batch_is_that_of_the_stage(name, tiles, clips):
    config = configs.load_config(STAGES / f"{name}.py", ["data.batch_size=8", "data.max_tiles=3"])
    batch = aot.batch_shapes(config, batch_sharding(make_mesh(), 8))
    assert batch.tokens.shape == batch.loss_mask.shape == (8, config.data.max_tokens)
    assert (batch.tiles is not None, batch.audio is not None) == (tiles, clips)
    if tiles:
        assert batch.tiles.shape == (8, 3, 448, 448, 3) and batch.tile_mask.shape == (8, 3)
    if clips:
        assert batch.audio.shape == (*batch.audio_mask.shape, 80)
        assert batch.audio_mask.shape == (8, config.data.max_clips, config.data.max_audio_frames)
    assert {leaf.sharding.shard_shape(leaf.shape)[0] for leaf in jax.tree.leaves(batch)} == {1}


def test_report(monkeypatch, capsys):
    sizes = {"arguments": 2 << 30, "outputs": 0, "temporaries": 3 << 30, "code": 0}
    about = {"topology": "v5e:2x2", "mesh": (1, 4, 1), "rows": 2.0, "hbm": 16 * 2.0**30}
    good = aot.Report(**about, **sizes, total=5 << 30, seconds=7)
    assert good.fits and "fits: 11.00 GiB to spare" in str(good)
    bad = aot.Report(**about, total=20 << 30, seconds=7, refusal="Ran out of memory")
    assert not bad.fits and "does not fit: 4.00 GiB short" in str(bad) and "Ran out" in str(bad)
    for report, code in ((good, 0), (bad, 1)):
        monkeypatch.setattr(aot, "compile_for", lambda config, pod, report=report: report)
        stage = str(STAGES / "stage0_text.py")
        assert cli.main(["train", stage, "--compile-for", "v5e:2x2"]) == code
        assert str(report) in capsys.readouterr().out


def compiled(*words):
    """The numbers of a report, from a process of its own; needs the extra `tpu-aot`."""
    code = (
        "import dataclasses, json, sys\n"
        "from vita_jax import aot, config\n"
        "stage, pod, *words = sys.argv[1:]\n"
        "report = aot.compile_for(config.load_config(stage, words, tiny=True), pod)\n"
        "print(json.dumps(dataclasses.asdict(report)))\n"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "TPU_"))}
    run = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env=clean, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.slow
def test_compiles_for_a_pod():
    stage = STAGES / "stage1_2_vision_understanding.py"
    wide = [
        "llm.vocab_size=4096", "llm.embed_dim=512", "llm.head_dim=128", "llm.mlp_dim=2048",
        "vision.out_dim=512", "audio.out_dim=512", "speech.embed_dim=128",
    ]  # fmt: skip
    words = [f"model.{word}" for word in wide] + ["dtype=bfloat16"]
    report = compiled(str(stage), "v5e:2x2", *words)
    shapes = vita.param_shapes(configs.load_config(stage, words, tiny=True).model)
    numbers = trees.count({part: shapes[part] for part in ("vision", "llm")})
    # Parameters and two moments, float32, over four chips; the compiler pads small arrays.
    assert numbers * 12 / 4 == pytest.approx(report["arguments"], rel=0.05)
    assert report["mesh"] == [1, 4, 1] and report["rows"] == 2
    assert min(report["temporaries"], report["code"], report["seconds"]) > 0
    assert report["outputs"] < 0.01 * report["arguments"]  # the state takes its own place
    sizes = ("arguments", "outputs", "temporaries", "code")
    assert report["total"] == sum(report[name] for name in sizes) < report["hbm"]


@pytest.mark.slow
def test_says_what_does_not_fit():
    words = ["data.batch_size=4096", "loss_chunk=4096", "model.llm.vocab_size=65536"]
    report = compiled(str(STAGES / "stage0_text.py"), "v5e:2x2", *words)
    assert report["total"] > report["hbm"] and "emory" in report["refusal"]
