"""vita_jax/data/loader.py: the same batches for any processes, workers and restarts; packing;
bad samples.
"""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import soundfile
from PIL import Image

from vita_jax.batch import AUDIO_TOKEN, IMAGE_TOKEN, Batch
from vita_jax.cli import SHIPPED
from vita_jax.config import DataConfig, vita_nano, vita_tiny
from vita_jax.data.loader import Loader, held_out, merge_states
from vita_jax.data.processor import Processor
from vita_jax.data.tokenizer import Tokenizer, byte_tokenizer
from vita_jax.models.vita import Vita, init_params

PROCESSOR = Processor(vita_tiny(), byte_tokenizer())
PER_TILE = vita_tiny().vision.embeddings_per_tile
# Those of conversations: no sample is spoken or a piece of a clip here.
FIELDS = [
    field.name
    for field in dataclasses.fields(Batch)
    if field.name not in ("text", "text_segment_ids", "waveform")
]


def talk(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def write(path, samples):
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures, sounds, and three files of samples: seen, heard and read."""
    root = tmp_path_factory.mktemp("samples")
    (root / "audio").mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        width = 28 * (1 + i % 3)
        Image.fromarray(rng.integers(0, 255, (28, width, 3), np.uint8)).save(root / f"{i}.png")
        noise = 0.1 * rng.standard_normal(16000 + 800 * i)
        soundfile.write(root / "audio" / f"{i}.wav", noise, 16000)
    seen = [
        {"id": i, "image": f"{i % 8}.png", "conversations": talk("<image>\nWhat?", f"No. {i}.")}
        for i in range(20)
    ]
    heard = [
        {"id": i, "audio": f"{i % 8}.wav", "conversations": talk("<audio>", f"Heard {i}.")}
        for i in range(9)
    ]
    read = [{"id": i, "conversations": talk("Hi " * i, "Yes. " * i)} for i in range(1, 30)]
    for name, samples in (("seen", seen), ("heard", heard), ("read", read)):
        write(root / f"{name}.jsonl", samples)
    return root


def settings(folder, **changes):
    mixture = {str(folder / f"{name}.jsonl"): 1.0 for name in ("seen", "heard", "read")}
    values = {
        "mixture": mixture,
        "batch_size": 4,
        "max_tokens": 2600,
        "max_tiles": 8,
        "max_clips": 2,
        "max_audio_frames": 160,
        "num_shards": 8,
    }
    return DataConfig(**(values | changes))


def take(loader, number):
    return [next(loader) for _ in range(number)]


def assert_same(batch, other):
    for name in FIELDS:
        a, b = getattr(batch, name), getattr(other, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), name


def joined(parts):
    """The global batch from those of the processes."""
    return Batch(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in FIELDS})


def conversations(batch):
    """(tokens, positions, loss_mask) of every segment of every row."""
    for row in range(len(batch.tokens)):
        for segment in range(1, batch.segment_ids[row].max() + 1):
            at = batch.segment_ids[row] == segment
            yield batch.tokens[row, at], batch.positions[row, at], batch.loss_mask[row, at]


def answers(batch):
    """The replies in a batch, as texts without state token and end."""
    for tokens, _, mask in conversations(batch):
        yield PROCESSOR.tokenizer.decode(tokens[mask > 0])[1:].removesuffix("<|im_end|>")


# Order


@pytest.mark.parametrize("rows, shards", [(4, 8), (8, 4), (12, 8)])
def test_any_number_of_processes_gives_the_same_batches(folder, rows, shards):
    data = settings(folder, batch_size=rows, num_shards=shards)
    whole = take(Loader(data, PROCESSOR), 4)
    assert whole[0].tokens.shape == (rows, 2600)
    for count in (2, 4):
        loaders = [Loader(data, PROCESSOR, None, p, count) for p in range(count)]
        for batch in whole:
            parts = [next(loader) for loader in loaders]
            assert all(len(part.tokens) == rows // count for part in parts)
            assert_same(joined(parts), batch)


def test_restored_in_the_middle_of_an_epoch(folder):
    data = settings(folder)
    whole = Loader(data, PROCESSOR)
    batches = take(whole, 12)
    assert whole.epoch >= 1
    for step in (0, 1, 5):
        first = Loader(data, PROCESSOR)
        take(first, step)
        state = json.loads(json.dumps(first.state()))
        take(first, 2)  # what a killed run had read since
        second = Loader(data, PROCESSOR)
        second.restore(state)
        for batch in batches[step:]:
            assert_same(next(second), batch)
        assert second.state() == whole.state() and second.epoch == whole.epoch
    first.restore(state)  # one that is in use already
    assert_same(next(first), batches[5])


def test_restored_on_another_number_of_processes(folder):
    data = settings(folder)
    batches = take(Loader(data, PROCESSOR), 6)
    pair = [Loader(data, PROCESSOR, None, p, 2) for p in range(2)]
    take(pair[0], 3), take(pair[1], 3)
    state = merge_states(loader.state() for loader in pair)
    for count in (1, 4):
        loaders = [Loader(data, PROCESSOR, None, p, count) for p in range(count)]
        for loader in loaders:
            loader.restore(state)
        for batch in batches[3:]:
            assert_same(joined([next(loader) for loader in loaders]), batch)
    with pytest.raises(ValueError, match="no shard 0; merge"):
        Loader(data, PROCESSOR).restore(pair[1].state())
    next(pair[0])
    with pytest.raises(ValueError, match=r"steps \[3, 4\]"):
        merge_states(loader.state() for loader in pair)


def test_state_of_other_data_is_refused(folder):
    state = Loader(settings(folder), PROCESSOR).state()
    Loader(settings(folder, num_workers=3, max_reject_share=0.5), PROCESSOR).restore(state)
    with pytest.raises(ValueError, match="the data's seed was 42 .* and is 43 now"):
        Loader(settings(folder, seed=43), PROCESSOR).restore(state)


def test_worker_processes_change_nothing(folder):
    loader = Loader(settings(folder), PROCESSOR)
    batches = take(loader, 5)
    workers = Loader(settings(folder, num_workers=2), PROCESSOR)
    for batch in batches[:3]:
        assert_same(next(workers), batch)
    state = workers.state()
    workers.restore(state)  # ends the workers and starts others
    for batch in batches[3:]:
        assert_same(next(workers), batch)
    workers.close()
    assert workers.state() == loader.state()


def test_workers_of_a_killed_process_end(folder):
    code = """
import multiprocessing, os, pathlib, sys
from test_loader import PROCESSOR, Loader, settings
if __name__ == "__main__":
    loader = Loader(settings(pathlib.Path(sys.argv[1]), num_workers=1), PROCESSOR)
    next(loader)
    print(multiprocessing.active_children()[0].pid, flush=True)
    os.kill(os.getpid(), 9)
"""
    script = folder / "killed.py"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), str(folder)]
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=60)
    assert run.returncode == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(int(run.stdout), 0)
            time.sleep(0.1)


def test_every_sample_once_an_epoch_in_another_order(folder):
    data = settings(folder, mixture={str(folder / "read.jsonl"): 1.0}, batch_size=1, num_shards=1)
    loader, drawn = Loader(data, PROCESSOR), []
    while loader.epoch < 2:
        drawn += answers(next(loader))
    expected = sorted("Yes. " * i for i in range(1, 30))
    assert sorted(drawn[:29]) == sorted(drawn[29:58]) == expected
    assert drawn[:29] != drawn[29:58]


def test_weights_are_shares_of_samples(folder):
    mixture = {str(folder / "heard.jsonl"): 3.0, str(folder / "read.jsonl"): 1.0}
    data = settings(folder, mixture=mixture, batch_size=8)
    drawn = [text for batch in take(Loader(data, PROCESSOR), 25) for text in answers(batch)]
    share = np.mean([text.startswith("Heard") for text in drawn])
    assert len(drawn) > 300 and abs(share - 0.75) < 0.07


def test_fewer_samples_than_shards(folder, tmp_path):
    path = write(tmp_path / "one.jsonl", [{"conversations": talk("A", "B")}])
    batch = next(Loader(settings(folder, mixture={path: 1.0}), PROCESSOR))
    assert set(answers(batch)) == {"B"} and batch.tiles is None and batch.audio is None


# Held-out samples


@pytest.mark.parametrize("count", [1, 2, 4])
def test_held_out_samples_come_once(folder, count):
    data = settings(folder, augment_audio=True, noises=str(folder / "audio"))
    data = dataclasses.replace(data, mixture={name: i + 0.1 for i, name in enumerate(data.mixture)})
    whole = list(held_out(data, PROCESSOR))
    drawn = sorted(text for batch in whole for text in answers(batch))
    expected = [f"No. {i}." for i in range(20)] + [f"Heard {i}." for i in range(9)]
    assert drawn == sorted(expected + ["Yes. " * i for i in range(1, 30)])
    trained = next(Loader(data, PROCESSOR))
    for name in FIELDS:
        a, b = getattr(whole[0], name), getattr(trained, name)
        assert a.shape == b.shape and a.dtype == b.dtype, name
    # Row r has the samples r, r + 4, ... in their order.
    rows = [[f"No. {i}." for i in range(r, 20, 4)] for r in range(4)]
    for row, texts in enumerate(rows):
        mine = [jax.tree.map(lambda x, r=row: x[r : r + 1], batch) for batch in whole]
        assert [text for batch in mine for text in answers(batch)][:5] == texts
    # The same once more, and cut into parts; a part that is over is all padding.
    parts = [list(held_out(data, PROCESSOR, p, count)) for p in range(count)]
    assert max(map(len, parts)) == len(whole)
    for at, batch in enumerate(whole):
        made = [p[at] if at < len(p) else jax.tree.map(np.zeros_like, p[0]) for p in parts]
        assert_same(joined(made), batch)


def test_held_out_rows_that_run_out_are_padding(folder, tmp_path, caplog):
    path = write(
        tmp_path / "some.jsonl",
        [{"conversations": talk("A", "B")}, {"image": "gone.png"}, {"id": 2}, {"id": 3}],
    )
    data = settings(folder, mixture={path: 1.0})
    (batch,) = held_out(data, PROCESSOR)
    assert [*answers(batch)] == ["B"]
    for name in FIELDS:
        value = getattr(batch, name)
        assert value is None or not value[1:].any(), name
    (said,) = [record.message for record in caplog.records]
    assert said.startswith("3 held-out samples left out; the first: ") and "sample 1:" in said
    (empty,) = held_out(data, PROCESSOR, 1, 2)  # nothing for it: one batch, so that it has a shape
    assert empty.tokens.shape == (2, 2600) and not empty.segment_ids.any()


def test_held_out_questions_are_spoken_the_same_each_time(folder):
    samples = [
        {"recordings": ["0.wav", "5.wav"], "conversations": talk("What?", f"{i}.")}
        for i in range(40)
    ]
    path = write(folder / "held.jsonl", samples)
    data = settings(folder, mixture={path: 1.0}, spoken_share=0.5)
    batches = list(held_out(data, PROCESSOR))
    heard = sum(int(batch.audio_mask.any(axis=2).sum()) for batch in batches)
    assert 10 < heard < 30
    again = list(held_out(dataclasses.replace(data, batch_size=2), PROCESSOR))
    assert sum(int(batch.audio_mask.sum()) for batch in again) == sum(
        int(batch.audio_mask.sum()) for batch in batches
    )
    with pytest.raises(FileNotFoundError, match="nowhere"):  # at once, not at the first batch
        held_out(dataclasses.replace(data, mixture={"nowhere": 1.0}), PROCESSOR)


# Packing


def test_rows_are_packed_apart(folder):
    data = settings(folder)
    packed = 0
    for batch in take(Loader(data, PROCESSOR), 6):
        assert batch.tiles.shape == (4, 8, 28, 28, 3) and batch.audio.shape == (4, 2, 160, 80)
        packed += (batch.segment_ids.max(axis=1) > 1).sum()
        for row in range(4):
            segments, real = batch.segment_ids[row], batch.segment_ids[row] > 0
            assert (np.diff(segments[real]) >= 0).all() and not segments[real.sum() :].any()
            tokens = batch.tokens[row]
            assert (tokens[~real] == 0).all() and (batch.loss_mask[row, ~real] == 0).all()
            assert (tokens == IMAGE_TOKEN).sum() == batch.tile_mask[row].sum() * PER_TILE
            frames = batch.audio_mask[row].sum(axis=1)
            heard = sum(vita_tiny().audio.num_embeddings(n) for n in frames if n)
            assert (tokens == AUDIO_TOKEN).sum() == heard
        for tokens, positions, mask in conversations(batch):
            assert positions.tolist() == [*range(len(tokens))]
            assert PROCESSOR.tokenizer.decode(tokens[tokens >= 0]).startswith("<|im_start|>system")
            assert mask.sum() > 0 and mask[0] == 0
    assert packed > 12


def test_packed_samples_do_not_see_each_other(folder):
    """Other words and pictures in the first sample of a row leave the logits of the rest alone."""
    config = vita_tiny()
    params = {"params": init_params(config, 0)}
    apply = jax.jit(Vita(config).apply)
    data = settings(folder, mixture={str(folder / "seen.jsonl"): 1.0}, batch_size=1, num_shards=1)
    for isolate in (True, False):
        loader = Loader(dataclasses.replace(data, isolate=isolate), PROCESSOR)
        batch = next(loader)
        size = np.flatnonzero(batch.positions[0] == 0)[1] if isolate else 900
        first = np.arange(data.max_tokens) < size
        tokens = np.where(first & (batch.tokens > 0), 65, batch.tokens)
        tiles = batch.tiles.copy()
        tiles[:, : (tokens[0, first] == IMAGE_TOKEN).sum() // PER_TILE] = 1.0
        changed = apply(params, batch.replace(tokens=tokens, tiles=tiles)) - apply(params, batch)
        changed = np.abs(changed).max(axis=-1)[0]
        rest = ~first & (batch.segment_ids[0] > 0)
        assert changed[first].max() > 0.01 and rest.sum() > 500
        assert changed[rest].max() < 1e-5 if isolate else changed[rest].max() > 1e-3


def test_packed_samples_are_those_of_the_processor(folder):
    """A row holds exactly what `Processor.sample` makes, one sample behind the other."""
    data = settings(folder, mixture={str(folder / "seen.jsonl"): 1.0})
    lines = (folder / "seen.jsonl").read_text().splitlines()
    samples = [PROCESSOR.sample(json.loads(line), folder) for line in lines]
    batch = next(Loader(data, PROCESSOR))
    assert batch.audio is None
    for row in range(4):
        at = tile = 0
        while at < data.max_tokens and batch.segment_ids[row, at]:
            size = (batch.segment_ids[row] == batch.segment_ids[row, at]).sum()
            tokens = batch.tokens[row, at : at + size]
            (found,) = [
                s
                for s in samples
                if np.array_equal(s.tokens, tokens)
                and np.array_equal(s.tiles, batch.tiles[row, tile : tile + len(s.tiles)])
            ]
            np.testing.assert_array_equal(found.loss_mask, batch.loss_mask[row, at : at + size])
            at, tile = at + size, tile + len(found.tiles)
        assert tile == batch.tile_mask[row].sum()


def test_without_isolation_samples_see_each_other(folder):
    apart = next(Loader(settings(folder), PROCESSOR))
    batch = next(Loader(settings(folder, isolate=False), PROCESSOR))
    np.testing.assert_array_equal(batch.tokens, apart.tokens)
    np.testing.assert_array_equal(batch.segment_ids, (apart.segment_ids > 0).astype(np.int32))
    for row, real in enumerate(apart.segment_ids > 0):
        assert batch.positions[row, real].tolist() == [*range(real.sum())]


def test_transcripts_for_ctc(folder):
    data = settings(folder, mixture={str(folder / "heard.jsonl"): 1.0}, max_tokens=64)
    for batch in take(Loader(data, PROCESSOR, objective="ctc"), 3):
        assert batch.tiles is None
        for row in range(4):
            clips = batch.audio_mask[row].any(axis=1).sum()
            assert batch.segment_ids[row].max() == clips == 2
        for tokens, _, mask in conversations(batch):
            assert PROCESSOR.tokenizer.decode(tokens).startswith("Heard ") and mask.all()


# Bad samples


@pytest.fixture
def spoilt(folder, tmp_path):
    """Good samples among bad ones, and a part of the reason for each bad one."""
    (tmp_path / "audio").mkdir()
    (tmp_path / "broken.png").write_bytes((folder / "2.png").read_bytes()[:200])
    Image.new("RGB", (28 * 12, 28)).save(tmp_path / "wide.png")
    soundfile.write(tmp_path / "audio" / "long.wav", np.zeros(32000), 16000)
    bad = {
        "no such picture": {"image": "gone.png", "conversations": talk("<image>", "A")},
        "broken.png": {"image": "broken.png", "conversations": talk("<image>", "A")},
        "tokens, ": {"conversations": talk("long " * 600, "A")},
        "1 <image> in the text but 0": {"conversations": talk("<image>", "A")},
        "13 tiles, over data.max_tiles=8": {
            "image": "wide.png", "conversations": talk("<image>", "A")},
        "frames in a clip, over data.max_audio_frames=160": {
            "audio": "long.wav", "conversations": talk("<audio>", "A")},
        "conversations must be": {"id": 7},
        "image=5": {"image": 5, "conversations": talk("<image>", "A")},
        "expected an object": [1],
    }  # fmt: skip
    good = [{"conversations": talk("Q", f"{i}")} for i in range(50)]
    path = write(tmp_path / "mixed.jsonl", [*bad.values(), *good])
    with open(path, "a") as file:
        file.write("{not json\n")
    return path, [*bad, "line 60: not JSON"]


def test_bad_samples_are_left_out_and_named(folder, spoilt, tmp_path):
    path, reasons = spoilt
    data = settings(folder, mixture={path: 1.0}, batch_size=2, num_shards=2, max_reject_share=0.4)
    rejects = tmp_path / "rejects.jsonl"
    loader, drawn = Loader(data, PROCESSOR, rejects), []
    while loader.epoch < 2:
        drawn += answers(next(loader))
    lines = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert set(drawn) == {str(i) for i in range(50)}
    assert len(lines) == loader.num_rejects >= 10
    for index, reason in enumerate(reasons):
        index = 59 if reason.startswith("line") else index
        found = [line["reason"] for line in lines if line["index"] == index]
        assert found and all(reason in text for text in found), (index, reason, found)
    assert {line["index"] for line in lines} == {*range(9), 59}
    assert {line["source"] for line in lines} == {path}


def test_rejects_are_written_once_across_a_restart(folder, spoilt, tmp_path):
    data = settings(
        folder, mixture={spoilt[0]: 1.0}, batch_size=2, num_shards=2, max_reject_share=0.4
    )
    loader = Loader(data, PROCESSOR, tmp_path / "whole.jsonl")
    take(loader, 20)
    broken = Loader(data, PROCESSOR, tmp_path / "rejects.jsonl")
    take(broken, 9)
    state = broken.state()
    take(broken, 8)
    with open(tmp_path / "rejects.jsonl", "a") as file:
        file.write('{"source": "torn')
    again = Loader(data, PROCESSOR, tmp_path / "rejects.jsonl")
    again.restore(state)
    take(again, 11)
    assert again.num_rejects == loader.num_rejects
    whole, lines = ((tmp_path / f"{n}.jsonl").read_text() for n in ("whole", "rejects"))
    assert lines == whole and whole.count("\n") == loader.num_rejects


def test_too_many_bad_samples_stop(folder, spoilt, tmp_path):
    data = settings(folder, mixture={spoilt[0]: 1.0})
    rejects = tmp_path / "rejects.jsonl"
    loader = Loader(data, PROCESSOR, rejects, 1, 2)
    with pytest.raises(ValueError, match=r"of \d+ samples are bad, more than data.max_reject_share"
                       r"=0.05; the last: .*; all are in .*rejects.1.jsonl"):  # fmt: skip
        take(loader, 100)
    assert len((tmp_path / "rejects.1.jsonl").read_text().splitlines()) == loader.num_rejects
    path = write(tmp_path / "bad.jsonl", [{"id": i} for i in range(7)])
    with pytest.raises(ValueError, match="conversations must be"):  # not one good sample
        next(Loader(settings(folder, mixture={path: 1.0}, max_reject_share=0.9), PROCESSOR))


@pytest.mark.parametrize("objective, most", [("ctc", "23 encoder frames"), ("align", "12 embed")])
def test_transcripts_longer_than_the_clip(objective, most, folder, tmp_path):
    # 1 s is 98 frames, 23 encoder frames, 12 embeddings.
    n = int(most[:2])
    texts = ["abcdefgh" * 3, "ab" * (n // 2) + "c" * (n % 2), "ab" * (n // 2) + "bb"]
    texts += ["a" * ((n + 1) // 2), "a" * ((n + 1) // 2 + 1)]
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "0.wav").write_bytes((folder / "audio" / "0.wav").read_bytes())
    samples = [{"audio": "0.wav", "conversations": talk("<audio>", text)} for text in texts]
    path = write(tmp_path / "asr.jsonl", samples)
    data = settings(folder, mixture={path: 1.0}, num_shards=1, batch_size=1, max_reject_share=0.9)
    loader = Loader(data, PROCESSOR, tmp_path / "rejects.jsonl", objective=objective)
    take(loader, 10)
    lines = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert {line["index"] for line in lines} == {0, 2, 4}
    reason = f"need {13 if n == 12 else 25} {most.split()[1]}.*, the clip has {n}"
    assert any(re.search(reason, line["reason"]) for line in lines)


def test_each_han_character_of_a_transcript_is_a_target_by_itself(folder, tmp_path):
    text = "这是猫吗？ is it a cat?"
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "5.wav").write_bytes((folder / "audio" / "5.wav").read_bytes())
    tokenizer = Tokenizer.load(SHIPPED)
    sample = {"audio": "5.wav", "conversations": talk("<audio>", text)}
    path = write(tmp_path / "asr.jsonl", [sample])
    data = settings(folder, mixture={path: 1.0}, num_shards=1, batch_size=1, max_clips=1)
    batch = next(Loader(data, Processor(vita_nano(), tokenizer), objective="align"))
    found = [tokenizer.decode([token]) for token in batch.tokens[batch.segment_ids > 0]]
    assert found == ["这", "是", "猫", "吗", "？", " is", " it", " a", " cat", "?"]


def test_settings_that_make_no_batch(folder):
    for changes, message in (
        ({"mixture": {}}, "expected sources with positive weights"),
        ({"batch_size": 0}, "data.batch_size=0"),
        ({"max_reject_share": 1.0}, "share from 0 to less than 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Loader(settings(folder, **changes), PROCESSOR)
    with pytest.raises(ValueError, match="3 processes: data.batch_size=4 and data.num_shards=8"):
        Loader(settings(folder), PROCESSOR, None, 0, 3)
    with pytest.raises(ValueError, match="objective='gan': expected one of next_token, match, ctc"):
        Loader(settings(folder), PROCESSOR, objective="gan")


# Sound


def test_questions_asked_in_one_of_their_recordings(folder, tmp_path):
    sample = {
        "image": "0.png",
        "recordings": ["0.wav", "5.wav"],
        "conversations": [*talk("<image>\nWhat?", "It."), *talk("Sure?", "Yes.")],
    }
    path = write(folder / "spoken.jsonl", [sample, {"conversations": talk("Hi", "Ho")}])
    heard, total = [], 0
    data = settings(folder, mixture={path: 1.0}, spoken_share=0.5)
    for batch in take(Loader(data, PROCESSOR), 10):
        heard += batch.audio_mask.sum(axis=2)[batch.audio_mask.any(axis=2)].tolist()
        for tokens, _, mask in conversations(batch):
            words = PROCESSOR.tokenizer.decode(tokens[tokens >= 0])
            if "It." in words:
                asked = (tokens == AUDIO_TOKEN).any()
                total += 1
                assert asked == ("What?" not in words) and (tokens == IMAGE_TOKEN).any()
                assert PROCESSOR.tokenizer.decode(tokens[mask > 0]).startswith(
                    "☞It." if asked else "☜It."
                )
            else:
                assert not (tokens == AUDIO_TOKEN).any()
    assert set(heard) == {98, 123} and 0.3 < len(heard) / total < 0.7  # 1 s, 1.25 s
    silent = next(Loader(dataclasses.replace(data, spoken_share=0.0), PROCESSOR))
    assert silent.audio is None is silent.audio_mask  # recordings are no sound to hear


def test_augmented_clips_are_the_same_after_a_restart(folder):
    data = settings(folder, mixture={str(folder / "heard.jsonl"): 1.0}, augment_audio=True,
                    noises=str(folder / "audio"))  # fmt: skip
    loader = Loader(data, PROCESSOR)
    take(loader, 2)
    state, batch = loader.state(), next(loader)
    again = Loader(data, PROCESSOR, process_index=0, process_count=1)
    again.restore(state)
    assert_same(next(again), batch)
    plain = next(Loader(dataclasses.replace(data, augment_audio=False, noises=None), PROCESSOR))
    assert batch.audio.shape == plain.audio.shape and (batch.audio != plain.audio).any()
    with pytest.raises(ValueError, match="noises only with data.augment_audio"):
        Loader(dataclasses.replace(data, augment_audio=False), PROCESSOR)
