"""vita_jax/train.py and train_state.py: every stage file, killed and resumed, on any mesh."""

import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import vita_jax
from vita_jax import checkpoint, cli, train_state
from vita_jax import params as trees
from vita_jax import train as loop
from vita_jax.config import load_config, to_json
from vita_jax.data import synthetic
from vita_jax.models.vita import init_params
from vita_jax.train import train

ROOT = pathlib.Path(vita_jax.__file__).parents[1]
STAGES = sorted(path.stem for path in (ROOT / "configs").glob("stage*.py"))
SMALL = ("mesh=[1,1,1]", "data.batch_size=2", "data.max_tokens=480", "num_steps=4", "save_every=2")


def stage(name, *overrides):
    return load_config(ROOT / "configs" / f"{name}.py", overrides, tiny=True)


def run(workdir, *overrides, name="stage0_text"):
    """Trains; the lines of metrics."""
    train(stage(name, *SMALL, *overrides), workdir)
    return lines_of(workdir)


def lines_of(workdir):
    file = workdir / "metrics.jsonl"
    return [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []


def weights(folder):
    """{path: array} of a checkpoint folder."""
    _, files = checkpoint.open_folder(folder)
    return {
        f"{part}/{name}": checkpoint.read(file, name)
        for part, file in files.items()
        for name in checkpoint.header(file)
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of the text stage that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    run(workdir)
    return workdir


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_runs_and_learns(name, tmp_path):
    config = stage(name, "mesh=[1,1,1]", "data.batch_size=4", "num_steps=16")
    train(config, tmp_path)
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 17))
    losses = [line["loss"] for line in lines]
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    start = trees.flatten(init_params(config.model, config.seed))
    end = weights(tmp_path / "model")
    trained = set(trees.flatten(trees.split(trees.unflatten(start), config.trainable)[0]))
    moved = {path for path in start if not np.array_equal(start[path], end[path])}
    assert moved <= trained  # what is frozen stays, to the bit
    still = {path for path in trained - moved if "subsampling" not in path}
    assert not still, still


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_fits_its_model(name):
    config = load_config(ROOT / "configs" / f"{name}.py")
    paths = train_state.trees.flatten(train_state.vita.param_shapes(config.model))
    trained = trees.match(config.trainable, paths)
    trees.match(tuple(config.optim.rates), trained)
    assert config.data.max_tokens <= config.model.llm.max_positions


def test_metrics_and_files(whole):
    lines = lines_of(whole)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"loss", "accuracy", "learning_rate", "tokens_per_s", "data_wait"} <= set(lines[0])
    assert json.loads((whole / "config.json").read_text())["num_steps"] == 4
    provenance = json.loads((whole / "model" / "provenance.json").read_text())
    assert provenance["trained"] and provenance["stage"]["trainable"] == ["llm/.*"]
    train(stage("stage0_text", *SMALL), whole)  # is over, so nothing happens
    assert lines_of(whole) == lines


def test_the_model_talks(whole):
    reply = vita_jax.load(whole / "model", dtype="float32").chat("1 + 1 = ?", max_new_tokens=4)
    assert reply.seen.num_text_tokens > 100


def saved(workdir, step):
    """State and loader state of a save, arrays as bytes."""
    import orbax.checkpoint as ocp

    manager = ocp.CheckpointManager((workdir / "saves").absolute())
    args = ocp.args.Composite(state=ocp.args.StandardRestore(), loader=ocp.args.JsonRestore())
    held = manager.restore(step, args=args)
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(held.state)], held.loader


def start(workdir, *overrides):
    """The stage in a process of its own."""
    command = [sys.executable, "-m", "vita_jax", "train", "configs/stage0_text.py", "--tiny"]
    command += ["--workdir", str(workdir), *SMALL, *overrides]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ)


def wait_for(process, workdir, step):
    """Waits until a line of `step` is written."""
    while not any(line["step"] >= step for line in lines_of(workdir)):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


def test_killed_and_resumed_without_a_trace(tmp_path):
    overrides = ("num_steps=30", "save_every=4")
    run(tmp_path / "whole", *overrides)
    broken = tmp_path / "broken"
    process = start(broken, *overrides)
    wait_for(process, broken, random.randint(5, 10))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    process = start(broken, *overrides)
    wait_for(process, broken, random.randint(13, 18))
    process.send_signal(signal.SIGTERM)
    assert "stopped and saved at step" in process.communicate()[1] and process.returncode == 0
    assert not (broken / "model").exists()
    run(broken, *overrides)

    assert saved(broken, 30) == saved(tmp_path / "whole", 30)
    names = [file.name for file in (broken / "model").glob("*.safetensors")]
    for name in names:
        whole_bytes = (tmp_path / "whole" / "model" / name).read_bytes()
        assert (broken / "model" / name).read_bytes() == whole_bytes
    timeless = [
        [{k: line[k] for k in ("step", "loss", "grad_norm", "targets")} for line in lines_of(x)]
        for x in (tmp_path / "whole", broken)
    ]
    assert timeless[0] == timeless[1] and len(timeless[0]) == 30


def test_next_batches_are_the_same():
    config = stage("stage2_2_audio_sft")
    one = loop.make_loader(config, loop.load_tokenizer(config), None)
    for _ in range(11):
        next(one)
    other = loop.make_loader(config, loop.load_tokenizer(config), None)
    other.restore(json.loads(json.dumps(one.state())))
    for _ in range(3):
        jax.tree.map(np.testing.assert_array_equal, next(one), next(other))
    assert other.epoch == 1


def test_torn_save_is_named_and_the_one_before_used(whole, tmp_path, caplog):
    workdir = tmp_path / "run"
    run(workdir)
    (workdir / "model").rename(tmp_path / "first")
    for file in (workdir / "saves" / "4").rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)
    run(workdir)
    assert "the save of step 4" in caplog.text
    assert lines_of(workdir)[-1]["loss"] == lines_of(whole)[-1]["loss"]
    first, again = weights(tmp_path / "first"), weights(workdir / "model")
    for path, value in first.items():
        np.testing.assert_array_equal(value, again[path])


def test_another_config_in_the_same_folder(whole):
    with pytest.raises(ValueError, match="config.json: seed was 42 and is 1 now"):
        train(stage("stage0_text", *SMALL, "seed=1"), whole)


MESHES = ("[1,1,1]", "[8,1,1]", "[1,8,1]", "[2,2,2]")
ONE_OF_TWO = """
import sys, jax
rank, port, config, workdir = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
from vita_jax.config import TrainConfig, from_json
from vita_jax.train import train
import json
train(from_json(TrainConfig, json.loads(config)), workdir)
"""


def test_losses_agree_on_every_mesh(tmp_path):
    words = "data.batch_size=8", "data.max_tokens=768", "num_steps=3"
    name, losses = "stage1_2_vision_understanding", []
    for mesh in MESHES:
        lines = run(tmp_path / mesh, f"mesh={mesh}", *words, name=name)
        losses.append([line["loss"] for line in lines])

    # And in two processes of four devices each.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    config = json.dumps(to_json(stage(name, *SMALL, "mesh=[2,2,2]", *words)))
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, "-c", ONE_OF_TWO]
    processes = [
        subprocess.Popen([*command, rank, port, config, tmp_path / "two"], cwd=ROOT, env=env)
        for rank in "01"
    ]
    assert [process.wait() for process in processes] == [0, 0]
    losses.append([line["loss"] for line in lines_of(tmp_path / "two")])
    np.testing.assert_allclose(losses[1:], [losses[0]] * 4, rtol=1e-5)


def test_restored_on_another_mesh(tmp_path):
    more = ("data.batch_size=8", "num_steps=4", "save_every=2")
    whole = run(tmp_path / "whole", *more)
    shutil.copytree(tmp_path / "whole" / "saves" / "2", tmp_path / "half" / "saves" / "2")
    shutil.copy(tmp_path / "whole" / "config.json", tmp_path / "half")
    half = run(tmp_path / "half", *more, "mesh=[2,2,2]")
    assert [line["step"] for line in half] == [3, 4]
    np.testing.assert_allclose(
        [line["loss"] for line in half], [line["loss"] for line in whole[2:]], rtol=1e-5
    )


def test_accumulation_is_exact(tmp_path):
    more = ("data.batch_size=4", "num_steps=3")
    at_once = run(tmp_path / "1", *more)
    in_pieces = run(tmp_path / "2", *more, "optim.accumulation=2")
    for a, b in zip(at_once, in_pieces):
        assert a["targets"] == b["targets"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_bfloat16_computes_on_float32_weights(whole, tmp_path):
    lines = run(tmp_path, "dtype=bfloat16", "optim.momentum_dtype=bfloat16")
    for a, b in zip(lines, lines_of(whole)):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.03) and a["loss"] != b["loss"]
    assert weights(tmp_path / "model")["llm/head"].dtype == np.float32


class Spoilt(synthetic.Loader):
    """Batches with NaN from the second one on, as many as `number`."""

    number = 1

    def __next__(self):
        batch = super().__next__()
        bad = 2 <= self._step < 2 + self.number
        return batch.replace(loss_mask=batch.loss_mask * np.float32(np.nan if bad else 1))


def test_non_finite_updates_are_left_out(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(synthetic, "Loader", Spoilt)
    lines = run(tmp_path / "one")
    assert [line["skipped"] for line in lines] == [0, 1, 1, 1]
    assert lines[1]["loss"] is None and np.isfinite(lines[3]["loss"])
    assert lines[2]["learning_rate"] == lines[1]["learning_rate"]  # the schedule waits
    assert "step 2: loss or gradient not finite" in caplog.text
    assert all(np.isfinite(x).all() for x in weights(tmp_path / "one" / "model").values())

    monkeypatch.setattr(Spoilt, "number", 9)
    with pytest.raises(FloatingPointError, match="step 3: .* not finite 2 times in a row"):
        run(tmp_path / "many", "max_skipped=2")
    assert np.load(tmp_path / "many" / "bad_batch.npz")["tokens"].shape == (2, 480)


def test_init_from_takes_folders_by_part(whole, tmp_path):
    other = tmp_path / "other"
    checkpoint.initialize("vita_tiny", other, seed=7)
    words = json.dumps([str(whole / "model"), f"vision/projector/.*={other}"])
    run(
        tmp_path / "run", f"init_from={words}", "data.max_tokens=768", "num_steps=1",
        name="stage1_1_vision_alignment",
    )  # fmt: skip
    model, text, fresh = weights(tmp_path / "run/model"), weights(whole / "model"), weights(other)
    # The first step has rate 0, so even the projector is as it came.
    for path, value in model.items():
        source = fresh if path.startswith("vision/projector/") else text
        np.testing.assert_array_equal(value, source[path])
    licence = (tmp_path / "run" / "model" / "LICENSE.txt").read_text()
    assert "random numbers made by" in licence and "trained with vita_jax" in licence


@pytest.mark.parametrize(
    "words, message",
    [
        (["trainable=vision/.*"], r"'vision/\.\*' matches no parameter; there are .*llm/head"),
        (["trainable=llm/.*", "optim.rates={\"audio/.*\": 2}"], "'audio/.*' matches no parameter"),
        (["init_from=no/folder"], "no/folder: no tokenizer"),
        (["data.batch_size=3", "mesh=[2,1,1]"], "3 rows over data x fsdp = 2: not even"),
        (["data.mixture={\"synthetic:smell\": 1}"], "synthetic:smell: expected one of text"),
        (["objective=gossip"], "objective='gossip': expected one of next_token, ctc"),
        (["data.batch_size=3", "optim.accumulation=2"], "must be a multiple"),
        (["log_every=0"], "at least 1"),
        (["dtype=int8"], "int8"),
    ],
)  # fmt: skip
def test_bad_configs_are_named(words, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(tmp_path, *words)


def test_command_line(tmp_path, capsys):
    def said(*words):
        assert cli.main(["train", *map(str, words), "--workdir", str(tmp_path), "num_steps=1"]) == 2
        return capsys.readouterr().err

    assert "no/stage.py: no such file" in said("no/stage.py")
    (tmp_path / "empty.py").write_text("")
    assert "empty.py: no get_config()" in said(tmp_path / "empty.py")
    text = ROOT / "configs" / "stage0_text.py"
    assert "unknown key 'optim.rate'; valid: learning_rate" in said(text, "optim.rate=1")
    assert "expected float, got 'b'" in said(text, 'data.mixture={"a": "b"}')
    assert "synthetic:... does not mix" in said(
        text, "--tiny", 'data.mixture={"synthetic:text": 1, "data/text": 1}'
    )
    with pytest.raises(SystemExit):
        said(text, "--fast")


def test_weights_of_another_size(tmp_path):
    checkpoint.initialize("vita_tiny", tmp_path / "wide", overrides=["llm.mlp_dim=64"])
    with pytest.raises(ValueError, match=r"(?s)wide: .*llm/blocks/mlp/up: expected shape"):
        run(tmp_path / "run", f"init_from={tmp_path / 'wide'}")


def test_new_parameters_must_train(whole, tmp_path, caplog):
    caplog.set_level("INFO")
    more = (f"init_from={whole / 'model'}", "data.max_tokens=768", "num_steps=1")
    run(tmp_path / "run", *more, name="stage2_1b_speech_adapter")
    assert "drawn at random: audio/prompts" in caplog.text
    with pytest.raises(ValueError, match="missing: audio/prompts"):
        run(tmp_path / "no", *more, "trainable=audio/adapter/.*", name="stage2_1b_speech_adapter")


@pytest.mark.slow
def test_eight_samples_are_learnt(tmp_path, monkeypatch):
    samples = synthetic.samples("captions", 8, seed=3)
    monkeypatch.setattr(synthetic, "samples", lambda kind, number, seed: samples)
    words = ("mesh=[1,1,1]", "num_steps=80", "save_every=80", "optim.learning_rate=4e-3")
    train(stage("stage1_2_vision_understanding", *words, "optim.rates={}"), tmp_path)
    assert lines_of(tmp_path)[-1]["loss"] < 0.05
    engine = vita_jax.load(tmp_path / "model", dtype="float32")
    for sample in samples:
        question, reply = (turn["value"] for turn in sample["conversations"])
        said = engine.chat(
            question.removeprefix("<image>"), [sample["image"]], speak=False, max_new_tokens=40
        )
        assert (said.text, said.state) == (reply, "text_reply")
