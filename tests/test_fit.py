"""Every stage learns eight samples by heart, through the parts that it trains.

The stages are the real files with `--tiny`, at a rate for a hundred steps.
"""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vita_jax
from vita_jax.config import load_config
from vita_jax.data import prompts, synthetic
from vita_jax.data.collate import collate
from vita_jax.data.utterance import words
from vita_jax.infer.decode import begin_speech, init_speech, next_speech
from vita_jax.infer.sampling import Sampler
from vita_jax.losses import ctc_read
from vita_jax.models.vita import Vita
from vita_jax.objectives import read_loss
from vita_jax.train import train

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(vita_jax.__file__).parents[1]


def question(sample):
    return sample["conversations"][0]["value"]


def reply(sample):
    return sample["conversations"][1]["value"]


def eight(**numbers):
    """Eight samples with eight texts; `numbers` says how many of each kind."""
    found = {}
    for kind, number in numbers.items():
        one_a_text = {words(sample): sample for sample in synthetic.samples(kind, 60, seed=3)}
        found |= dict(list(one_a_text.items())[:number])
    assert len(found) == 8
    return list(found.values())


def written(sample):
    """The sample with its reply in the question in place of the picture, and its sound silent."""
    text = question(sample).replace("<image>", reply(sample) + "\n")
    text = text.replace("<audio>", reply(sample) + "<audio>")
    talk = [{"from": "human", "value": text}, sample["conversations"][1]]
    silence = [(0 * samples, rate_hz) for samples, rate_hz in sample.get("audio", [])]
    return {"conversations": talk} | ({"audio": silence} if silence else {})


def fit(workdir, stage, samples, *words):
    """Trains the stage on the samples, all of them in every batch; (config, last metrics)."""
    words = (
        'data.mixture={"synthetic:eight": 1}',
        "mesh=[1,1,1]",
        "data.held_out=[]",
        "save_every=1000",
        *words,
    )
    config = load_config(ROOT / "configs" / f"{stage}.py", words, tiny=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "samples", lambda kind, number, seed: samples)
        train(config, workdir)
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    print(f"{stage}: {last['loss']:.4f} nats a token")
    return config, last


@pytest.fixture
def short_prompts(monkeypatch):
    """The system prompt is most of a row and the same in all: here it is a word."""
    for kind in prompts.SYSTEM_PROMPTS:
        monkeypatch.setitem(prompts.SYSTEM_PROMPTS, kind, kind)


def assert_fits(workdir, stage, samples, *words):
    """Less than 0.05 nats a token, greedy replies as in the samples; the last metrics."""
    words = "optim.learning_rate=4e-3", *words
    _, last = fit(workdir, stage, samples, *words)
    assert last["loss"] < 0.05
    engine = vita_jax.load(workdir / "model", dtype="float32")
    for sample in samples:
        text = question(sample).replace("<image>", "").replace("<audio>", "")
        (sound,) = sample.get("audio", [None])
        images = [sample["image"]] if "image" in sample else []
        said = engine.chat(text or None, images, sound, speak=False, max_new_tokens=40)
        state = "text_reply" if sound is None else "audio_reply"
        state = "noise" if "inserted_id" in sample else state
        assert (said.text, said.state) == (reply(sample), state)
    return last


AUDIO_SFT = "stage2_2_audio_sft", {"spoken_qa": 3, "qa": 2, "captions": 2, "noise": 1}


@pytest.mark.parametrize(
    "stage, numbers",
    [
        ("stage0_text", {"text": 8}),
        ("stage1_3_vision_sft", {"qa": 4, "captions": 4}),
        AUDIO_SFT,
    ],
)
def test_stages_that_train_the_llm(stage, numbers, tmp_path, short_prompts):
    words = "data.max_tokens=128", "num_steps=60"
    assert_fits(tmp_path, stage, eight(**numbers), *words)


def test_state_head(tmp_path, short_prompts):
    stage, numbers = AUDIO_SFT
    words = "data.max_tokens=128", "num_steps=60", "model.llm.num_states=3"
    last = assert_fits(tmp_path, stage, eight(**numbers), *words)
    assert last["state_loss"] < 0.01 and last["state_error"] == 0
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert first["state_error"] > 0


def test_with_the_whole_system_prompt(tmp_path):
    assert_fits(tmp_path, "stage1_2_vision_understanding", eight(captions=8), "num_steps=90")


@pytest.fixture(scope="module")
def hearing(tmp_path_factory):
    """Eight clips, and the model of stage 2.1a that has learnt them."""
    workdir, samples = tmp_path_factory.mktemp("runs") / "hearing", eight(speech=8)
    words = "num_steps=150", "optim.learning_rate=1e-2", "data.max_audio_frames=96"
    fit(workdir, "stage2_1a_speech_encoder", samples, *words)
    return samples, workdir / "model"


def test_speech_encoder_transcribes(hearing):
    samples, model = hearing
    engine = vita_jax.load(model, dtype="float32")
    batch = collate([engine.processor.sample(sample) for sample in samples])
    logits, num_frames = Vita(engine.config).apply(
        {"params": engine.params}, batch.audio, batch.audio_mask, method="unit_logits"
    )
    units = np.asarray(ctc_read(logits, num_frames))
    said = [engine.tokenizer.decode(row[row > 0] - 1) for row in units]
    assert said == [reply(sample) for sample in samples]


def nats_of_texts(config, model, samples, blind=False):
    """float32[8, 8]: -log p of each text (second axis) with the picture or sound of each sample.

    The blind see a grey picture or hear silence, of the same size.
    """
    engine = vita_jax.load(model, dtype="float32")
    pairs = [
        engine.processor.sample(shown | {"conversations": told["conversations"]})
        for shown in samples
        for told in samples
    ]
    batch = jax.tree.map(jnp.asarray, collate(pairs))
    if blind:
        empty = {
            name: 0 * x for name in ("tiles", "audio") if (x := getattr(batch, name)) is not None
        }
        batch = batch.replace(**empty)

    @jax.jit
    @jax.vmap
    def nats(row):
        row = jax.tree.map(lambda x: x[None], row)
        return read_loss(config, Vita(engine.config), engine.params, {}, row)[0]

    return np.asarray(nats(batch)).reshape(8, 8)


@pytest.mark.parametrize("sense", ["sight", "hearing"])
def test_stages_that_leave_the_llm(sense, tmp_path, short_prompts, request):
    if sense == "sight":
        samples, stage = eight(captions=8), "stage1_1_vision_alignment"
        more = []
    else:
        samples, encoder = request.getfixturevalue("hearing")
        more, stage = [f"audio/encoder/.*={encoder}"], "stage2_1b_speech_adapter"
    # The LLM has read the eight texts, and nothing but texts.
    words = "data.max_tokens=128", "num_steps=60", "optim.learning_rate=4e-3"
    fit(tmp_path / "text", "stage0_text", [written(sample) for sample in samples], *words)
    init_from = json.dumps([str(tmp_path / "text" / "model"), *more])
    words = "data.max_tokens=128", "num_steps=150", "optim.learning_rate=1e-2"
    config, _ = fit(tmp_path / "run", stage, samples, f"init_from={init_from}", *words)

    seen = nats_of_texts(config, tmp_path / "run" / "model", samples)
    blind = nats_of_texts(config, tmp_path / "run" / "model", samples, blind=True)
    loss, blind_loss = seen.diagonal().mean(), blind.diagonal().mean()
    print(f"{stage}: {loss:.3f} nats a text, blind {blind_loss:.3f}, ln 8 is {math.log(8):.3f}")
    # All questions are the same, so to the blind the texts are equally likely at best.
    assert len({question(sample) for sample in samples}) == 1
    assert blind_loss > math.log(8) - 1e-3
    assert loss < math.log(8) / 2
    np.testing.assert_array_equal(seen.argmin(axis=1), range(8))


def test_speech_decoders(tmp_path):
    """Less than 0.05 nats a codec token; greedy, the codec tokens of each text and then the end."""
    samples = eight(codec_tokens=8)
    more = "num_steps=150", "optim.learning_rate=1e-2"
    _, last = fit(tmp_path, "stage3_2_speech_decoder", samples, *more)
    assert last["loss"] < 0.05 and last["exact"] == 1
    engine = vita_jax.load(tmp_path / "model", dtype="float32")
    config, greedy = engine.config, Sampler().arrays()
    nothing_banned = np.zeros(config.speech.vocab_size, bool)
    for sample in samples:
        ids = np.array(engine.tokenizer.encode(sample["text"]), np.int32)
        state = init_speech(config, 1, 128, greedy)
        given = 0, ids, np.int32(ids.size), jax.random.key(0), np.int32(100), greedy
        state = begin_speech(config, engine.params, state, *given)
        row = np.ones(1, bool)
        _, codes = next_speech(config, 128, 7, engine.params, nothing_banned, state, row)
        assert codes[:, 0].tolist() == [*sample["codes"], config.speech.eos_id]


def test_codec(tmp_path):
    """The distance of log-mel spectrograms falls to a fifth, with nearly all codewords in use."""
    seconds = np.arange(2400) / 24000

    def voiced(i):
        pitch_hz = 110 * 2 ** (i / 4)
        harmonics = np.arange(1, int(10_000 / pitch_hz))[:, None]
        waves = np.sin(2 * np.pi * pitch_hz * harmonics * seconds + harmonics * i) / harmonics
        return (0.2 * waves.sum(axis=0) * np.exp(-2 * seconds)).astype(np.float32)

    samples = [{"id": i, "audio": [(voiced(i), 24000)]} for i in range(8)]
    more = "num_steps=900", "optim.learning_rate=5e-3", "data.max_tokens=4"
    _, last = fit(tmp_path, "stage3_1_codec", samples, *more, "discriminator_channels=0")
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert last["mel"] < first["mel"] / 5
    # Four codec tokens of eight clips: each found a codeword of its own, and so did each timbre.
    assert last["perplexity"] > 30 and last["global_perplexity"] > 7.5
