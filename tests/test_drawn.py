"""Samples that are drawn when they are asked for, over a folder of made-up drawings."""

import json
import re

import numpy as np
import pytest
import soundfile
from PIL import Image

from vita_jax.data import scenes, talk, voices
from vita_jax.data.drawn import KINDS, DrawnSource, captions
from vita_jax.data.sources import open_source

LEVELS = {word: 0.2 + 0.08 * i for i, word in enumerate("what is it this 这 是 猫 什 么".split())}
WORD_SAMPLES = 4800  # of a word, in which the sound has its level


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two styles of the nouns and two other things, each a disc of its own colour; recordings."""
    root = tmp_path_factory.mktemp("drawn")
    rng, rows = np.random.default_rng(0), []
    things = [(code, en, zh, 3, "animal-mammal") for en, (code, zh, _) in talk.NOUNS.items()]
    things += [("A1", "hammer", "锤子", 7, "tool"), ("A2", "salt", "盐", 4, "food-prepared")]
    for code, en, zh, kind, subgroup in things:
        for style in ("one", "other"):
            drawing = np.zeros((48, 48, 4), np.uint8)
            inside = np.hypot(*np.mgrid[-24:24, -24:24]) < 20
            drawing[inside] = [*rng.integers(0, 255, 3), 255]
            path = root / "drawings" / style / f"{code}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(drawing).save(path)
        concept = {"code": code, "en": en, "zh": zh, "kind": kind, "subgroup": subgroup}
        rows.append(
            {"concept": concept | {"tags_en": [], "tags_zh": []}, "styles": ["one", "other"]}
        )
    (root / "concepts.json").write_text(json.dumps(rows))
    (root / "speech").mkdir()
    clips = [
        {"file": "a.flac", "text": "What is this?", "kind": "question", "split": "train"},
        {"file": "b.flac", "text": "What is this?", "kind": "question", "split": "held_out"},
        {"file": "c.flac", "text": "这是什么？", "kind": "question", "split": "train"},
        {"file": "d.flac", "text": "What is this?", "kind": "answer", "split": "train"},
    ]
    (root / "speech" / "manifest.jsonl").write_text("\n".join(map(json.dumps, clips)))
    said = [("en", "what is it"), ("en", "this"), ("zh", "这 是 猫"), ("zh", "什 么")]
    with (root / "speech" / "cuts.jsonl").open("w", encoding="utf-8") as cuts:
        for number, (lang, words) in enumerate(said):
            words, file = words.split(), f"said{number}.wav"
            wave = np.repeat([LEVELS[word] for word in words], WORD_SAMPLES)
            soundfile.write(root / "speech" / file, wave, voices.RATE_HZ)
            at = [WORD_SAMPLES * i / voices.RATE_HZ for i in range(len(words) + 1)]
            row = {"file": file, "lang": lang, "voice": "one", "words": words, "at": at}
            cuts.write(json.dumps(row) + "\n")
    return root


def test_a_sample_is_made_of_its_number(folder):
    for kind in KINDS:
        source, again = (open_source(f"{folder}#{kind}") for _ in range(2))
        with source.open(7) as one, again.open(7) as same, source.open(8) as other:
            assert one["conversations"] == same["conversations"]
            assert one["id"] == f"{kind} 7" != other["id"]
            if "image" in one:
                assert one["image"].tobytes() == same["image"].tobytes()


def test_questions_fit_what_is_drawn(folder):
    source = DrawnSource(f"{folder}#qa")
    seen = set()
    for index in range(120):
        sample = source.sample(index)
        turns = sample["conversations"]
        marks = [mark for mark in ("image", "video") if f"<{mark}>\n" in turns[0]["value"]]
        assert marks == [key for key in ("image", "video") if key in sample]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert not any("<" in turn["value"] for turn in turns[1:])
        seen |= {answer["value"] for answer in turns[1::2]}
        if "video" in sample:
            assert len(sample["video"]) == 4
    for answer in ("I do not know.", "There are three cats.", "The cat is on the left."):
        assert any(answer.split()[0] in text for text in seen), answer
    assert len(seen) > 70


def test_spoken_samples_begin_with_what_was_recorded(folder):
    found = []
    for kind in ("qa", "spoken"):
        source = DrawnSource(f"{folder}#{kind}")
        samples = [source.sample(index) for index in range(180)]
        asked = [sample["conversations"][0]["value"].rpartition("\n")[2] for sample in samples]
        heard = ["recordings" in sample for sample in samples]
        assert heard == [question in ("What is this?", "这是什么？") for question in asked]
        found.append(sum(heard))
    assert found[1] > 4 > found[0]


def test_pieced_samples_say_what_they_ask(folder):
    source = DrawnSource(f"{folder}#pieced")
    heard = 0
    for index in range(120):
        sample = source.sample(index)
        question = sample["conversations"][0]["value"].rpartition("\n")[2]
        lang = "en" if question.isascii() else "zh"
        words = voices.words_of(question, lang)
        known = LEVELS.keys() >= set(words)
        assert ("recordings" in sample) == known
        if known:
            [(wave, rate)] = sample["recordings"]
            ends = np.flatnonzero(np.abs(wave) > 0.1)[[0, -1]]
            at = np.linspace(*ends, 2 * len(words) + 1)[1::2].astype(int)
            np.testing.assert_allclose(wave[at], [LEVELS[word] for word in words], atol=1e-3)
            assert rate == voices.RATE_HZ and abs(np.ptp(ends) - WORD_SAMPLES * len(words)) < 600
            heard += 1
    assert heard > 5


@pytest.mark.parametrize("kind", ["captions", "views"])
def test_captions_name_in_both_languages_what_a_picture_shows(folder, kind):
    source = DrawnSource(f"{folder}#{kind}")
    named = [[talk.name(c.en, c.zh, lang) for lang in talk.LANGS] for c in source.concepts]
    for index in range(20):
        sample = source.sample(index)
        question, answer = (turn["value"] for turn in sample["conversations"])
        assert question == "<image>\n" and sample["image"].size == (112, 112)
        assert answer.split("\n") in named


@pytest.mark.parametrize("kind", ["captions", "views", "quarters", "labels"])
def test_captions_are_all_that_is_said_without_a_question(folder, kind):
    source = DrawnSource(f"{folder}#{kind}")
    listed = captions(source.concepts)
    # 22 names, with four places each; 20 nouns in 6 numbers, 5 places and 10 colours; 24 shapes.
    assert len(set(listed)) == len(listed) == 22 * 5 + 20 * 21 + 24
    turns = [turn for i in range(60) for turn in source.sample(i)["conversations"]]
    said = {turn["value"] for turn in turns[1::2]}
    assert len(said) > 10 and said <= set(listed)
    if kind == "labels":  # as questions are answered
        assert said & {talk.count(3, noun, "en") + "\n" + talk.count(3, noun, "zh")
                       for noun in talk.NOUNS}  # fmt: skip


def test_names_are_asked_in_both_languages(folder):
    source = DrawnSource(f"{folder}#names")
    for index in range(20):
        replies = [turn["value"] for turn in source.sample(index)["conversations"][1::2]]
        both = [[talk.name(c.en, c.zh, lang) for lang in talk.LANGS] for c in source.concepts]
        assert sorted(replies) in [sorted(names) for names in both]


PLACES = [["top", "left"], ["top", "right"], ["bottom", "left"], ["bottom", "right"]]
TOLD = [[text for side in sides for text in talk.SIDES[side]] for sides in PLACES]


@pytest.mark.parametrize("kind", ["mosaics", "quarters"])
def test_four_things_are_named_in_the_order_they_are_read(kind, folder, monkeypatch):
    source, shown = DrawnSource(f"{folder}#{kind}"), []
    mosaic = scenes.mosaic
    monkeypatch.setattr(scenes, "mosaic", lambda *args, **k: shown.append(args[1]) or mosaic(*args))
    code_of = {}
    for concept in source.concepts:
        for lang in talk.LANGS:
            code_of[talk.name(concept.en, concept.zh, lang)] = concept.code
    for index in range(10):
        values = [turn["value"] for turn in source.sample(index)["conversations"]]
        named = [re.findall(r"[^.。]+[.。]", answer) for answer in values[1::2]]
        codes = [code_of[name.strip()] for names in named for name in names]
        if kind == "quarters":  # each in both languages
            assert values[2::2] == [""] * 3 and codes[::2] == codes[1::2]
            assert [answer.split("\n")[2:] for answer in values[1::2]] == TOLD
            codes = codes[::2]
        assert values[0] == "<image>\n" and len(codes) == 4
        for code, drawing in zip(codes, shown[-1]):
            known = [source.drawing(code, style) for style in source.styles[code]]
            assert any(np.array_equal(drawing, one) for one in known)


def test_questions_of_any_kind_are_asked_without_a_picture(folder):
    source, asked = DrawnSource(f"{folder}#talk"), set()
    none = {talk.said("no_picture", lang) for lang in talk.LANGS}
    for index in range(300):
        sample = source.sample(index)
        assert "image" not in sample and "video" not in sample
        values = [turn["value"] for turn in sample["conversations"]]
        asked |= {question for question, reply in zip(values[::2], values[1::2]) if reply in none}
    for task in ("count", "move", "shape", "see"):
        assert asked & {form for lang in talk.LANGS for form in talk.forms(task, lang, False)}


def test_labels_say_what_is_drawn(folder, monkeypatch):
    source, drawn = DrawnSource(f"{folder}#labels"), []
    group, arrange = scenes.group, scenes.arrange
    monkeypatch.setattr(
        scenes, "group", lambda rng, things, *a: drawn.append(len(things)) or group(rng, things, *a)
    )
    monkeypatch.setattr(
        scenes, "arrange", lambda *a, **k: drawn.append(a[2][0]) or arrange(*a, **k)
    )
    seen = set()
    for index in range(60):
        drawn.clear()
        question, answer = (turn["value"] for turn in source.sample(index)["conversations"])
        assert question == "<image>\n"
        for side, (en, zh) in talk.SIDES.items():
            if f" is {en}." in answer:
                assert drawn == [side] and zh in answer
                seen.add(side)
        for number, word in enumerate(talk.COUNTS, 1):
            if f" {word} " in answer:
                assert drawn == [number] and talk.COUNTS[word] in answer
                seen.add(word)
    assert len(seen) > 8


def test_every_so_many_concepts(folder):
    concepts = DrawnSource(f"{folder}#captions").concepts
    assert DrawnSource(f"{folder}#captions:3").concepts == concepts[::3]
    with pytest.raises(ValueError, match="EVERY a number"):
        DrawnSource(f"{folder}#captions:x")


@pytest.mark.parametrize("kind, pattern", [
    ("count", r"There (is|are) \w+ \w+\.|有.+。|Yes, .+\.|No, there is not\.|是的.+|没有。"),
    ("move", r"The \w+ moves (to the left|to the right|up|down)\.|.+向.移动。"),
    ("colour", r"The \w+ is .+\.|.+是.+的。|Yes, it is\.|No, it is not\.|是的。|不是。|.+在.+。"),
])  # fmt: skip
def test_answers_are_of_the_task(folder, kind, pattern):
    source = DrawnSource(f"{folder}#{kind}")
    for index in range(30):
        for turn in source.sample(index)["conversations"][1::2]:
            assert re.fullmatch(pattern, turn["value"]), turn["value"]


def test_recordings_of_the_first_question(folder):
    counts = {"train": 0, "held_out": 0}
    for split, allowed in (("", {"a.flac", "c.flac"}), ("-held_out", {"b.flac"})):
        source = DrawnSource(f"{folder}#names{split}")
        for index in range(100):
            sample = source.sample(index)
            files = {file.rpartition("/")[2] for file in sample.get("recordings", ())}
            assert files <= allowed
            counts[source.split] += bool(files)
    assert counts["train"] > 0 and counts["held_out"] == 0  # that form is trained on


def test_held_out_asks_other_questions(folder):
    def asked(name):
        source = DrawnSource(f"{folder}#{name}")
        return {source.sample(i)["conversations"][0]["value"] for i in range(60)}

    trained, held_out = asked("names"), asked("names-held_out")
    assert trained and held_out and not trained & held_out
    assert len(DrawnSource(f"{folder}#names-held_out")) < len(DrawnSource(f"{folder}#names"))


def test_main_styles_are_seen_most_and_tested_on(folder, monkeypatch):
    # Of those to learn from half are restyled: of these half are in any style, a fifth redrawn.
    drawn = []

    def drawing(source, code, style):
        drawn.append(style)
        return np.full((16, 16, 4), 255, np.uint8)

    restyled = []
    monkeypatch.setattr(DrawnSource, "drawing", drawing)
    monkeypatch.setattr(scenes, "restyle", lambda rng, x, dark: restyled.append(x) or x)
    for split, (least, most) in {"": (155, 195), "-held_out": (200, 200)}.items():
        source = DrawnSource(f"{folder}#names{split}")
        source.styles = {code: ["one", "noto"] for code in source.styles}
        drawn.clear(), restyled.clear()
        for index in range(200):
            source.sample(index)
        assert least <= drawn.count("noto") <= most and len(drawn) == 200
        assert 8 <= len(restyled) <= 32 if not split else not restyled


def test_another_kind_is_refused(folder):
    with pytest.raises(ValueError, match="#nothing-new: expected .*, KIND one of capt"):
        DrawnSource(f"{folder}#nothing-new")
