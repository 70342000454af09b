"""vita_jax/demo.py, `vita demo` and the picture that it draws."""

import numpy as np
import pytest
from PIL import Image, ImageColor

from vita_jax import checkpoint, cli, demo, plot
from vita_jax.data.audio import SAMPLE_RATE_HZ, read_audio
from vita_jax.infer import voice


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    checkpoint.initialize("vita_tiny", folder)
    return folder


def coloured(pixels, colour):
    """How many pixels are exactly of a colour."""
    return (pixels == ImageColor.getrgb(colour)).all(axis=-1).sum()


def test_three_questions_three_rows(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(voice, "MAX_CODES", 20)
    monkeypatch.setattr(demo, "MAX_NEW_TOKENS", 8)
    assert cli.main(["demo", str(tiny), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "untrained" in printed
    for question in demo.QUESTIONS:
        assert f"{question.audio.name}" in printed and question.text in printed
    for word in ("reply", "state", "times", "saved"):
        assert printed.count(f"  {word}  ") == 3
    assert printed.count("first token") == 3
    for file in (tmp_path / "out").glob("*.wav"):
        assert str(file) in printed and np.abs(read_audio(file)).max() > 0

    picture = np.asarray(Image.open(tmp_path / "out" / "demo.png").convert("RGB"))
    assert picture.shape == (900, 1600, 3)
    rows = np.split(picture, 3)
    assert all(coloured(row, plot.QUESTION) > 500 for row in rows)
    shown = [row[:, :290].reshape(-1, 3) for row in rows]
    # Cat and apples are there, the noise is about no picture.
    assert [len(np.unique(pixels, axis=0)) > 50 for pixels in shown] == [True, True, False]
    assert not np.array_equal(shown[0], shown[1])


def row(**more):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 16000).astype(np.float32)
    return {
        "image": None, "question": noise, "question_rate_hz": 16000, "asked": "What?",
        "answer": noise, "answer_rate_hz": 16000, "replied": "", "note": "",
    } | more  # fmt: skip


def ink(tmp_path, text):
    """Pixels of the panel on the right in which a reply is `text`, without the waveform."""
    plot.answers([row(replied=text, answer=np.zeros(0, np.float32))], tmp_path / "one.png")
    return np.asarray(Image.open(tmp_path / "one.png").convert("L"))[:80, 900:]


def test_chinese_is_drawn_without_an_installed_font(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "HAN_FONTS", ())
    cat, dog, box = (ink(tmp_path, text) for text in ("这是猫。", "这是狗。", "\U0001f408" * 4))
    assert (cat < 128).sum() > 100
    assert not np.array_equal(cat, dog)
    assert not np.array_equal(cat, box)


def test_text_is_words_not_mathematics(tmp_path):
    assert (ink(tmp_path, "$x_1$ and \x07 $") < 128).sum() > 100


def test_a_long_reply_stays_in_its_row(tmp_path):
    long = plot._wrap("many words " * 40, 64)
    assert long.count("\n") == 1 and long.endswith("…") and max(map(len, long.split("\n"))) <= 64
    assert max(map(len, plot._wrap("猫" * 200, 64).split("\n"))) <= 32


def test_seconds_are_of_one_scale(tmp_path):
    plot.answers([row(), row(question=row()["question"][:8000])], tmp_path / "two.png")
    picture = np.asarray(Image.open(tmp_path / "two.png").convert("RGB"))
    blue = (picture == ImageColor.getrgb(plot.QUESTION)).all(axis=-1)
    whole, half = (np.flatnonzero(part.any(axis=0)) for part in np.split(blue, 2))
    assert whole[0] == pytest.approx(half[0], abs=1)
    assert np.ptp(half) / np.ptp(whole) == pytest.approx(0.5, abs=0.02)


def test_samples_are_what_they_should_be():
    for question in demo.QUESTIONS:
        waveform = read_audio(question.audio)
        assert 1 < len(waveform) / SAMPLE_RATE_HZ < 2 and 0.1 < np.abs(waveform).max() < 1
        if question.image:
            assert Image.open(question.image).size == (336, 336)


def test_without_the_shipped_checkpoint(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "SHIPPED", tmp_path / "nano")
    assert cli.main(["demo"]) == 2
    assert "vita init" in capsys.readouterr().err
