"""vita_jax/bench.py: that the right things are measured; times themselves are not asserted."""

import functools

import numpy as np
import pytest
from runs import ROOT, stage

from vita_jax import bench
from vita_jax.batch import AUDIO_TOKEN, IMAGE_TOKEN
from vita_jax.config import load_config

TEXT = "mesh=[1,1,1]", "data.batch_size=2", "data.max_tokens=128"


@pytest.mark.parametrize("name", ["stage1_2_vision_understanding", "stage2_2_audio_sft"])
def test_a_batch_is_full(name):
    config = stage(name, "data.max_tokens=256", "data.max_tiles=3")
    batch = bench.full_batch(config)
    assert (batch.segment_ids > 0).all() and (batch.segment_ids.max(axis=1) == 4).all()
    tiles = 3 * config.model.vision.embeddings_per_tile
    clips = config.model.audio.num_embeddings(128) if "audio" in name else 0
    assert ((batch.tokens == IMAGE_TOKEN).sum(axis=1) == tiles).all()
    assert ((batch.tokens == AUDIO_TOKEN).sum(axis=1) == clips).all()
    assert (batch.loss_mask.sum(axis=1) == 256 - tiles - clips).all()
    assert batch.tile_mask.all() and (batch.audio is None or batch.audio_mask.all())
    with pytest.raises(ValueError, match="lower data.max_tiles=3"):
        bench.full_batch(stage(name, "data.max_tokens=20", "data.max_tiles=3"))


def test_the_step(monkeypatch):
    monkeypatch.setattr(bench, "WARM_UP", 1)
    figures = bench.train(stage("stage0_text", *TEXT), num_steps=2)
    assert figures["tokens_per_s"] * figures["seconds"] == pytest.approx(256)
    share = figures["model_tflops"] / figures["matmul_tflops"]
    assert figures["mfu"] == pytest.approx(share) and 0 < share < 1


def test_the_loader():
    figures = bench.data(stage("stage0_text", *TEXT, "data.max_tokens=480"), 3, step_s=0.2)
    assert figures["seconds"] >= 0.2 and 0 <= figures["data_wait"] < 1
    assert figures["samples_per_s"] * figures["seconds"] == pytest.approx(2)


def maker(number):
    """What `race` makes things to time of: they count their calls."""
    if not number:
        raise ValueError("nothing to time")
    calls = []
    return lambda: calls.append(0), lambda: number + len(calls)


def test_a_race(monkeypatch):
    monkeypatch.setattr(bench, "WARM_UP", 1)
    makers = [functools.partial(maker, number) for number in (1, 0, 5)]
    first, second, third = bench.race(makers, 2, 1)
    assert isinstance(second, ValueError) and str(second) == "nothing to time"
    for (answer, seconds), number in ((first, 1), (third, 5)):
        assert answer == number + 1 and len(seconds) == 2 and min(seconds) >= 0


def test_the_peer_trains_an_llm():
    with pytest.raises(ValueError, match="take stage 0, 3.1 or 3.2"):
        bench.train_beside_torch(stage("stage1_1_vision_alignment"))


def test_seconds_of_speech():
    for name, words, seconds in (
        ("stage3_1_codec", ["data.max_tokens=8"], 8 * 8 / 40),
        # Two utterances a row, a quarter of each text; BOS, and SOS beside it.
        ("stage3_2_speech_decoder", ["data.max_tokens=128"], 8 * 2 * (64 - 18) / 40),
    ):
        config = stage(name, *words)
        batch = bench.full_batch(config, segments=2)
        assert bench.speech_s(config, batch) == pytest.approx(seconds)
    eos = batch.tokens == config.model.speech.eos_id
    assert (eos.sum(axis=1) == 2).all() and eos[:, [63, 127]].all()
    assert bench.speech_s(stage("stage0_text"), batch) == 0


@pytest.mark.peer
@pytest.mark.parametrize(
    "name, words",
    [
        ("stage0_text", ["data.max_tokens=64", "model.llm.num_layers=2"]),
        ("stage3_1_codec", ["data.max_tokens=4", "model=vita_tiny", "discriminator_channels=4"]),
        ("stage3_2_speech_decoder", ["data.max_tokens=64", "model=vita_tiny", "dtype=float32"]),
    ],
)
def test_the_peer_does_the_same(name, words, monkeypatch):
    monkeypatch.setattr(bench, "WARM_UP", 1)
    words = "mesh=[1,1,1]", "data.batch_size=2", "init_from=[]", *words
    config = load_config(ROOT / "configs" / f"{name}.py", words)
    figures = bench.train_beside_torch(config, num_steps=2)
    np.testing.assert_allclose(figures["our_loss"], figures["torch_loss"], rtol=1e-4)
    assert figures["ratio"] == figures["torch_s"] / figures["ours_s"]
