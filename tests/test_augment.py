"""vita_jax/data/augment.py: speed, noise, speakers, gaps; the same generator, the same sound."""

import numpy as np
import pytest
import soundfile

from vita_jax.config import vita_tiny
from vita_jax.data.audio import fbank
from vita_jax.data.augment import Augment, mix
from vita_jax.data.processor import Processor
from vita_jax.data.tokenizer import byte_tokenizer


def tone(hz, seconds=1.0):
    return np.sin(2 * np.pi * hz * np.arange(int(16000 * seconds)) / 16000).astype(np.float32)


def pitch_hz(waveform):
    return np.abs(np.fft.rfft(waveform)).argmax() * 16000 / len(waveform)


def test_speed_changes_length_and_pitch():
    lengths = set()
    for seed in range(60):
        out = Augment().waveform(tone(1000), np.random.default_rng(seed))
        assert out.dtype == np.float32
        speed = 16000 / len(out)
        assert abs(pitch_hz(out) - 1000 * speed) < 2
        lengths.add(len(out))
    assert lengths == {18824, 17778, 16843, 16000, 15239, 14546, 13914}


def test_silence_around_speech_is_cut():
    silence = np.zeros(24000, np.float32)
    speech = np.concatenate([silence, tone(440), silence])
    lengths = [
        len(Augment().waveform(speech, np.random.default_rng(seed))) / 16000 for seed in range(60)
    ]
    whole = sum(length > 3 for length in lengths)  # 4 s, at some speed
    assert 8 <= whole <= 30
    assert all(0.9 < length < 2.5 for length in lengths if length <= 3)


@pytest.mark.parametrize("snr_db", [0.0, 10.0])
def test_noise_is_as_loud_as_asked(snr_db):
    rng = np.random.default_rng(0)
    speech, noise = tone(300), rng.standard_normal(16000).astype(np.float32) * 7
    added = mix(speech, noise, snr_db) - speech
    assert abs(10 * np.log10(np.mean(speech**2) / np.mean(added**2)) - snr_db) < 1e-3
    assert abs(np.corrcoef(added, noise)[0, 1]) > 0.999
    silence = np.zeros(16000, np.float32)
    assert mix(silence, noise, 5.0) is silence and mix(speech, silence, 5.0) is speech


def test_noise_comes_from_a_folder(tmp_path):
    with pytest.raises(ValueError, match="no sound files"):
        Augment.with_noises(tmp_path)
    (tmp_path / "deep").mkdir()
    soundfile.write(tmp_path / "deep" / "hum.wav", 0.1 * tone(50, 0.3), 16000)
    augment, speech = Augment.with_noises(tmp_path), tone(1000, 1.5)
    noisy = 0
    for seed in range(40):
        plain = Augment().waveform(speech, np.random.default_rng(seed))
        out = augment.waveform(speech, np.random.default_rng(seed))
        assert out.shape == plain.shape
        if noise := np.abs(out - plain).max():
            snr_db = 10 * np.log10(np.mean(plain**2) / np.mean((out - plain) ** 2))
            assert noise > 0 and 4.9 < snr_db < 20.1
            noisy += 1
    assert 10 < noisy < 30


def test_another_speaker_moves_frequencies_alone():
    """A tone is found where a tone of another frequency was: by up to 12% higher or lower."""
    heights = {hz: fbank(tone(hz))[50].argmax() for hz in range(1300, 1800)}
    lowest, highest = heights[1500 * 100 // 113], heights[1500 * 100 // 87]
    found = []
    for seed in range(40):
        banks = fbank(tone(1500))
        out = Augment().speaker(banks, np.random.default_rng(seed))
        assert out.dtype == np.float32 and out.shape == banks.shape
        found.append(out[50].argmax())
    assert lowest <= min(found) < heights[1500] - 1 and heights[1500] + 1 < max(found) <= highest


def test_gaps_are_the_mean_and_not_too_wide():
    rng = np.random.default_rng(0)
    banks = rng.standard_normal((400, 80)).astype(np.float32)
    before = banks.copy()
    most_frames = most_bins = 0
    for seed in range(50):
        out = Augment().gaps(banks, np.random.default_rng(seed))
        changed = out != before
        frames, bins = changed.all(axis=1), changed.all(axis=0)
        np.testing.assert_array_equal(changed, frames[:, None] | bins)
        mean = np.broadcast_to(before.mean(axis=0), out.shape)
        np.testing.assert_array_equal(out[changed], mean[changed])
        most_frames, most_bins = max(most_frames, frames.sum()), max(most_bins, bins.sum())
    np.testing.assert_array_equal(banks, before)
    assert 50 < most_frames <= 80 and 10 < most_bins <= 20
    for seed in range(20):
        short = Augment().gaps(banks[:10], np.random.default_rng(seed))
        assert (short != before[:10]).all(axis=1).sum() <= 2


def test_only_training_is_augmented():
    """A prompt, which has no generator, hears the clip as it is."""
    plain = Processor(vita_tiny(), byte_tokenizer())
    processor = Processor(vita_tiny(), byte_tokenizer(), augment=Augment())
    sound = (tone(440), 16000)
    (clip,) = processor.prompt(audio=sound).audio
    np.testing.assert_array_equal(clip, plain.prompt(audio=sound).audio[0])
    turns = [{"from": "human", "value": "<audio>"}, {"from": "gpt", "value": "La."}]
    sample = {"audio": sound, "conversations": turns}
    made = [processor.sample(sample, rng=np.random.default_rng(s)).audio[0] for s in (1, 1, 2)]
    np.testing.assert_array_equal(made[0], made[1])
    assert any(made[2].shape != clip.shape for clip in made[:1]) or (made[0] != made[2]).any()
    example = processor.sample(sample, rng=np.random.default_rng(3))
    placeholders = (example.tokens < 0).sum()
    assert placeholders == vita_tiny().audio.num_embeddings(len(example.audio[0]))
