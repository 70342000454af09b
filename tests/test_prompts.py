"""The system prompts and the template, letter by letter where the release is peculiar."""

import re

from vita_jax.data import prompts


def test_system_prompts():
    text, image, video = (prompts.SYSTEM_PROMPTS[key] for key in ("text", "image", "video"))
    assert text.startswith("You are an AI robot and your name is VITA. \n- You are a multimodal")
    assert text.endswith(" apologize and discuss the correct answer with the user.")
    assert text.count(" \n- ") == text.count("\n") == 3
    assert image.startswith(text + " \n- You must answer the question strictly according to")
    assert image.endswith("Please note that you are seeing the image, not the video.")
    other = {"image": "video", "video": "image"}
    assert (
        re.sub("image|video", lambda word: other[word[0]], image[len(text) :]) == video[len(text) :]
    )
    assert image.count("content of the image") == 2


def test_template():
    assert prompts.SYSTEM.format("S") == "<|im_start|>system\nS<|im_end|>\n"
    assert prompts.USER.format("U") == "<|im_start|>user\nU<|im_end|>\n"
    assert prompts.ASSISTANT == "<|im_start|>assistant\n"
    assert [hex(ord(state)) for state in prompts.STATES.values()] == ["0x261e", "0x261f", "0x261c"]
