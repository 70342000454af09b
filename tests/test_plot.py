"""The timeline: marks and waveforms stand where the clock says."""

import numpy as np
from PIL import Image, ImageColor

from vita_jax import plot


def columns(picture, color, least=1):
    """Indices of the columns with at least `least` pixels of exactly `color`."""
    return np.flatnonzero((picture == ImageColor.getrgb(color)).all(axis=-1).sum(axis=0) >= least)


def draw(tmp_path, question, answer, events):
    path = tmp_path / "reply.png"
    plot.timeline(question, 16000, answer, 24000, events, path)
    return np.asarray(Image.open(path).convert("RGB"))


def test_marks_and_waveforms_share_one_time_axis(tmp_path):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 60000).astype(np.float32)
    events = {"first sound": 1.0, "first token": 0.5}
    picture = draw(tmp_path, noise[:32000], noise[:48000], events)  # 2 seconds each
    assert picture.shape == (500, 1600, 3)

    marks = columns(picture, plot.MARK, least=250)
    first = marks[np.diff(marks, prepend=-2) > 1]
    assert len(first) == 2
    pixels_per_second = (first[1] - first[0]) / 0.5
    zero = first[0] - 0.5 * pixels_per_second

    def seconds(pixel):
        return (pixel - zero) / pixels_per_second

    question, answer = (columns(picture, c, least=50) for c in (plot.QUESTION, plot.ANSWER))
    np.testing.assert_allclose(seconds(question[[0, -1]]), [-2, 0], atol=0.03)
    np.testing.assert_allclose(seconds(answer[[0, -1]]), [1, 3], atol=0.03)


def test_typed_question_and_silent_answer(tmp_path):
    nothing = np.zeros(0, np.float32)
    picture = draw(tmp_path, nothing, nothing, {"first token": 0.2})
    assert not columns(picture, plot.QUESTION).size and not columns(picture, plot.ANSWER).size
    assert columns(picture, plot.MARK, least=250).size
