"""vita_jax/data/units.py: learnt, saved, refused; in the loader and in a model."""

import json
import pathlib
import pickle

import numpy as np
import pytest
import soundfile

from vita_jax import checkpoint, cli, feed, train_state
from vita_jax import train as loop
from vita_jax.batch import AUDIO_TOKEN
from vita_jax.config import DataConfig, load_config, override, vita_tiny
from vita_jax.data.loader import Loader, held_out
from vita_jax.data.processor import Processor
from vita_jax.data.tokenizer import byte_tokenizer
from vita_jax.data.units import MARK, Units, check_head, learn, transcripts, words

ROOT = pathlib.Path(loop.__file__).parents[1]
PROCESSOR = Processor(vita_tiny(), byte_tokenizer())
TEXTS = [
    "Don’t stop, the weather is nice today.",
    "The weather's nice 你好，世界！ The 3 cats",
    "今天 weather 很好 hello, THE cats",
] * 3


@pytest.fixture(scope="module")
def units():
    return learn(TEXTS, 60)[0]


def test_words():
    assert words("Ｄon’t “STOP”: 3.5 é") == ["▁don't", "▁stop", "▁3", "▁5", "▁é"]
    assert words("你好，world世界 ok\n'quoted' rock'n'roll…") == [
        "你", "好", "▁world", "世", "界", "▁ok", "▁quoted", "▁rock'n'roll"
    ]  # fmt: skip
    assert words("カナ 々〇 ㎞ ﬁ _ ▁ ' ☞") == ["カ", "ナ", "々", "〇", "▁km", "▁fi"]
    assert words("हिन्दी ё") == ["▁हिन्दी", "▁ё"]  # vowel signs are part of words


def test_learnt_units(units):
    assert units.vocab_size == 59 and units.num_characters == 7
    the, weather = units.encode("the weather")
    assert units.decode([the]) == "the" and units.decode([weather]) == "weather"
    assert len(units.encode("世界")) == 2 and len(set(units.encode("你好天"))) == 3
    for text in TEXTS:
        ids = units.encode(text)
        assert all(0 <= i < 59 for i in ids)
        assert words(units.decode(ids)) == words(text) and units.encode(units.decode(ids)) == ids
    assert units.decode(units.encode(TEXTS[1])) == "the weather's nice你好世界 the 3 cats"
    assert units.decode([59, -1, the, 1000]) == "the" and units.encode(" … ") == []
    assert learn(TEXTS, 60)[0].checksum == units.checksum != learn(TEXTS, 59)[0].checksum


def test_coverage_when_there_are_more_characters_than_units(units):
    assert learn(TEXTS, 60)[1] == 1.0
    few, coverage = learn(["ab ab ab 好 好 c"], 5)  # the blank, the mark, a, b, 好
    assert few.vocab_size == 4 and few.num_characters == 1 and coverage == 5 / 6
    assert few.decode(few.encode("ba好")) == "ba好"
    with pytest.raises(ValueError, match="no unit for c in 'abc'"):
        few.encode("abc")
    with pytest.raises(ValueError, match="1 units: expected at least 2"):
        learn(TEXTS, 1)
    with pytest.raises(ValueError, match="no words"):
        learn(["", "…"], 10)


def test_characters_without_a_unit_are_named(units):
    with pytest.raises(ValueError, match="no unit for ж 龙 in 'the ж 龙'"):
        units.encode("The Ж 龙!")


def test_file(units, tmp_path):
    file = tmp_path / "units.json"
    units.save(file)
    held = json.loads(file.read_text())
    assert held["units"][0] == "<blank>" and len(held["units"]) == 60
    assert held["units"][1 + units.encode("the")[0]] == MARK + "the"
    for again in (Units.load(file), pickle.loads(pickle.dumps(units))):
        assert again.checksum == units.checksum and again.encode(TEXTS[0]) == units.encode(TEXTS[0])
    with pytest.raises(FileNotFoundError, match="nowhere.json: no such file; .*vita data units"):
        Units.load(tmp_path / "nowhere.json")
    for text in ("{", "[]", '{"units": ["a"], "merges": []}',
                 '{"units": ["<blank>", "a"], "merges": [["a", "b"]]}'):  # fmt: skip
        file.write_text(text)
        with pytest.raises(ValueError, match="units.json: no list of units"):
            Units.load(file)


def test_a_head_must_have_room(units):
    check_head(units, 60, "it")
    check_head(units, 0, "it")  # no head
    with pytest.raises(ValueError, match="u.json: 60 CTC units.* has 59; set model.audio.num_units"
                       "=60, or .* --size 59"):  # fmt: skip
        check_head(units, 59, "u.json")
    with pytest.raises(ValueError, match="the head has 100"):
        check_head(byte_tokenizer(), 100, "tokenizer")


# In the loader, on the command line, in a model's folder


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """Twelve clips with words, of which one has a letter that the units lack."""
    root = tmp_path_factory.mktemp("speech")
    (root / "audio").mkdir()
    soundfile.write(root / "audio" / "0.wav", 0.1 * np.sin(np.arange(16000) / 9), 16000)
    texts = ["The weather", "你好 cats", "Жарко"] + [
        f"The {'cats ' * (i % 3)}hello" for i in range(9)
    ]
    lines = [
        {"audio": "0.wav", "conversations": [
            {"from": "human", "value": "<audio>"}, {"from": "gpt", "value": text}]}
        for text in texts
    ]  # fmt: skip
    lines.append({"conversations": [{"from": "human", "value": "龙"}]})  # no sound
    lines.append([])
    file = root / "asr.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    learn(TEXTS, 60)[0].save(root / "units.json")
    return root, texts


def settings(root, **changes):
    values = {
        "mixture": {str(root / "asr.jsonl"): 1.0}, "batch_size": 2, "max_tokens": 64,
        "max_clips": 2, "max_audio_frames": 128, "num_shards": 1, "max_reject_share": 0.5,
        "units": str(root / "units.json"),
    }  # fmt: skip
    return DataConfig(**(values | changes))


def test_targets_of_clips(speech, tmp_path):
    root, texts = speech
    units = Units.load(root / "units.json")
    said = []
    for batch in held_out(settings(root), PROCESSOR, objective="ctc"):
        for row in range(2):
            for clip in range(1, batch.segment_ids[row].max() + 1):
                said.append(units.decode(batch.tokens[row][batch.segment_ids[row] == clip]))
    assert sorted(said) == sorted(text.lower() for text in texts if text != "Жарко")
    loader = Loader(settings(root), PROCESSOR, tmp_path / "rejects.jsonl", objective="ctc")
    for _ in range(4):
        next(loader)
    rejects = [json.loads(x) for x in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert any("no unit for а ж к о р in" in r["reason"] and r["index"] == 2 for r in rejects)
    assert loader.state()["data"]["units"] == units.checksum


def test_units_that_cannot_be(speech, tmp_path):
    root, _ = speech
    small = Processor(override(vita_tiny(), ["audio.num_units=50"]), byte_tokenizer())
    with pytest.raises(ValueError, match="units.json: 60 CTC units.* the head has 50"):
        Loader(settings(root), small, objective="ctc")
    with pytest.raises(ValueError, match="tokenizer: 264 CTC units.* the head has 50"):
        Loader(settings(root, units=None), small, objective="ctc")
    learn(TEXTS, 50)[0].save(tmp_path / "units.json")
    state = Loader(settings(root), PROCESSOR, objective="ctc").state()
    with pytest.raises(ValueError, match="the data's units was"):
        others = settings(root, units=str(tmp_path / "units.json"))
        Loader(others, PROCESSOR, objective="ctc").restore(state)


def test_command(speech, tmp_path, capsys):
    root, texts = speech
    source, target = str(root / "asr.jsonl"), str(tmp_path / "units.json")
    assert cli.main(["data", "units", source, target, "--size", "40"]) == 0
    assert "30 units: the blank, 2 characters, 27 pieces of words; they write 100.00%" in (
        capsys.readouterr().out
    )
    assert list(transcripts(source)) == texts
    made = Units.load(target)
    assert made.encode("жарко") and made.vocab_size == 29
    assert cli.main(["data", "units", source, target]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_model_takes_its_units_along(speech, tmp_path):
    root, _ = speech
    words = (
        "mesh=[1,1,1]", "num_steps=1", "data.batch_size=2", "data.max_reject_share=0.5",
        "data.held_out=[]",
        f'data.mixture={{"{root / "asr.jsonl"}": 1.0}}', "model.audio.num_units=64",
    )  # fmt: skip

    def stage(*more):
        file = ROOT / "configs" / "stage2_1a_speech_encoder.py"
        return load_config(file, (*words, *more), tiny=True)

    named = f"data.units={root / 'units.json'}"
    first, second = tmp_path / "first", tmp_path / "second"
    loop.train(stage(named), first)
    assert (first / "model" / "units.json").read_bytes() == (root / "units.json").read_bytes()
    checkpoint.open_folder(first / "model")
    brought = f"init_from={first / 'model'}"
    loop.train(stage(brought), second)  # goes on with the units of the head
    held = second / "model" / "units.json"
    assert held.read_bytes() == (root / "units.json").read_bytes()

    assert train_state.units_file(stage()) is None  # the tokenizer's ids
    assert train_state.units_file(stage(brought, named)) == str(first / "model" / "units.json")
    learn(TEXTS, 50)[0].save(tmp_path / "units.json")
    with pytest.raises(ValueError, match="the CTC head in .*first/model has other units; leave"):
        train_state.units_file(stage(brought, f"data.units={tmp_path / 'units.json'}"))
    without = stage(f"init_from=(?!audio/ctc).*={first / 'model'}", named)
    assert train_state.units_file(without) == str(root / "units.json")
    adapter = load_config(ROOT / "configs" / "stage2_1b_speech_adapter.py", (brought,), tiny=True)
    assert train_state.units_file(adapter) is None
    with pytest.raises(ValueError, match="data.units=.*the model has no CTC head"):
        train_state.units_file(override(adapter, [named]))
    # A stage with another objective carries head and units, and reads no transcripts.
    carrying = stage(brought, "objective=next_token", "data.max_tokens=768")
    assert train_state.units_file(carrying) == str(first / "model" / "units.json")
    batch = next(feed.make_loaders(carrying, byte_tokenizer(), tmp_path)[0])
    assert (batch.tokens == AUDIO_TOKEN).any()

    learn([" ".join(map(chr, range(0x4E00, 0x4E41)))], 100)[0].save(held)
    with pytest.raises(ValueError, match="units.json: 66 CTC units.* the head has 64"):
        checkpoint.open_folder(second / "model")
