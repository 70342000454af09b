"""vita_jax/bench_programs.py: that the right things are measured; times are not asserted."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import linen as nn

from vita_jax import bench, flops
from vita_jax import bench_programs as programs
from vita_jax import params as trees
from vita_jax.bench_programs import Work
from vita_jax.config import vita_7b
from vita_jax.models.vita import boxed_shapes

TINY = Work("vita_tiny", num_tokens=20)


@pytest.fixture(scope="module")
def model():
    """Config and parameters."""
    return programs.model_of(TINY)


def cost(model, name, work=TINY):
    """What is counted, of a program whose call does not fail."""
    program = getattr(programs, name)(*model, work)
    program.call()
    return program.cost


# By hand, of vita_tiny. LLM: attention 64 x 64 twice and 64 x 32 twice, three biases, gated MLP of
# three 64 x 128, two norms; two layers. Speech: four 16 x 16 and three 16 x 32, two norms.
LAYER, HEAD = 12288 + 128 + 24576 + 128, 64 * 320
SPEECH_LAYER, SPEECH_HEAD = 4 * 256 + 3 * 512 + 32, 16 * 68


def test_decode_is_counted(model):
    found = cost(model, "decode")
    seen = 21 + 22 + 23 + 24  # of the cache, by the four tokens
    assert found.bytes == 4 * (4 * (2 * LAYER + HEAD + 64) + seen * 2 * 2 * 2 * 16)
    assert found.flops == 4 * 2 * (2 * (12288 + 24576) + HEAD) + 4 * seen * 2 * 4 * 16


def test_prefill_is_counted(model):
    found = cost(model, "prefill", dataclasses.replace(TINY, num_tokens=600))
    assert found.bytes == 4 * (2 * (2 * LAYER + 64) + 600 * 2 * 2 * 2 * 16)  # two spans
    assert found.flops == 600 * 2 * 2 * (12288 + 24576) + 4 * (600 * 601 // 2) * 2 * 4 * 16


def test_speech_is_counted(model):
    found = cost(model, "speech")
    start = 1 + 16 * 4  # BOS and four pieces a token
    seen = sum(range(start + 1, start + 31))
    block = 2 * (4 * 256 + 3 * 512)
    nar = 64 * block + 4 * 64**2 * 16
    ar = (start + 30) * block + 4 * (start**2 + seen) * 16
    assert found.flops == nar + 2 * ar + 30 * 2 * SPEECH_HEAD
    once, code = 3 * SPEECH_LAYER, 2 * SPEECH_LAYER + SPEECH_HEAD + 68 + 16
    assert found.bytes == 4 * (once + 30 * code + seen * 2 * 2 * 16)


def test_codec_is_counted(model):
    found = cost(model, "codec")
    time, wide = 60, 32
    work, weights = 2 * time * 7 * 32 * wide, 7 * 32 * wide + wide
    for rate, width in ((8, 16), (5, 11), (5, 11), (3, 5)):
        wide //= 2
        work += 2 * time * width * 2 * wide * wide
        weights += width * 2 * wide * wide + wide
        time *= rate
        for kernel in (3, 7):
            work += 4 * 2 * time * kernel * wide**2
            weights += 4 * (kernel * wide**2 + wide)
    work += 2 * time * 7 * wide
    assert found.flops == work
    assert found.bytes == 4 * (weights + 7 * wide + 1 + 60 * 600)


def test_a_7b_model_moves_14_gb_a_token():
    config = vita_7b().with_dtype("bfloat16")
    shapes = nn.unbox(boxed_shapes(config))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "bfloat16"), shapes)
    assert flops.decode_cost(config, shapes, 0, 1).bytes == pytest.approx(14.1e9, rel=0.01)


def test_all_programs_are_measured(monkeypatch):
    limits = {"copy_bytes_per_s": 1e10, "matmul_flops_per_s": 1e11}
    monkeypatch.setattr(programs, "_limits", lambda dtype: limits)
    report = programs.measure(programs.MEASURED, TINY, num_calls=2)
    rows = {row["program"]: row for row in report["rows"]}
    assert list(rows) == ["decode", "prefill", "tile", "clip", "prompt", "speech", "codec"]
    for row in rows.values():
        figures = [x for x in row.values() if not isinstance(x, str)]
        assert np.isfinite(figures).all() and min(figures) > 0, row
        assert row["p50_s"] <= row["p95_s"]
        share = row["bytes"] / row["p50_s"] / report["copy_bytes_per_s"]
        assert row["of_copy"] == pytest.approx(share)
    parts = rows["tile"]["flops"] + rows["clip"]["flops"]
    assert rows["prompt"]["flops"] > parts + rows["prefill"]["flops"]
    assert rows["decode"]["per_s"] * rows["decode"]["p50_s"] == pytest.approx(4)
    assert rows["clip"]["per_s"] * rows["clip"]["p50_s"] == pytest.approx(3.5)
    assert rows["codec"]["per_s"] * rows["codec"]["p50_s"] == pytest.approx(1.5)


def test_clips_go_together(model):
    two = programs.clip(*model, dataclasses.replace(TINY, num_rows=2))
    two.call()
    assert two.amount == 7 and two.cost.flops == 2 * cost(model, "clip").flops
    assert two.answer().shape == (2, model[0].audio.num_embeddings(384), 64)


def test_weights_of_8_bits_move_fewer_bytes(model):
    eight = programs.model_of(dataclasses.replace(TINY, int8=True))
    whole, kept = (trees.flatten(params) for _, params in (model, eight))
    for path, scale in kept.items():
        if path.endswith(".scale"):
            weight = path.removesuffix(".scale")
            assert kept[weight].dtype == np.int8
            error = np.abs(kept[weight] * np.asarray(scale) - whole[weight])
            assert (error <= 0.501 * np.asarray(scale)).all()
    fewer = cost(model, "decode").bytes - cost(eight, "decode").bytes
    # Once a token, of four: three bytes of each weight, less four for each channel's scale.
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + HEAD
    scales = 2 * (64 + 2 * 32 + 64 + 2 * 128 + 64) + 320
    assert fewer == 4 * (3 * weights - 4 * scales)


def test_refusals():
    with pytest.raises(ValueError, match="encode: has no peer; there are decode, prefill"):
        programs.measure_beside_torch(["encode"], TINY)
    with pytest.raises(ValueError, match="only a preset can be overridden"):
        programs.model_of(Work("build/nano", ("llm.num_layers=1",)))


@pytest.mark.peer
@pytest.mark.parametrize("name", programs.PEERS)
def test_the_peer_does_the_same(model, name):
    work = TINY if name == "prefill" else dataclasses.replace(TINY, num_rows=2)
    call, answer = programs.PEERS[name](*model, work, compiled=False)
    ours = getattr(programs, name)(*model, work)
    for _ in range(2):  # from the same state each time
        call(), ours.call()
    assert ours.answer().shape == answer().shape
    assert np.abs(ours.answer() - answer()).max() < 1e-4 * np.abs(answer()).max()


@pytest.mark.peer
@pytest.mark.slow
def test_ratios(monkeypatch):
    monkeypatch.setattr(bench, "WARM_UP", 1)
    report = programs.measure_beside_torch(["codec"], TINY, num_calls=2, num_cores=1)
    (row,) = report["rows"]
    faster = min(row["torch_s"], row["torch_compiled_s"] or np.inf)
    assert row["ratio"] == pytest.approx(faster / row["p50_s"]) and row["error"] < 1e-4
    assert row["torch_compiled_s"] or row["note"].startswith("not compiled: ")
    assert programs.table(report).row_count == 11
