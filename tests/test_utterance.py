"""vita_jax/data/utterance.py: pieces of clips, words with codec tokens; from samples to rows."""

import json

import numpy as np
import pytest

from vita_jax.batch import TEXT_TOKEN
from vita_jax.config import DataConfig, vita_tiny
from vita_jax.data.audio import write_wav
from vita_jax.data.loader import Loader, held_out
from vita_jax.data.processor import Processor
from vita_jax.data.sources import open_source
from vita_jax.data.tokenizer import load_bundled
from vita_jax.data.utterance import pieces, utterance, words

CONFIG, TOKENIZER = vita_tiny(), load_bundled("vita_tiny")
PROCESSOR = Processor(CONFIG, TOKENIZER)
RATE_HZ, UNIT = 24000, 600


def ramp(num_samples):
    """Each sample tells where it stands."""
    return np.arange(num_samples, dtype=np.float32) / 1e6


def test_pieces_of_a_clip():
    sample = {"audio": [(ramp(30_000), RATE_HZ)]}
    firsts = []
    for seed in range(20):
        example = pieces(sample, CONFIG.codec, 8, np.random.default_rng(seed))
        assert example.waveform.shape == (2, 8 * UNIT) and len(example.tokens) == 8
        np.testing.assert_allclose(np.diff(example.waveform), 1e-6, atol=1e-7)
        firsts.append(np.round(example.waveform[:, 0] * 1e6))
    firsts = np.array(firsts)
    assert (firsts[:, 0] != firsts[:, 1]).all() and len(np.unique(firsts)) > 30
    assert firsts.min() >= 0 and firsts.max() <= 30_000 - 8 * UNIT


def test_a_short_clip_ends_in_silence():
    sample = {"audio": (ramp(2500) + 0.1, RATE_HZ)}
    example = pieces(sample, CONFIG.codec, 8, np.random.default_rng(0))
    assert len(example.tokens) == 5  # the last one hears some silence
    assert (example.waveform[:, :2500] > 0).all() and not example.waveform[:, 2500:].any()
    for sample, message in (
        ({"id": "x"}, "sample x: no audio"),
        ({"audio": (ramp(2000), RATE_HZ)}, "0.08 s of sound; give at least 0.1 s"),
    ):
        with pytest.raises(ValueError, match=message):
            pieces(sample, CONFIG.codec, 8, np.random.default_rng(0))


def test_an_utterance():
    c = CONFIG.speech
    example = utterance({"text": " hi ", "codes": [3, 1, 4]}, CONFIG, TOKENIZER)
    np.testing.assert_array_equal(example.text, TOKENIZER.encode("hi"))
    text = [TEXT_TOKEN] * 4 * len(example.text)
    expected = [c.bos_id, *text, c.sos_id, 3, 1, 4, c.eos_id]
    np.testing.assert_array_equal(example.tokens, expected)
    np.testing.assert_array_equal(example.loss_mask, [0] * (len(text) + 2) + [1] * 4)
    for bad, message in (
        ({"codes": []}, "no codes; make them with `vita data codec-tokens`"),
        ({"text": "hi"}, "no codes"),
        ({"text": "hi", "codes": [3, 64]}, "code 64; the model's are 0 to 63"),
        ({"text": "hi", "codes": [True]}, "code True"),
        ({"text": "  ", "codes": [1]}, "no words"),
    ):
        with pytest.raises(ValueError, match=message):
            utterance({"id": 7, **bad}, CONFIG, TOKENIZER)


def test_words():
    turns = [{"from": "human", "value": "<audio>"}, {"from": "gpt", "value": "good day "}]
    assert words({"conversations": turns}) == "good day" == words({"text": "good day"})
    assert words({}) == ""


@pytest.fixture
def speech(tmp_path):
    """Twelve clips with their words."""
    for i in range(12):
        write_wav(tmp_path / f"{i:02d}.wav", ramp(3000 + 100 * i) + 0.1, RATE_HZ)
        (tmp_path / f"{i:02d}.txt").write_text(f"clip {i}\n")
    return tmp_path


def test_a_folder_of_speech(speech):
    source = open_source(str(speech))
    assert len(source) == 12 and source.media == {"audio"}
    with source.open(3) as sample:
        assert words(sample) == "clip 3" and sample["audio"] == str(speech / "03.wav")
    (speech / "03.txt").unlink()
    with source.open(3) as sample:
        assert words(sample) == ""
    lines = [
        {"file": "01.wav", "text": "one"},
        {"file": "02.wav", "text": "two", "split": "held_out"},
        {"file": "03.wav", "text": "three", "split": "other", "voice": "a"},
        {"file": "01.wav", "text": "four", "split": "other", "voice": "b"},
        {"file": "02.wav", "text": "five", "split": "other", "voice": "c"},
    ]
    (speech / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, text in ((str(speech), "one"), (f"{speech}#held_out", "two")):
        source = open_source(name)
        with source.open(0) as sample:
            assert len(source) == 1 and words(sample) == text
    assert len(open_source(f"{speech}#other")) == 3
    some = open_source(f"{speech}#other:c,a")
    assert [words(some.open(i).__enter__()) for i in range(len(some))] == ["three", "five"]
    for missing in ("#test", "#other:d", "#held_out:a"):
        with pytest.raises(ValueError, match="no speech in it"):
            open_source(f"{speech}{missing}")
    (speech / "manifest.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(ValueError, match="expected an object with `file`"):
        open_source(str(speech))


def data(mixture, **more):
    return DataConfig(mixture=mixture, batch_size=4, num_shards=4, **more)


def test_rows_of_pieces(speech):
    config = data({str(speech): 1.0}, max_tokens=8)
    loaders = [Loader(config, PROCESSOR, objective="codec") for _ in range(2)]
    first = [next(loaders[0]) for _ in range(6)]
    for batch in first:
        assert batch.waveform.shape == (4, 2, 8 * UNIT)
        assert batch.audio is None and batch.segment_ids.max() == 1  # one clip a row
        lengths = (batch.waveform[:, 0] > 0.05).sum(axis=1)
        np.testing.assert_array_equal((batch.segment_ids > 0).sum(axis=1), -(-lengths // UNIT))
    for _ in range(3):
        next(loaders[1])
    again = Loader(config, PROCESSOR, objective="codec")
    again.restore(loaders[1].state())
    for batch in first[3:]:
        np.testing.assert_array_equal(next(again).waveform, batch.waveform)
    once = list(held_out(config, PROCESSOR, objective="codec"))
    assert sum((batch.segment_ids > 0).any(axis=1).sum() for batch in once) == 12


def test_rows_of_utterances(tmp_path):
    rng, texts = np.random.default_rng(0), [f"say {i}" for i in range(20)]
    rows = [
        {"id": t, "text": t, "codes": rng.integers(64, size=9 + i).tolist()}
        for i, t in enumerate(texts)
    ]
    (tmp_path / "tokens.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "rejects.jsonl").write_text('{"index": 3, "reason": "no"}\n')
    config = data({str(tmp_path): 1.0}, max_tokens=128)
    batch = next(Loader(config, PROCESSOR, objective="speech"))
    assert batch.tokens.shape == (4, 128) and batch.text.shape == (4, 32)
    packed = 0
    for tokens, ids, mask, text, text_ids, positions in zip(
        batch.tokens, batch.segment_ids, batch.loss_mask, batch.text, batch.text_segment_ids,
        batch.positions,
    ):  # fmt: skip
        for i in range(1, ids.max() + 1):
            packed += 1
            said = TOKENIZER.decode(text[text_ids == i])
            whole = utterance(rows[texts.index(said)], CONFIG, TOKENIZER)
            np.testing.assert_array_equal(tokens[ids == i], whole.tokens)
            np.testing.assert_array_equal(mask[ids == i], whole.loss_mask)
            np.testing.assert_array_equal(positions[ids == i], np.arange(len(whole.tokens)))
    assert packed > 4  # several in a row
