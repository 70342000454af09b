"""Speech for the small model: what is to be said by whom, and that it is said once."""

import collections
import json
import types

import numpy as np
import pytest
import soundfile

from vita_jax.data import talk, voices
from vita_jax.data.concepts import Concept

CONCEPTS = [
    Concept(f"A{i}", en, zh, 3, "animal-mammal", (), ())
    for i, (en, zh) in enumerate([("cat", "猫"), ("dog", "狗"), ("ox", "牛"), ("elk", "麋鹿")])
]
UNSEEN = [("It rains.", "下雨了。"), ("I read.", "我看书。")]


def test_jobs():
    jobs = voices.jobs(CONCEPTS, UNSEEN)
    assert jobs == voices.jobs(CONCEPTS, UNSEEN) != voices.jobs(CONCEPTS, UNSEEN, seed=1)
    for kind, lang, voice, text, split in jobs:
        assert text.isascii() == (lang == "en")
        assert (voice in voices.HELD_OUT[lang]) == (split == "held_out")
        assert (voice == voices.ANSWERS[lang]) >= (kind in ("answer", "sentence"))
        assert (split == "unseen") == (kind == "sentence")
        assert voice in (*voices.VOICES[lang], *voices.HELD_OUT[lang])
    asked = [job for job in jobs if job[0] == "question" and job[4] == "train"]
    for lang, number in (("en", 60), ("zh", 60)):
        assert len({text for _, tongue, _, text, _ in asked if tongue == lang}) > number
    by_text = {}
    for _, _, voice, text, _ in asked:
        by_text.setdefault(text, set()).add(voice)
    assert len(by_text["What is this?"]) == voices.NUM_VOICES == 6
    mixed = {lang: [job[3] for job in jobs if job[:2] == ("mixed", lang)] for lang in talk.LANGS}
    for lang, texts in mixed.items():
        assert len(texts) == voices.NUM_MIXED and len(set(texts)) > 0.95 * len(texts)
        known = {text for _, tongue, _, text, _ in asked if tongue == lang}
        assert len(set(texts) & known) < 0.05 * len(texts)  # nobody asks this
        said = set("".join(known).lower()) | set(" ?？")
        assert all(set(text.lower()) <= said and text[-1] in "?？" for text in texts)
    assert all(1 < len(text.split()) <= 12 for text in mixed["en"])
    # In English no word of a question is said seldom.
    words = [job[3] for job in jobs if job[0] == "words"]
    assert {job[1] for job in jobs if job[0] == "words"} == {"en"}
    assert all(1 <= len(text.split()) <= 5 and text[-1] == "?" for text in words)
    first = [
        job[3] for job in jobs if job[1::3] == ("en", "train") and job[0] in ("question", "mixed")
    ]
    first, more = (
        collections.Counter(word for text in texts for word in voices.words_of(text.lower(), "en"))
        for texts in (first, words)
    )
    assert set(more) < set(first) and min((first + more).values()) >= voices.NUM_SAID
    # A change of one thing leaves what others say as it was.
    fewer = voices.jobs(CONCEPTS[1:], UNSEEN)
    assert set(fewer) < set(jobs) and len(jobs) - len(fewer) == 4
    # Any beginning has some of each kind.
    kinds = {job[0] for job in jobs[:40]}
    assert kinds == {"question", "answer", "name", "sentence", "mixed", "words"}


def test_speaks_what_is_not_there_yet(tmp_path, monkeypatch):
    said = []

    class Stand:
        def __init__(self, packages):
            assert packages == "packages"

        def __call__(self, text, lang, voice):
            said.append((voice, text))
            return np.full(2400, 0.25, np.float32), 24000

    monkeypatch.setattr(voices, "Kokoro", Stand)
    jobs = voices.jobs(CONCEPTS, UNSEEN)[:6]
    first = list(voices.speak(jobs[:3], tmp_path, "packages"))
    assert [row["text"] for row in first] == [job[3] for job in jobs[:3]]
    list(voices.speak(jobs, tmp_path, "packages"))
    assert said == [job[2:4] for job in jobs]
    rows = voices.clips(tmp_path)
    assert len(rows) == 6 == len({row["file"] for row in rows})
    for row in rows:
        waveform, rate = soundfile.read(tmp_path / row["file"])
        assert rate == 24000 and row["seconds"] == 0.1 and np.allclose(waveform, 0.25, atol=1e-4)
    assert list(voices.speak(jobs, tmp_path, "packages")) == []


def test_a_voice_between_two_is_the_mean_of_their_styles():
    assert len(set(voices.VOICES["zh"])) == 21  # six, and each two of these
    for voice in voices.VOICES["zh"]:
        assert not set(voice.split("+")) & set(voices.HELD_OUT["zh"])
    fed = []

    class Net:
        def get_inputs(self):
            return [types.SimpleNamespace(name="ids")]

        def run(self, _, feed):
            fed.append(feed)
            return [np.zeros((1, 4), np.float32)]

    kokoro = object.__new__(voices.Kokoro)
    kokoro._net, kokoro._phonemes, kokoro._vocabulary = Net(), {"zh": str}, {"a": 7}
    low, high = (np.full((510, 1, 256), value, np.float32) for value in (1, 4))
    kokoro._voices = {"zf_low": low.tobytes(), "zm_high": high.tobytes()}
    for voice, style in (("zf_low", 1), ("zf_low+zm_high", 2.5)):
        _, rate = kokoro("aa", "zh", voice)
        assert rate == voices.RATE_HZ and fed[-1]["ids"].tolist() == [[0, 7, 7, 0]]
        assert fed[-1]["style"].dtype == np.float32 and (fed[-1]["style"] == style).all()


def test_programs_that_are_not_there():
    with pytest.raises(FileNotFoundError, match="no-such-program: not installed.*apt-get install"):
        voices.Command("no-such-program", ("{text}",))


def test_a_program_speaks(tmp_path):
    script = tmp_path / "speak.py"
    script.write_text(
        "import sys, wave\n"
        "text, voice, file = sys.argv[1:]\n"
        "out = wave.open(file, 'wb'); out.setparams((1, 2, 16000, 0, 'NONE', ''))\n"
        "out.writeframes(bytes(2 * 100 * len(text)) if voice == 'low' else b'')\n"
    )
    import sys

    command = voices.Command(sys.executable, (str(script), "{text}", "{voice}", "{file}"))
    waveform, rate = command("abc", "en", "flite-low")
    assert waveform.shape == (300,) and waveform.dtype == np.float32 and rate == 16000


def test_recorded_prompts_are_split_by_text(tmp_path):
    import gzip

    import av

    folder = tmp_path / "asterisk" / "sounds"
    folder.mkdir(parents=True)
    lines = ["; a comment", "beep: [a tone]"]
    for i in range(200):
        lines.append(f"p{i}: Prompt number {'abcdefghij'[i % 10]} {'klmnopqrst'[i // 10 % 10]}.")
        with av.open(str(folder / f"p{i}.g722"), "w", format="g722") as file:
            stream = file.add_stream("g722", rate=16000, layout="mono")
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 320), np.int16), "s16", "mono")
            frame.sample_rate = 16000
            file.mux(stream.encode(frame))
            file.mux(stream.encode())
    (folder / "core-sounds-en.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    prompts = list(voices.prompts(tmp_path))
    assert len(prompts) == 200 and all(len(wave) == 320 for _, wave, _, _ in prompts)
    held_out = {text for text, _, _, split in prompts if split == "held_out"}
    trained = {text for text, _, _, split in prompts if split == "train"}
    assert not held_out & trained and len(held_out | trained) == 100
    assert json.dumps(sorted(held_out)) == json.dumps(
        sorted({text for text, _, _, split in voices.prompts(tmp_path) if split == "held_out"})
    )
