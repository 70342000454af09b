"""vita_jax/bench_chat.py, bench_all.py: turns are measured whole; times are not asserted."""

import concurrent.futures
import importlib.util
import json

import numpy as np
import pytest
from PIL import Image, ImageColor

from vita_jax import bench_all, bench_chat, bench_programs, cli, plot
from vita_jax.bench_chat import BUDGET, LISTENING, Question
from vita_jax.bench_programs import Work
from vita_jax.infer import voice

TINY = Work("vita_tiny")
SOUND = 0.1 * np.sin(np.arange(5000) / 7).astype(np.float32)
QUESTIONS = (Question(SOUND, np.full((28, 28, 3), 99, np.uint8), history=20),)


@pytest.fixture(scope="module", autouse=True)
def short_speech():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(voice, "MAX_CODES", 40)
        yield


@pytest.fixture(scope="module")
def engine():
    return bench_chat.engine_of(TINY, num_rows=2)


@pytest.fixture(scope="module")
def report(engine):
    return bench_chat.chat(TINY, QUESTIONS, num_repeats=2, fresh=False, engine=engine)


def test_the_steps_of_a_reply(report):
    assert list(report["budget"]) == BUDGET and report["n"] == 2 and report["silent"] == 0
    for step, row in report["budget"].items():
        figures = row["p50_s"], row["p95_s"], row[LISTENING]
        assert np.isfinite(figures).all() and 0 <= row["p50_s"] <= row["p95_s"], step
        # A picture is seen while the question is asked; sound of which all is encoded, after it.
        assert (row[LISTENING] > 0) == (step in ("vision", "prefill")), step
        assert (row["p50_s"] > 0) == (step not in ("vision", "more text")), step
    for clock in report["clocks"].values():
        assert 0 < clock["p50_s"] <= clock["p95_s"]
    assert report["real_time_factor"] > 0
    assert bench_chat.table(report).row_count == len(BUDGET) + 3
    json.dumps(report)


def test_the_steps_are_drawn(report, tmp_path, capsys):
    (tmp_path / "chat.json").write_text(json.dumps(report))
    picture = tmp_path / "chat.png"
    assert cli.main(["plot", str(tmp_path / "chat.json"), "--out", str(picture)]) == 0
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert pixels.shape == (500, 1600, 3)
    for colour in (plot.QUESTION, plot.MARK, plot.ANSWER):
        assert (pixels == ImageColor.getrgb(colour)).all(axis=-1).any()


def test_users_share_an_engine(engine):
    report = bench_chat.load_of_users(TINY, 2, QUESTIONS, num_turns=1, engine=engine)
    assert [row["users"] for row in report["rows"]] == [1, 2]
    for row in report["rows"]:
        assert np.isfinite(list(row.values())).all() and row["gaps"] >= 0
        assert 0 < row["p50_s"] <= row["p95_s"] and row["replies_per_s"] > 0
        # All codes of a reply are heard: 40 of a second.
        assert row["sound_s_per_s"] == pytest.approx(row["replies_per_s"])


def test_gaps_are_when_sound_ran_out():
    assert bench_chat._gaps([(1.0, 0.5), (1.4, 1.0), (2.4, 1.0)]) == []
    found = bench_chat._gaps([(1.0, 0.5), (2.0, 1.0), (2.9, 1.0), (4.5, 1.0)])
    np.testing.assert_allclose(found, [0.5, 0.5])


def made_up(names, work, *_, **__):
    row = {"of_copy": 0.9, "of_matmul": 0.1, "per_s": 8e3, "p50_s": 0.001, "ratio": 1.5, "note": ""}
    if work.int8:
        row["p50_s"] /= 1.8
    names = ["tile", "clip", *names] if "encode" in names else names
    return {"rows": [{"program": name} | row for name in names]}


def test_bars_of_an_accelerator(monkeypatch, report):
    many = {"rows": [{"p95_s": 0.6, "gaps": 0}]}
    monkeypatch.setattr(bench_programs, "measure", made_up)
    monkeypatch.setattr(bench_chat, "engine_of", lambda work: None)
    monkeypatch.setattr(bench_chat, "chat", lambda *_, **__: report)
    monkeypatch.setattr(bench_chat, "load_of_users", lambda *_: many)
    found = bench_all.run(Work("vita_tiny", dtype="bfloat16"))
    met = {row["what"]: row["met"] for row in found["rows"]}
    assert met["decode, batch 1: share of copy bandwidth"] and met["16 slots: playback gaps"]
    assert not met["16 slots: p95 of the engine clock (s)"]
    (int8,) = [row for row in found["rows"] if "int8" in row["what"]]
    assert int8["value"] == pytest.approx(1.8) and int8["met"]
    assert bench_all.table(found).row_count == 10
    json.dumps(found)


class Here:
    """Stands for a pool of processes."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *args):
        found = concurrent.futures.Future()
        found.set_result(function(*args))
        return found


@pytest.mark.parametrize("torch", [True, False])
def test_bars_of_a_checkpoint(torch, monkeypatch, report):
    whole = report | {"fresh_s": {"empty cache": 9.0, "warm cache": 7.0}}
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: torch or None)
    monkeypatch.setattr(bench_programs, "measure_beside_torch", made_up)
    monkeypatch.setattr(bench_chat, "chat", lambda work: whole)
    monkeypatch.setattr(
        bench_chat, "load_of_users", lambda *_: {"rows": [{"p95_s": 0.6, "gaps": 0}]}
    )
    found = bench_all.run(Work("build/nano"), num_slots=3)
    rows = {row["what"]: row for row in found["rows"]}
    assert rows["codec: PyTorch's time to ours"]["met"] is (torch or None)
    assert bool(rows["codec: PyTorch's time to ours"]["note"]) is not torch
    assert rows["fresh process to first sound, cache warm (s)"]["met"] is False
    assert rows["3 users: playback gaps"]["bar"] is None
    assert {row["where"] for row in found["rows"]} == {"2 CPU cores"}
    json.dumps(found)


def test_an_hour_is_told_in_tenths():
    found = bench_chat.hour(TINY, QUESTIONS[:1], minutes=0.6)
    rows = found["rows"]
    ends = [row["minutes"] for row in rows]
    assert len(rows) == 10 and ends == sorted(ends)
    assert 0.6 <= ends[-1] < 0.7
    assert all(end >= 0.06 * (i + 1) for i, end in enumerate(ends))
    assert all(0 < row["p50_s"] <= row["p95_s"] and row["turns"] for row in rows)
    assert rows[-1]["tokens"] > rows[0]["tokens"] > 0 and rows[0]["memory_mb"] > 100
    assert bench_chat.table(found).row_count == 10


def test_an_hour_of_silence_is_refused(monkeypatch):
    silent = bench_chat._Turn(0.0)
    monkeypatch.setattr(bench_chat, "_answered", lambda *args: silent)
    with pytest.raises(ValueError, match="vita_tiny: no reply had sound"):
        bench_chat.hour(TINY, QUESTIONS[:1], 0.1, bench_chat.engine_of(TINY))


def test_commands(monkeypatch, tmp_path, capsys):
    words = ["--dtype", "float32", "--tokens", "20", "--steps", "1", "--out", str(tmp_path)]
    limits = {"copy_bytes_per_s": 1e10, "matmul_flops_per_s": 1e11}
    monkeypatch.setattr(bench_programs, "_limits", lambda dtype: limits)
    assert cli.main(["bench", "decode", "vita_tiny", *words]) == 0
    shown = capsys.readouterr().out
    assert "decode" in shown and "of copy rate" in shown and "GFLOP" in shown and "…" not in shown
    (row,) = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert row["program"] == "decode" and row["p50_s"] > 0

    for missed in (True, False):
        row = {"where": "here", "what": "x", "bar": ">= 1", "value": 1.0, "met": not missed}
        about = {"model": "m", "dtype": "float32", "machine": {"processor": "", "cores": 2}}
        about["machine"]["device"] = "cpu"
        all_rows = {"rows": [row | {"note": ""}]} | about
        monkeypatch.setattr(bench_all, "run", lambda *_, found=all_rows: found)
        assert cli.main(["bench", "all", "vita_tiny", *words]) == missed
        assert ">= 1" in capsys.readouterr().out
    for words, line in (
        (["train"], "name a stage file"),
        (["decode", "llm.num_layers=1"], "name the preset first"),
        (["decode", "nowhere"], "nowhere/config.json"),
    ):
        assert cli.main(["bench", *words]) == 2 and line in capsys.readouterr().err


@pytest.mark.slow
def test_fresh_processes_reply():
    found = bench_chat._fresh_processes(TINY, QUESTIONS[0])
    assert list(found) == ["empty cache", "warm cache"] and min(found.values()) > 0
