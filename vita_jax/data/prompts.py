"""The words around a conversation: chat template, placeholders, state tokens, system prompts.

Goes in: nothing. Comes out: constants. Read next: `tokenizer.py`, then `processor.py`.
Source: the release's conversation template `qwen2p5_instruct`.
"""

from __future__ import annotations

IMAGE = "<image>"  # in a user's text: one picture; in a filled template: one tile
VIDEO = "<video>"  # in a user's text: all frames; a filled template has an IMAGE for each
AUDIO = "<audio>"  # one clip

# The first character of a reply says what it answers. Each is one ordinary token.
STATES = {
    "audio_reply": "☞",  # a spoken question
    "noise": "☟",  # sound that asks nothing
    "text_reply": "☜",  # a written question
}

PAD = "<|endoftext|>"
START = "<|im_start|>"
END = "<|im_end|>"  # ends every message

# A conversation is SYSTEM, then USER, ASSISTANT, reply and END for each turn, "\n" between turns.
SYSTEM = START + "system\n{}" + END + "\n"
USER = START + "user\n{}" + END + "\n"
ASSISTANT = START + "assistant\n"

_BASE = (
    "You are an AI robot and your name is VITA. \n"
    "- You are a multimodal large language model developed by the open source community. "
    "Your aim is to be helpful, honest and harmless. \n"
    "- You support the ability to communicate fluently and answer user questions "
    "in multiple languages of the user's choice. \n"
    "- If the user corrects the wrong answer you generated, "
    "you will apologize and discuss the correct answer with the user."
)
_SEEING = (
    " \n- You must answer the question strictly according to the content of the {0} "
    "given by the user, and it is strictly forbidden to answer the question "
    "without the content of the {0}. "
    "Please note that you are seeing the {0}, not the {1}."
)

# By what is shown; "text" if nothing is, spoken or written. The blanks before "\n" belong there.
SYSTEM_PROMPTS = {
    "text": _BASE,
    "image": _BASE + _SEEING.format("image", "video"),
    "video": _BASE + _SEEING.format("video", "image"),
}
