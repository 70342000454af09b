"""What the small model learns from and is judged by, as far as it needs no packages; its stages."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from vita_jax.config import load_config
from vita_jax.data import judged, nano, talk, voices
from vita_jax.data.concepts import Concept
from vita_jax.data.processor import Processor
from vita_jax.data.tokenizer import load_bundled
from vita_jax.data.video import read_video

CONCEPTS = [
    Concept("1F408", "cat", "猫", 3, "animal-mammal", ("pet",), ("宠物",)),
    Concept("1F34E", "red apple", "红苹果", 4, "food-fruit", (), ()),
]


@pytest.fixture
def read(monkeypatch):
    """Sentences in the place of the package's."""
    pairs = [(f"Sentence number {i}.", f"第{i}句。") for i in range(40)]
    monkeypatch.setattr(nano, "sentences", lambda levels=(1,): iter(pairs))
    return pairs


def test_texts(read):
    samples = nano.texts(CONCEPTS, 300, 0, held_out=False)
    assert samples == nano.texts(CONCEPTS, 300, 0, held_out=False)
    assert samples != nano.texts(CONCEPTS, 300, 1, held_out=False)
    pairs = [[turn["value"] for turn in one["conversations"]] for one in samples]
    answers = dict(pairs)
    assert answers["In Chinese: cat"] == "这是猫。"
    assert answers["用英语说：红苹果"] == "This is a red apple."
    assert any(question.endswith(answer) for question, answer in pairs)  # to repeat
    told = [(q, a) for q, a in pairs if a.endswith("on the left.")]
    assert told and all(answer in question for question, answer in told)
    held_out = nano.texts(CONCEPTS, 300, 0, held_out=True)
    repeated = [
        {one["conversations"][1]["value"] for one in some} & {t for pair in read for t in pair}
        for some in (samples, held_out)
    ]
    assert all(repeated) and not repeated[0] & repeated[1]


def test_tokenizer_has_a_prompt_in_one_id(read):
    tokenizer = nano.tokenizer(CONCEPTS)
    assert tokenizer.vocab_size <= nano.VOCAB_SIZE
    user, _, reply = (nano.USER + nano.ASSISTANT).partition("{}")
    for text in (*map(nano.SYSTEM.format, nano.SYSTEM_PROMPTS.values()), user, reply):
        assert len(tokenizer.encode(text)) == 1
    for text in ("What is this?", "这是猫。", "☜This is a cat."):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_bundled_tokenizer_makes_short_prompts():
    config = load_config(nano.Path(__file__).parents[1] / "configs/nano.py:1_2").model
    processor = Processor(config, load_bundled("vita_nano"))
    picture = Image.new("RGB", (640, 480))
    example = processor.prompt("What is this?", images=[picture])
    # one tile of 16, system prompt, user, line break, four of the question, assistant
    assert len(example.tiles) == 1 and len(example.tokens) == 16 + 8


def test_noise():
    rng = np.random.default_rng(0)
    for _ in range(12):
        waveform = nano.noise(rng)
        assert waveform.dtype == np.float32 and 0.8 <= len(waveform) / 16000 <= 3
        assert np.isfinite(waveform).all() and 1e-4 < np.abs(waveform).max() <= 1


def test_clips_and_what_is_made_of_them(tmp_path):
    rows = [
        {"text": "What is this?", "lang": "en", "voice": "a", "kind": "question", "split": "train"},
        {"text": "这是什么？", "lang": "zh", "voice": "b", "kind": "question", "split": "held_out"},
        {"text": "It rains.", "lang": "en", "voice": "a", "kind": "sentence", "split": "train"},
        {"text": "It snows.", "lang": "en", "voice": "c", "kind": "sentence", "split": "unseen"},
    ]
    for row in rows:
        voices.keep(tmp_path / "speech", row, np.zeros(2400, np.float32), 24000)
    for held_out, texts in ((False, ["What is this?", "It rains."]), (True, ["这是什么？"])):
        folder = tmp_path / "held_out" if held_out else tmp_path
        samples = list(nano._to_transcribe(tmp_path, folder / "asr", held_out, talk.LANGS))
        assert [one["conversations"][1]["value"] for one in samples] == texts
        zh = list(nano._to_transcribe(tmp_path, folder / "asr_zh", held_out, ("zh",)))
        assert [one["conversations"][1]["value"] for one in zh] == texts * held_out
        asked = nano._to_transcribe(tmp_path, folder / "asked", held_out, talk.LANGS, ("question",))
        assert [one["conversations"][1]["value"] for one in asked] == texts[:1]
        for one in samples:
            assert (folder / "asr" / "audio" / one["audio"][0]).exists()
    unasked = list(nano._unasked(tmp_path, tmp_path / "noise", False))
    assert len(unasked) == nano.NUM_NOISES + 1 and all(one["inserted_id"] == 1 for one in unasked)
    sets = judged._speech(tmp_path)
    assert len(sets["codec_answer"]) == len(sets["query"]) == 1
    assert all(nano.Path(one["audio"][0]).exists() for one in sets["query"])
    assert sets["asr_domain_zh"][0]["conversations"][0]["value"] == "<audio>请写下你听到的。"
    assert sets["asr_domain_en"] == [] == sets["overheard"]


def test_files_of_a_judged_sample(tmp_path):
    frames = [Image.new("RGB", (112, 112), (40 * i, 0, 0)) for i in range(4)]
    sample = {"id": "x", "conversations": [], "video": frames}
    made = judged._with_files(tmp_path, 3, sample)
    assert made["video"] == "3.mkv"
    read = read_video(tmp_path / "3.mkv", 1.0)
    assert [np.asarray(frame)[0, 0, 0] for frame in read] == [0, 40, 80, 120]
    assert judged._with_files(tmp_path, 4, {"image": frames[1]}) == {"image": "4.png"}
    json.dumps(made)


def test_easy_vqa_in_sentences():
    samples = list(nano.easy_vqa("test"))
    assert len(samples) == 9673
    said = {one["conversations"][1]["value"] for one in samples}
    assert {"Yes.", "No.", "It is a circle.", "It is teal."} <= said and len(said) == 13
    assert all(talk.LANGS and one["image"].endswith(".png") for one in samples[:50])


def test_stages_of_the_small_model():
    file = nano.Path(__file__).parents[1] / "configs/nano.py"
    stages = [
        "0",
        "1_1",
        "1_2",
        "1_2b",
        "1_2c",
        "1_2d",
        "1_3",
        "2_1a",
        "2_1b",
        "2_2",
        "3_1",
        "3_1b",
        "3_1c",
        "3_2",
        "again_1_2",
    ]
    for before, stage in zip([None, *stages], stages):
        config = load_config(f"{file}:{stage}")
        assert config.model.name == "vita_nano" and config.dtype == "float32"
        if stage not in ("0", "2_1a", "3_1"):  # which start from nothing
            assert f"s{before}/" in str(config.init_from)
        assert bool(config.model.audio.num_units) == (stage == "2_1a")
    for stage, before in {
        "again_2_1a": "s3_2", "again_2_1b": "again_1_2", "again_2_2": "again_2_1b",
        "again_3_1": "s3_2", "again_3_2": "again_2_2", "third_1_2": "again_3_2",
        "third_2_1a": "again_2_1a", "third_2_1b": "again_3_2", "third_2_2": "third_1_2",
        "fourth_1_1": "third_1_2", "fourth_1_2": "third_2_2", "fourth_2_2": "fourth_1_2",
        "fourth_2_2b": "fourth_2_2", "fourth_3_2": "fourth_2_2b", "fifth_1_1": "fourth_1_1",
        "fifth_1_1b": "fifth_1_1", "fifth_1_2": "fourth_3_2", "fifth_2_1b": "fourth_3_2",
        "fifth_3_1": "fourth_3_2", "fifth_2_2": "fifth_1_2", "fifth_2_2b": "fifth_2_2",
        "sixth_1_2": "fifth_2_2b", "sixth_2_1b": "fifth_2_2b",
        "sixth_2_1c": "sixth_2_1b", "sixth_2_2": "sixth_1_2", "sixth_2_2b": "sixth_2_2",
        "sixth_2_2c": "sixth_2_2b", "seventh_1_1": "sixth_2_2c", "seventh_1_2": "sixth_2_2c",
        "seventh_2_1b": "sixth_2_1c", "seventh_2_2": "seventh_1_2", "eighth_1_1": "seventh_2_2",
        "eighth_1_2": "seventh_2_2", "eighth_2_1b": "seventh_2_2", "eighth_2_2": "eighth_1_2",
        "ninth_1_1": "eighth_2_2", "ninth_1_2": "eighth_2_2", "ninth_2_1b": "eighth_2_2",
        "ninth_2_1c": "ninth_2_1b", "ninth_2_2": "ninth_1_2", "tenth_1_1": "ninth_2_2",
        "tenth_1_2": "ninth_2_2", "tenth_2_1b": "ninth_2_2", "tenth_2_2": "tenth_1_2",
        "eleventh_1_2": "tenth_2_2", "eleventh_2_1b": "tenth_2_2", "eleventh_2_2": "eleventh_1_2",
        "twelfth_1_2": "eleventh_2_2", "twelfth_2_1b": "eleventh_2_2",
        "twelfth_2_2": "twelfth_mean", "thirteenth_1_2": "thirteenth_start",
        "thirteenth_2_1b": "thirteenth_start", "thirteenth_2_2": "thirteenth_mean",
        "fourteenth_1_2": "thirteenth", "fourteenth_2_1b": "thirteenth",
        "fourteenth_2_2": "fourteenth_mean",
    }.items():  # fmt: skip
        config = load_config(f"{file}:{stage}")
        assert f"/{before}/" in config.init_from[0] and config.model.audio.num_prompts == 4
        assert bool(config.model.audio.num_units) == stage.endswith("2_1a")
        # The voice reads word embeddings: they are the first round's ever after.
        assert not any(re.fullmatch(path, "llm/embedding") for path in config.trainable)
    with pytest.raises(KeyError):
        load_config(f"{file}:9")


@pytest.mark.parametrize("code, en, num_styles, name", [
    ("1F434", "horse face", 9, None),
    ("1F98E", "lizard", 8, "lizard"),
    ("1F98E", "lizard", 7, None),
    ("1F34E", "red apple", 9, "apple"),  # asked about, by this name
    ("1FA91", "chair", 4, "chair"),
    ("1F33B", "sunflower", 9, "sunflower"),  # called a flower, too
])  # fmt: skip
def test_familiar(code, en, num_styles, name):
    found = nano.familiar(Concept(code, en, "它", 3, "animal", (), ()), num_styles)
    assert (found and found.en) == name and (not found or (found.zh == "它") == (found.en == en))
