import json
import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from vita_jax.data import video
from vita_jax.data.video import choose_frames, read_video


def write_video(path, num_frames, fps=10, header_fps=None):
    """A video of 64x48 in which frame i is grey of level 5 * i, its upper left quarter white."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=header_fps or fps)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.bit_rate = 10_000_000
        container.start_encoding()
        for index in range(num_frames):
            pixels = np.full((48, 64, 3), 5 * index, np.uint8)
            pixels[:24, :32] = 255
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def levels(pictures):
    """Which frame each picture is."""
    return [round(np.asarray(picture)[30:, 40:].mean() / 5) for picture in pictures]


@pytest.mark.golden
def test_choice_equals_the_recording(golden_dir):
    cases = json.loads((golden_dir / "image_preprocessing.json").read_text())["video_frame_choice"]
    assert cases
    for case in cases:
        expected, rate = case.pop("indices"), case.pop("framerate")
        assert choose_frames(rate=rate, **case) == expected, case


def test_choice_of_a_part():
    assert choose_frames(10, 100, start_s=6, end_s=2) == [20, 30, 40, 50, 60]
    assert choose_frames(10, 100, start_s=3, end_s=3) == [30, 30, 30, 40]
    assert choose_frames(10, 100, start_s=8) == [80, 80, 80, 90]
    assert choose_frames(10, 100, end_s=3) == [0, 10, 20, 30]
    assert choose_frames(10, 100, start_s=5, end_s=500) == [50, 60, 70, 80, 90]


def test_choice_at_other_rates():
    assert choose_frames(10, 30, rate=2) == [0, 5, 10, 15, 20, 25]
    assert choose_frames(10, 6, rate=100) == [0, 1, 2, 3, 4, 5]
    assert choose_frames(10, 100, rate=0.1) == [0, 0, 0, 0]
    assert choose_frames(10, 100, max_frames=4) == [0, 30, 60, 90]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(rate=0), "rate=0"),
        (dict(rate=float("nan")), "rate=nan"),
        (dict(start_s=10), "a video of 10.0 s has no frames from 10 s to the end"),
        (dict(start_s=11, end_s=20), "no frames from 11 s to 20 s"),
    ],
)
def test_choice_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        choose_frames(10, 100, **options)


@pytest.mark.parametrize("ending", ["mp4", "mkv", "avi"])  # an mkv does not state its frame count
def test_reads_the_chosen_frames(tmp_path, ending):
    path = write_video(tmp_path / f"clip.{ending}", num_frames=45)
    pictures = read_video(path)
    assert levels(pictures) == [0, 10, 20, 30, 40]
    assert {picture.mode for picture in pictures} == {"RGB"}
    assert {picture.size for picture in pictures} == {(64, 48)}
    assert levels(read_video(str(path), rate=2)) == [0, 5, 10, 15, 20, 25, 30, 35, 40]


def test_repeats_frames_of_a_short_video(tmp_path):
    assert levels(read_video(write_video(tmp_path / "short.mp4", num_frames=1))) == [0, 0, 0, 0]
    assert levels(read_video(write_video(tmp_path / "clip.mp4", num_frames=12))) == [0, 0, 0, 10]


def test_thins_a_long_video(tmp_path):
    path = write_video(tmp_path / "long.mp4", num_frames=50)
    assert levels(read_video(path, rate=10)) == choose_frames(10, 50, rate=10)
    assert len(read_video(path, rate=10)) == 16


def test_rate_comes_from_the_times_of_the_frames(tmp_path):
    path = write_video(tmp_path / "slow.mkv", num_frames=20, fps=2, header_fps=30)
    assert levels(read_video(path)) == list(range(0, 20, 2))


def test_counts_again_if_packets_show_nothing(tmp_path, monkeypatch):
    path = write_video(tmp_path / "clip.mp4", num_frames=25)
    monkeypatch.setattr(video, "_measure", lambda path: (10.0, 60))
    assert levels(read_video(path)) == choose_frames(10, 25)


def test_turns_upright(tmp_path):
    path = write_video(tmp_path / "phone.mp4", num_frames=10)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44
    one = 1 << 16  # the matrix of a telephone held upright: to be shown turned clockwise
    data[matrix : matrix + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    pixels = np.asarray(read_video(path)[0])
    assert pixels.shape == (64, 48, 3)
    assert pixels[4:28, 28:44].min() > 200  # the white quarter, now on the right
    assert pixels[4:28, 4:20].max() < 50


def test_refuses_missing_and_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.mp4: no such video"):
        read_video(tmp_path / "nothing.mp4")
    for data, message in [
        (b"", "bad.mp4: the video file is empty"),
        (b"not a video\n" * 99, "bad.mp4: not a video, or damaged"),
        (
            write_video(tmp_path / "a.mp4", 10).read_bytes()[:500],
            "bad.mp4: not a video, or damaged",
        ),
    ]:
        (tmp_path / "bad.mp4").write_bytes(data)
        with pytest.raises(ValueError, match=message) as error:
            read_video(tmp_path / "bad.mp4")
        assert "\n" not in str(error.value)


def test_refuses_a_file_without_a_video_stream(tmp_path):
    path = tmp_path / "sound.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        samples.rate = 16000
        container.mux(stream.encode(samples))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match="sound.mkv: no video stream in it"):
        read_video(path)


@pytest.mark.parametrize("name", ["none.avi", "none.mkv", "none.mp4"])  # each fails in its own way
def test_refuses_a_video_without_frames(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}: .*(no frames|no video stream|End of file)"):
        read_video(write_video(tmp_path / name, num_frames=0))
