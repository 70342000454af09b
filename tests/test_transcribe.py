"""vita_jax/infer/transcribe.py and `vita transcribe`: what a clip is embedded as, read by hand."""

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

import vita_jax
from vita_jax import checkpoint, cli
from vita_jax.evaluate import characters, error_rate, spelt_words
from vita_jax.infer.engine import Engine
from vita_jax.losses import NO_WORD
from vita_jax.models.vita import Vita

CLIP = pathlib.Path(vita_jax.__file__).with_name("samples") / "question_en.wav"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    checkpoint.initialize("vita_tiny", folder, overrides=["audio.num_prompts=2"])
    return folder


@pytest.fixture(scope="module")
def engine(tiny):
    """One for which the fifth embedding of `CLIP` is "s", at three times its length, and the ninth
    "o", at a hundredth.
    """
    engine = vita_jax.load(tiny)
    audio = dataclasses.replace(engine.config.audio, aligned=True)
    table = np.array(engine.params["llm"]["embedding"])
    table[engine.tokenizer.encode("so")] = embedded(engine)[[5, 9]] * [[3], [0.01]]
    llm = engine.params["llm"] | {"embedding": jnp.asarray(table)}
    config = dataclasses.replace(engine.config, audio=audio)
    return Engine(config, engine.params | {"llm": llm}, engine.tokenizer)


def embedded(engine):
    """float32[T, D] of `CLIP`, without prompts."""
    banks = engine.processor.clip(CLIP, None)[None, None]
    args = banks, np.ones(banks.shape[:3], bool)
    clips, _ = Vita(engine.config).apply({"params": engine.params}, *args, method="encode_audio")
    return np.asarray(clips[0, 0, engine.config.audio.num_prompts :])


def test_nearest_words_in_order(engine):
    rows, table = (
        x / np.linalg.norm(x, axis=-1, keepdims=True)
        for x in (embedded(engine), np.asarray(engine.params["llm"]["embedding"]))
    )
    cosines = rows @ table.T
    near = np.where(cosines.max(axis=1) > NO_WORD, cosines.argmax(axis=1), -1)
    assert [near[5], near[9]] == engine.tokenizer.encode("so")
    kept = [x for x, before in zip(near, [-1, *near]) if x not in (before, -1)]
    assert engine.transcribe(CLIP) == engine.tokenizer.decode(kept).strip()


def test_a_line_for_each_recording(engine, monkeypatch, capsys):
    monkeypatch.setattr(vita_jax, "load", lambda checkpoint: engine, raising=False)
    assert cli.main(["transcribe", str(CLIP), "none.wav"]) == 2
    out, err = capsys.readouterr()
    assert out == f"{CLIP}: {engine.transcribe(CLIP)}\n"
    assert "none.wav: no such sound file" in err


def test_a_model_that_does_not_hear_words(tiny, capsys):
    assert cli.main(["transcribe", str(CLIP), "--checkpoint", str(tiny)]) == 2
    assert "vita_tiny: what it hears is not embedded as words" in capsys.readouterr().err


@pytest.mark.parametrize(
    "lang, text, split",
    [("en", "Which animal is this?", spelt_words), ("zh", "这是什么动物？", characters)],
)
def test_the_shipped_model(lang, text, split):
    said = vita_jax.load(cli.SHIPPED).transcribe(CLIP.with_name(f"question_{lang}.wav"))
    assert error_rate([said], [text], split) < 0.3
