import math
from importlib import resources

import av
import numpy as np
import pytest
import soundfile

from vita_jax.data import audio
from vita_jax.data.audio import fbank, read_audio, resample, write_wav

RATE_HZ = 16000


def sine(num_samples, rate_hz=RATE_HZ, hz=440.0, amplitude=0.5):
    return amplitude * np.sin(2 * np.pi * hz * np.arange(num_samples) / rate_hz)


@pytest.mark.golden
def test_fbank_equals_the_recording(golden):
    tensors, config = golden("fbank")
    assert config["sample_rate"] == audio.SAMPLE_RATE_HZ
    assert config["frame_length_ms"] * audio.SAMPLE_RATE_HZ == 1000 * audio.FRAME_SAMPLES
    assert config["frame_shift_ms"] * audio.SAMPLE_RATE_HZ == 1000 * audio.HOP_SAMPLES
    features = fbank(tensors["in.waveform"], config["num_mel_bins"])
    assert features.dtype == np.float32
    assert len(features) == tensors["out.num_frames"][0]
    error = np.abs(features - tensors["out.fbank"])
    assert error.mean() <= 1e-5
    assert error.max() <= 2e-3


@pytest.mark.parametrize("num_samples, num_frames", [(400, 1), (559, 1), (560, 2), (56640, 352)])
def test_only_whole_frames(num_samples, num_frames):
    assert fbank(np.zeros(num_samples, np.float32)).shape == (num_frames, 80)


def test_silence_is_the_floor():
    floor = np.log(np.finfo(np.float32).eps)
    np.testing.assert_allclose(fbank(np.zeros(1000), num_mel_bins=23), floor, rtol=1e-6)


def test_dither_is_noise_of_its_size():
    silence = np.zeros(32000, np.float32)
    noisy = fbank(silence, dither=1.0, rng=np.random.default_rng(0))
    np.testing.assert_array_equal(noisy, fbank(silence, dither=1.0, rng=np.random.default_rng(0)))
    assert np.abs(noisy - fbank(silence, dither=1.0)).max() > 0.1
    # Noise of deviation 1 on each sample is what white noise of one 16-bit step is.
    noise = np.random.default_rng(1).standard_normal(32000) / 32768
    assert abs(noisy.mean() - fbank(noise).mean()) < 0.05
    assert abs(fbank(silence, dither=10.0).mean() - noisy.mean() - np.log(100)) < 0.05


def test_refuses_less_than_a_frame():
    with pytest.raises(ValueError, match="24.9 ms is shorter than one 25 ms frame"):
        fbank(np.zeros(399, np.float32))


@pytest.mark.parametrize(
    "from_hz, to_hz", [(24, 16), (16, 24), (441, 160), (8, 16), (48, 16), (37, 29)]
)
def test_resample_equals_its_formula(from_hz, to_hz):
    waveform = np.random.default_rng(0).standard_normal(500).astype(np.float32)
    cutoff = 0.99 * min(from_hz, to_hz)
    expected = []
    for index in range(math.ceil(len(waveform) * to_hz / from_hz)):
        x = cutoff * (np.arange(len(waveform)) / from_hz - index / to_hz)
        window = np.where(np.abs(x) < 6, np.cos(np.pi * x / 12) ** 2, 0)
        expected.append((waveform * np.sinc(x) * window).sum() * cutoff / from_hz)
    result = resample(waveform, from_hz, to_hz)
    assert result.dtype == np.float32
    assert result.shape == (len(expected),)
    np.testing.assert_allclose(result, expected, atol=2e-6)
    scaled = resample(waveform, 1000 * from_hz, 1000 * to_hz)  # only the ratio counts
    np.testing.assert_array_equal(result, scaled)


@pytest.mark.parametrize("from_hz", [8000, 11025, 22050, 24000, 44100, 44101, 48000])
@pytest.mark.parametrize("hz", [100, 997, 2500])
def test_resample_keeps_a_sine(from_hz, hz):
    result = resample(sine(from_hz // 4, from_hz, hz), from_hz, RATE_HZ)
    expected = sine(len(result), RATE_HZ, hz)
    np.testing.assert_allclose(result[100:-100], expected[100:-100], atol=5e-3)


def test_resample_removes_what_the_new_rate_cannot_hold():
    result = resample(sine(24000, 48000, hz=12000), 48000, RATE_HZ)
    assert np.abs(result[100:-100]).max() < 5e-3


def test_resample_to_the_same_rate_changes_nothing():
    waveform = sine(100).astype(np.float32)
    np.testing.assert_array_equal(resample(waveform, 7, 7), waveform)
    assert resample(waveform[:0], 3, 2).shape == (0,)


@pytest.mark.parametrize(
    "name, options, tolerance",
    [
        ("a.wav", dict(subtype="PCM_16"), 1e-4),
        ("a.wav", dict(subtype="PCM_U8"), 1e-2),
        ("a.wav", dict(subtype="PCM_24"), 1e-6),
        ("a.wav", dict(subtype="FLOAT"), 1e-6),
        ("a.flac", {}, 1e-4),
        ("a.ogg", {}, 0.05),
        ("a.mp3", {}, 0.05),
        ("a.aiff", {}, 1e-4),
    ],
)
def test_reads_files_of_any_kind(tmp_path, name, options, tolerance):
    waveform = sine(8000)
    soundfile.write(tmp_path / name, waveform, RATE_HZ, **options)
    for source in (tmp_path / name, str(tmp_path / name)):
        result = read_audio(source)
        assert result.dtype == np.float32
        np.testing.assert_allclose(result[:8000], waveform, atol=tolerance)


def test_reads_the_sound_of_a_video(tmp_path):
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=48000, layout="stereo")
        sound = np.tile(sine(48 * 1024, 48000), (2, 1)).astype(np.float32)
        for piece in np.split(sound, 48, axis=1):
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(piece), "fltp", "stereo")
            frame.rate = 48000
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    result = read_audio(path)
    assert abs(len(result) - 48 * 1024 / 3) < 700
    assert abs(np.sqrt((result[2000:14000] ** 2).mean()) - 0.5 / np.sqrt(2)) < 0.01


def test_resamples_and_mixes_channels(tmp_path):
    left, right = sine(24000, 48000, 300), sine(24000, 48000, 700)
    soundfile.write(tmp_path / "stereo.wav", np.stack([left, right], 1), 48000, subtype="FLOAT")
    result = read_audio(tmp_path / "stereo.wav")
    assert result.shape == (8000,)
    expected = (sine(8000, hz=300) + sine(8000, hz=700)) / 2
    np.testing.assert_allclose(result[100:-100], expected[100:-100], atol=2e-3)
    assert read_audio(tmp_path / "stereo.wav", sample_rate_hz=24000).shape == (12000,)


@pytest.mark.parametrize(
    "samples",
    [
        np.array([0, 16384, -32768], np.int16),
        np.array([0, 1 << 30, -1 << 31], np.int32),
        np.array([128, 192, 0], np.uint8),
        np.array([0.0, 0.5, -1.0]),
        np.array([[0.25, -0.25], [0.75, 0.25], [-1.0, -1.0]], np.float32),
    ],
)
def test_reads_arrays(samples):
    np.testing.assert_array_equal(read_audio((samples, RATE_HZ)), np.float32([0, 0.5, -1]))


@pytest.mark.parametrize(
    "samples, rate_hz, message",
    [
        (np.zeros(0), RATE_HZ, "no samples"),
        (np.zeros((2, 16000)), RATE_HZ, r"shape \[2, 16000\]"),
        (np.zeros((2, 2, 2)), RATE_HZ, r"shape \[2, 2, 2\]"),
        (np.zeros(9, np.int64), RATE_HZ, "type int64"),
        (np.array([0, np.nan]), RATE_HZ, "NaN"),
        (np.array([0, -np.inf]), RATE_HZ, "NaN or infinite"),
        (np.array([0.0, 20000.0]), RATE_HZ, "samples up to 20000"),
        (np.zeros(9), 0, "sample rate 0 Hz"),
        (np.zeros(9), 22050.5, "sample rate 22050.5 Hz"),
    ],
)
def test_refuses_bad_arrays(samples, rate_hz, message):
    with pytest.raises(ValueError, match=message):
        read_audio((samples, rate_hz))


def test_refuses_missing_and_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.wav: no such sound"):
        read_audio(tmp_path / "nothing.wav")
    path = tmp_path / "bad.wav"
    for data, message in [(b"", "is empty"), (b"words\n" * 99, "not a sound"), (b"RIFF", "not a")]:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"bad.wav: .*{message}") as error:
            read_audio(path)
        assert "\n" not in str(error.value)
    for samples, message in [([], "no samples"), ([0, np.nan], "NaN"), ([np.inf], "infinite")]:
        soundfile.write(path, np.array(samples, float), RATE_HZ, subtype="FLOAT")
        with pytest.raises(ValueError, match=f"bad.wav: .*{message}"):
            read_audio(path)


def test_refuses_a_wav_cut_short(tmp_path):
    soundfile.write(tmp_path / "whole.wav", sine(8000), RATE_HZ)
    data = (tmp_path / "whole.wav").read_bytes()
    (tmp_path / "cut.wav").write_bytes(data[:-1000])
    with pytest.raises(ValueError, match="cut.wav: cut short, 1000 bytes are missing"):
        read_audio(tmp_path / "cut.wav")
    for part in (20, 44):
        (tmp_path / "cut.wav").write_bytes(data[:part])
        with pytest.raises(ValueError, match="cut.wav: "):
            read_audio(tmp_path / "cut.wav")


def test_reads_what_was_written_to_a_pipe(tmp_path):
    """The writer did not know the length: a WAV that claims 4 GB, a FLAC that claims nothing."""
    for name, at, claim in [("a.wav", 40, b"\xff" * 4), ("a.flac", 22, b"\0" * 4)]:
        path = tmp_path / name
        soundfile.write(path, sine(8000), RATE_HZ)
        data = bytearray(path.read_bytes())
        data[at : at + 4] = claim
        path.write_bytes(data)
        assert len(read_audio(path)) == 8000


def test_write_wav_rounds_and_clips(tmp_path):
    write_wav(tmp_path / "a.wav", np.array([0.0, 0.5, -1.0, 1.0, 3.0, -3.0, 1.6 / 32768]), 24000)
    samples, rate_hz = soundfile.read(tmp_path / "a.wav", dtype="int16")
    assert samples.tolist() == [0, 16384, -32768, 32767, 32767, -32768, 2]
    assert rate_hz == 24000
    assert soundfile.info(tmp_path / "a.wav").subtype == "PCM_16"


@pytest.mark.parametrize("name", ["question_en.wav", "question_zh.wav"])
def test_sample_questions(name):
    path = resources.files("vita_jax") / "samples" / name
    info = soundfile.info(path)
    assert (info.samplerate, info.channels, info.subtype) == (RATE_HZ, 1, "PCM_16")
    waveform = read_audio(path)
    assert 1 < len(waveform) / RATE_HZ < 3
    loud = np.flatnonzero(np.abs(waveform) > 0.02) / RATE_HZ
    assert loud[0] < 0.3
    assert loud[-1] > len(waveform) / RATE_HZ - 0.3
