"""vita_jax/train.py and what it is made of: every stage file, on any mesh."""

import json
import os
import resource
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from runs import ROOT, SMALL, STAGES, lines_of, run, saved, stage, weights

import vita_jax
from vita_jax import checkpoint, cli, feed, train_state
from vita_jax import params as trees
from vita_jax import train as loop
from vita_jax.config import load_config, to_json
from vita_jax.data import synthetic
from vita_jax.models.vita import Vita, init_params
from vita_jax.train import train


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of the text stage that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    run(workdir)
    return workdir


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_runs_and_learns(name, tmp_path):
    # The codec's discriminators take minutes to compile: test_resume.py has them.
    words = ("discriminator_channels=0",) * (name == "stage3_1_codec")
    config = stage(name, "mesh=[1,1,1]", "data.batch_size=4", "num_steps=16", *words)
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
    dead = ("subsampling", "codec/encoder/unused")  # no gradient comes there
    still = {path for path in trained - moved if not any(name in path for name in dead)}
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
    assert {"loss", "error", "exact", "tokens_per_s", "mfu", "data_wait", "seconds"} <= set(
        lines[0]
    )
    assert json.loads((whole / "config.json").read_text())["num_steps"] == 4
    provenance = json.loads((whole / "model" / "provenance.json").read_text())
    assert provenance["trained"] and provenance["stage"]["trainable"] == ["llm/.*"]
    train(stage("stage0_text", *SMALL), whole)  # is over, so nothing happens
    assert lines_of(whole) == lines


def test_validation_is_the_loss_of_held_out_samples(tmp_path):
    config = stage("stage0_text", "mesh=[1,1,1]", "num_steps=2", "data.max_tokens=480")
    train(config, tmp_path)
    (line,) = lines_of(tmp_path, held_out=True)
    params = trees.unflatten(weights(tmp_path / "model"))
    nats, wrong, targets, exact = 0.0, 0, 0, []
    for sample in synthetic.held_out(
        config.data, feed.make_processor(config, feed.load_tokenizer(config))
    ):
        logits = np.asarray(Vita(config.model).apply({"params": params}, sample)[:, :-1])
        mask = sample.loss_mask[:, 1:]
        labels = np.maximum(sample.tokens[:, 1:], 0)
        losses = np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
        missed = (logits.argmax(axis=-1) != labels) & (mask > 0)
        nats, targets = nats + (losses * mask).sum(), targets + mask.sum()
        wrong, exact = wrong + missed.sum(), [*exact, *~missed.any(axis=1)]
    assert line["held_out_loss"] == pytest.approx(nats / targets, rel=1e-5)
    assert line["held_out_error"] == pytest.approx(wrong / targets)
    assert line["held_out_exact"] == np.mean(exact) and len(exact) == 32


def test_the_best_is_kept_and_becomes_the_model(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    losses = iter((3.0, 1.0, np.nan, 2.0))
    scores = {"error": 0.5, "exact": 0.5, "targets": 9}
    monkeypatch.setattr(loop, "validate", lambda *_: {"loss": next(losses), **scores})
    more = ("data.held_out=synthetic:text", "num_steps=8", "validate_every=2", "save_every=3")
    run(tmp_path, *more, "keep=1")
    assert sorted(path.name for path in (tmp_path / "saves").glob("[0-9]*")) == ["4", "8"]
    found = [line["held_out_loss"] for line in lines_of(tmp_path, held_out=True)]
    assert found == [3.0, 1.0, None, 2.0]
    assert "step 4 was the best" in caplog.text and caplog.text.count("(best so far)") == 2
    best, _ = saved(tmp_path, 4)
    assert weights(tmp_path / "model")["llm/head"].tobytes() in best


def test_a_full_disk_is_named_and_the_save_before_used(whole, tmp_path, monkeypatch):
    save, (_, hard) = train_state.Saves.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(self, step, *args):
        if step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        save(self, step, *args)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Make room there"):
        patch.setattr(train_state.Saves, "save", full)
        try:
            run(tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert not (tmp_path / "model").exists()
    lines = run(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [x["loss"] for x in lines] == [x["loss"] for x in lines_of(whole)]


def test_a_trace_of_some_steps(tmp_path):
    train(stage("stage0_text", *SMALL), tmp_path, profile=(2, 3))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.slow
def test_remat_changes_nothing_but_memory(whole, tmp_path):
    for remat in ("full", "none"):
        lines = run(tmp_path / remat, f"remat={remat}")
        for a, b in zip(lines, lines_of(whole), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_the_model_talks(whole):
    reply = vita_jax.load(whole / "model", dtype="float32").chat("1 + 1 = ?", max_new_tokens=4)
    assert reply.seen.num_text_tokens > 100


def test_next_batches_are_the_same():
    config = stage("stage2_2_audio_sft")
    one = feed.make_loaders(config, feed.load_tokenizer(config), None)[0]
    for _ in range(11):
        next(one)
    other = feed.make_loaders(config, feed.load_tokenizer(config), None)[0]
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


def test_saves_without_their_config(tmp_path):
    (tmp_path / "saves/3").mkdir(parents=True)
    config = load_config(ROOT / "configs/nano.py:1_1")
    with pytest.raises(ValueError, match="no config.json to its saves; name another --workdir"):
        loop.keep_config(config, tmp_path)


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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("name, size", [("stage3_1_codec", 4), ("stage3_2_speech_decoder", 128)])
def test_the_voice_learns_the_same_on_a_mesh(name, size, tmp_path):
    """Batch norm and codebooks look at the whole batch, wherever its rows are."""
    words = "data.batch_size=8", f"data.max_tokens={size}", "num_steps=3"
    words += ("discriminator_channels=0",)
    losses = [
        [line["loss"] for line in run(tmp_path / mesh, f"mesh={mesh}", *words, name=name)]
        for mesh in ("[1,1,1]", "[2,2,2]")
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


@pytest.mark.slow
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


NOISY = 'data.mixture={"synthetic:text": 1, "synthetic:noise": 1}'  # classes of unequal weight


STATES = ("model.llm.num_states=3", NOISY)


@pytest.mark.parametrize("words", [(), pytest.param(STATES, marks=pytest.mark.slow)])
def test_accumulation_is_exact(words, tmp_path):
    more = ("data.batch_size=4", "num_steps=3", *words)
    at_once = run(tmp_path / "1", *more)
    in_pieces = run(tmp_path / "2", *more, "optim.accumulation=2")
    for a, b in zip(at_once, in_pieces):
        assert a["targets"] == b["targets"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        for key in {"loss", "state_loss", "state_error"} & set(a):
            assert a[key] == pytest.approx(b[key], rel=1e-5)
    assert ("state_loss" in a) == bool(words)


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


def test_pictures_are_trained_to_be_told_from_all_captions(tmp_path):
    file = tmp_path / "captions.json"
    samples = list(synthetic.samples("captions", 4, 0))
    told = [sample["conversations"][1]["value"] for sample in samples]
    file.write_text(json.dumps([*told, *(f"number {i}" for i in range(60))]))
    words = ["objective=match", "trainable=vision/.*", "data.max_tokens=768", "num_steps=2",
             "optim.accumulation=1", "data.held_out=synthetic:captions"]  # fmt: skip
    loss, held_out = {}, {}
    for name, captions in (("without", []), ("with", [f"data.captions={file}"])):
        folder = tmp_path / name
        loss[name] = run(folder, *words, *captions, name="stage1_1_vision_alignment")[0]["loss"]
        held_out[name] = lines_of(folder, held_out=True)[-1]["held_out_error"]
    assert loss["with"] > loss["without"] + 1  # as there is more to be told apart
    assert held_out["with"] > held_out["without"] + 0.1


@pytest.mark.parametrize(
    "words, message",
    [
        (["trainable=vision/.*"], r"'vision/\.\*' matches no parameter; there are .*llm/head"),
        (["trainable=llm/.*", "optim.rates={\"audio/.*\": 2}"], "'audio/.*' matches no parameter"),
        (["init_from=no/folder"], "no/folder: no tokenizer"),
        (["data.batch_size=3", "mesh=[2,1,1]"], "3 rows over data x fsdp = 2: not even"),
        (["data.mixture={\"synthetic:smell\": 1}"], "synthetic:smell: expected one of text"),
        (["objective=gossip"], "objective='gossip': expected one of next_token, match, ctc"),
        (["data.batch_size=3", "optim.accumulation=2"], "must be a multiple"),
        (["objective=match", "optim.accumulation=2"], "match' cannot be cut"),
        (["log_every=0"], "log_every=0: expected at least 1"),
        (["remat=some"], "remat='some': expected one of full, dots, none"),
        (
            ["data.held_out=synthetic:captions", "data.max_tokens=768"],
            "data.held_out: goes through {'vision'}",
        ),
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
    assert "'here': expected auto or HOST:PORT" in said(text, "--tiny", "--distributed", "here")
    assert "--profile 3: expected two steps" in said(text, "--tiny", "--profile", "3")
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
