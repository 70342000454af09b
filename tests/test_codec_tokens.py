"""vita_jax/codec_tokens.py: speech to records, stopped and gone on with."""

import json
import pathlib
import shutil

import numpy as np
import pytest

import vita_jax
from vita_jax import checkpoint, codec_tokens, feed
from vita_jax.config import load_config
from vita_jax.data.audio import read_audio, write_wav
from vita_jax.models.codec import Codec

RATE_HZ, UNIT = 24000, 600


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    checkpoint.initialize("vita_tiny", folder)
    return folder


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """Ten clips of noise with words, one of them without, one that is no sound."""
    folder, rng = tmp_path_factory.mktemp("speech"), np.random.default_rng(0)
    for i in range(10):
        noise = rng.normal(size=rng.integers(3000, 9000)).astype(np.float32) * 0.1
        write_wav(folder / f"{i}.wav", noise, RATE_HZ)
        (folder / f"{i}.txt").write_text(f"clip {i}")
    (folder / "2.txt").unlink()
    (folder / "5.wav").write_bytes(b"RIFF")
    return folder


@pytest.fixture(scope="module")
def made(model, speech, tmp_path_factory):
    target = tmp_path_factory.mktemp("tokens") / "all"
    return target, codec_tokens.write(model, str(speech), target, batch_size=3)


def records(target):
    """What the folder holds."""
    return [json.loads(line) for line in (target / "tokens.jsonl").read_text().splitlines()]


def test_counts(made):
    target, counts = made
    rows = records(target)
    assert counts["clips"] == len(rows) == 8 and counts["rejects"] == 2
    assert counts["tokens"] == sum(len(row["codes"]) for row in rows)
    assert counts["hours"] == pytest.approx(sum(row["seconds"] for row in rows) / 3600, abs=1e-4)
    used = len(set(sum((row["codes"] for row in rows), [])))
    assert counts["codebook"]["dead"] == pytest.approx(1 - used / 64)
    assert 1 <= counts["codebook"]["perplexity"] <= used
    rejects = [json.loads(line) for line in (target / "rejects.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rejects] == [2, 5]
    assert "no words" in rejects[0]["reason"] and "5.wav" in rejects[1]["reason"]
    assert not (target / "plan.json").exists()


def test_each_clip_as_if_alone(made, model, speech):
    config, params = checkpoint.load(model, parts=("codec",))
    assert set(params) == {"codec"}
    codec = Codec(config.codec)
    for row in records(made[0]):
        clip = read_audio(speech / row["id"], RATE_HZ)
        clip = np.pad(clip, (0, -len(clip) % UNIT))[None]
        codes, global_tokens, _ = codec.apply({"params": params["codec"]}, clip, method="encode")
        assert len(row["codes"]) == len(clip[0]) // UNIT
        assert np.mean(codes[0] == np.array(row["codes"])) > 0.97  # ties go either way
        assert np.mean(global_tokens[0] == np.array(row["global_tokens"])) >= 0.75
        assert row["text"] == f"clip {row['id'][0]}"


@pytest.mark.parametrize("left", [0.0, 0.3, 0.85])
def test_stopped_and_gone_on_with(left, made, model, speech, tmp_path):
    """The batch that was being written may be there in part, with a line cut off."""
    target, counts = made
    begun = tmp_path / "begun"
    shutil.copytree(target, begun)
    (begun / "manifest.json").unlink()
    (begun / "plan.json").write_text(json.dumps(counts["plan"]))
    data = (target / "tokens.jsonl").read_text()
    data = data[: int(left * len(data))]
    (begun / "tokens.jsonl").write_text(data)
    last = max((json.loads(line)["index"] for line in data.split("\n")[:-1]), default=0)
    rejects = (target / "rejects.jsonl").read_text().splitlines(True)
    whole = [line for line in rejects if json.loads(line)["index"] < last // 3 * 3]
    (begun / "rejects.jsonl").write_text("".join(whole))
    assert codec_tokens.write(model, str(speech), begun, batch_size=3) == counts
    for name in ("tokens.jsonl", "rejects.jsonl", "manifest.json"):
        assert (begun / name).read_bytes() == (target / name).read_bytes()


def test_the_same_again_and_another_codec(made, model, speech, tmp_path):
    target, counts = made
    before = (target / "tokens.jsonl").stat().st_mtime_ns
    assert codec_tokens.write(model, str(speech), target) == counts
    assert (target / "tokens.jsonl").stat().st_mtime_ns == before
    other = tmp_path / "other"
    checkpoint.initialize("vita_tiny", other, seed=1)
    with pytest.raises(ValueError, match="begun with .* name another folder"):
        codec_tokens.write(other, str(speech), target)


def test_nothing_to_make_tokens_of(model, tmp_path):
    (tmp_path / "speech").mkdir()
    write_wav(tmp_path / "speech" / "a.wav", np.ones(9000, np.float32) / 9, RATE_HZ)
    with pytest.raises(ValueError, match="no clip can be used; the first: sample a.wav: no words"):
        codec_tokens.write(model, str(tmp_path / "speech"), tmp_path / "tokens")


def test_the_voice_is_the_commonest(tmp_path):
    rows = [[1, 5, 2, 9], [1, 6, 2, 9], [3, 6, 2, 8]]
    (tmp_path / "tokens.jsonl").write_text(
        "".join(
            json.dumps({"text": "a", "codes": [1], "global_tokens": row}) + "\n" for row in rows
        )
    )
    assert codec_tokens.voice(str(tmp_path)) == (1, 6, 2, 9)
    (tmp_path / "tokens.jsonl").write_text('{"text": "a", "codes": [1]}\n')
    assert codec_tokens.voice(str(tmp_path)) is None


def test_a_stage_keeps_the_voice_unless_it_learns_another(tmp_path):
    heard = "codec.global_tokens=[3,2,1,0]"
    checkpoint.initialize("vita_tiny", tmp_path / "start", overrides=[heard])
    row = {"text": "a", "codes": [1], "global_tokens": [5, 6, 7, 7]}
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "tokens.jsonl").write_text(json.dumps(row) + "\n")
    configs = pathlib.Path(vita_jax.__file__).parents[1] / "configs"
    start, source = f"init_from={tmp_path / 'start'}", f'{{"{tmp_path / "tokens"}": 1}}'
    for stage, words, voice in (
        ("stage1_3_vision_sft", [start], (3, 2, 1, 0)),
        ("stage1_3_vision_sft", [], (0, 1, 2, 3)),
        ("stage3_2_speech_decoder", [start, f"data.mixture={source}"], (5, 6, 7, 7)),
    ):
        config = load_config(configs / f"{stage}.py", words, tiny=True)
        assert feed.with_voice(config).model.codec.global_tokens == voice


def test_a_voice_from_a_clip(model):
    engine = vita_jax.load(model, dtype="float32")
    rng = np.random.default_rng(0)
    noise = 0.1 * rng.normal(size=30_000).astype(np.float32)
    options = dict(max_new_tokens=2, seed=3)
    own = engine.chat("hi", **options)
    other = engine.chat("hi", voice=(noise, RATE_HZ), **options)
    assert own.text == other.text
    if own.audio.size:
        assert np.abs(own.audio - other.audio).max() > 1e-4
    with pytest.raises(ValueError, match="0.50 s of sound; give at least 1 s"):
        engine.chat("hi", voice=(noise[:12_000], RATE_HZ), **options)
    with pytest.raises(ValueError, match="voice: given with speak=False"):
        engine.chat("hi", voice=(noise, RATE_HZ), speak=False)
