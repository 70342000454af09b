"""vita_jax/data/splice.py: a spliced clip, heard tone by tone, says what its sample asks for."""

import json
import re

import numpy as np
import pytest

from vita_jax.data import splice, talk, voices
from vita_jax.data.sources import open_source

RATE = voices.RATE_HZ
WORD_S = 0.2
TONES = {  # of each word, in Hz
    word: 400 + 200 * i
    for i, word in enumerate("what is the cat where a dog 狗 在 哪 里 猫 呢".split())
}
CLIPS = [  # what of which voice
    ("en", "af_bella", ["what", "is", "the", "cat"]),
    ("en", "af_bella", ["where", "is", "a", "dog"]),
    ("zh", "zm_yunxi", ["狗", "在", "哪", "里"]),
    ("zh", "zm_yunxi", ["猫", "呢"]),
]


def tone(words):
    time = np.arange(round(WORD_S * RATE)) / RATE
    return np.concatenate([np.sin(2 * np.pi * TONES[word] * time) for word in words]) * 0.5


@pytest.fixture
def folder(tmp_path):
    """Words are tones, silence is around them, and "is" and "the" run into each other."""
    quiet = np.zeros(round(0.3 * RATE))
    lines = []
    for lang, voice, words in CLIPS:
        wave = np.concatenate([quiet, tone(words), quiet]).astype(np.float32)
        row = {"text": " ".join(words), "lang": lang, "voice": voice, "kind": "question"}
        file = voices.keep(tmp_path / "speech", row | {"split": "train"}, wave, RATE)["file"]
        at = [0.3 + WORD_S * i for i in range(len(words) + 1)]
        if "the" in words:
            at[2] = None
        row = {"file": file, "lang": lang, "voice": voice, "words": words, "at": at}
        lines.append(json.dumps(row) + "\n")
    (tmp_path / "speech" / splice.CUTS).write_text("".join(lines), "utf-8")
    return tmp_path


def heard(wave):
    """The words of a clip of tones."""
    size = round(WORD_S * RATE)
    loud = np.flatnonzero(np.abs(wave) > 0.05)
    wave, said = wave[loud[0] : loud[-1] + 1], []
    for at in np.arange(0.5, len(wave) / size):
        middle = wave[int(at * size) - 1200 : int(at * size) + 1200]
        pitch = np.fft.rfftfreq(len(middle) * 8, 1 / RATE)[
            np.abs(np.fft.rfft(middle * np.hanning(len(middle)), len(middle) * 8)).argmax()
        ]
        said.append(min(TONES, key=lambda word: abs(TONES[word] - pitch)))
    return said


def test_says_what_it_asks_for(folder):
    source = open_source(f"{folder}#spliced")
    assert source.media == {"audio"} and len(source) == splice.LENGTH
    texts, langs = set(), set()
    for index in range(60):
        with source.open(index) as sample:
            (question, reply) = (turn["value"] for turn in sample["conversations"])
            [(wave, rate)] = sample["audio"]
        assert rate == RATE and wave.dtype == np.float32
        lang = "en" if reply.isascii() else "zh"
        words = heard(wave)
        assert voices.question(words, lang) == reply
        assert question == f"<audio>{talk.TRANSCRIBE[lang]}"
        assert len(words) <= splice.PIECES[1] * splice.WORDS[lang][1]
        # These two are never parted.
        assert all(before == "is" for before, word in zip(["", *words], words) if word == "the")
        texts.add(reply)
        langs.add(lang)
    assert langs == {"en", "zh"} and len(texts) > 40  # of ten words
    again = open_source(f"{folder}#spliced").sample(7)
    np.testing.assert_array_equal(again["audio"][0][0], source.sample(7)["audio"][0][0])


def test_joins_without_a_click():
    one, other = np.ones(4800, np.float32), -np.ones(4800, np.float32)
    wave = splice.joined([one, other, one], np.random.default_rng(1))
    size = round(splice.FADE_S * RATE)
    assert np.abs(np.diff(wave)).max() < 3 / size and wave[0] == 0 == wave[-1]
    # Half of a fade is of either side.
    assert abs((wave > 0).sum() - 2 * 4800) < 3 * size > abs((wave < 0).sum() - 4800)
    assert 3 * 4800 < len(wave) < 3 * 4800 + 2 * splice.MAX_SILENCE


def test_cuts_are_found_once(tmp_path, monkeypatch):
    asked = []

    class Stand:
        def __init__(self, packages):
            assert packages == "packages"

        def __call__(self, text, lang, voice):
            asked.append(text)
            return text.split(), [0.1, None, 0.3]

    monkeypatch.setattr(splice, "Timing", Stand)
    speech = tmp_path / "speech"
    for text, split in (("a cat", "train"), ("a dog", "held_out"), ("an ox", "train")):
        row = {"text": text, "lang": "en", "voice": "af_bella", "kind": "question", "split": split}
        voices.keep(speech, row, np.zeros(2400, np.float32), RATE)
        splice.write_cuts(speech, "packages")
    assert asked == ["a cat", "an ox"]
    rows = list(map(json.loads, (speech / splice.CUTS).read_text("utf-8").splitlines()))
    assert [row["words"] for row in rows] == [["a", "cat"], ["an", "ox"]]
    assert rows[0]["at"] == [0.1, None, 0.3] and rows[0]["voice"] == "af_bella"
    assert rows[0]["file"] == voices.clips(speech)[0]["file"]


def test_when_words_are_said():
    sounds = {"what": "wʌt", "of": "ʌv", "the": "ðə", "cat": "kæt", "going": "ɡəʊɪŋ", "to": "tə"}
    timing = object.__new__(splice.Timing)

    def symbols(text, lang):
        text = "".join(sounds.get(part, part) for part in re.split(r"(\W)", text.lower()))
        merged = text.replace("ʌv ðə", "ʌvðə").replace("ɡəʊɪŋ tə", "ɡənə")  # as one word; shorter
        return list(merged.replace("k", "ˈk"))

    timing._symbols = symbols
    timing._run = lambda symbols, voice: np.array([4.0, *(2.0 for _ in symbols), 6.0])
    unit, lead = splice.DURATION_S, splice.LEAD_S
    words, at = timing("What of the cat?", "en", "af_bella")
    assert words == ["what", "of", "the", "cat"]
    # Symbols: 3 of "what", a space, 4 of "of the" as one word, a space, stress and 3 of "cat".
    frames = [4, 4 + 2 * 3.5, 4 + 2 * 6, 4 + 2 * 8.5, 4 + 2 * 13]
    np.testing.assert_allclose(at, unit * np.array(frames) - lead, atol=1e-4)
    words, at = timing("Going to the cat?", "en", "af_bella")
    assert [second is None for second in at] == [False, True, False, False, False]
    timing._symbols = lambda text, lang: list(
        "".join({"猫": "mau→", "呢": "nɤ"}.get(c, c) for c in text)
    )
    words, at = timing("猫呢？", "zh", "zm_yunxi")
    assert words == ["猫", "呢"]
    np.testing.assert_allclose(at, unit * np.array([4, 12, 16]) - lead, atol=1e-4)


def test_no_cuts(tmp_path):
    with pytest.raises(FileNotFoundError, match="cuts.jsonl: no such list; vita data build"):
        open_source(f"{tmp_path}#spliced")
