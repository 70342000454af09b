"""What is asked and answered about pictures, in English and Mandarin: the words of the small model.

Goes in: nothing. Comes out: question forms by task, of which every tenth is never trained on, and
the answers to them. Read next: `scenes.py`, which draws what they are about, then `nano.py`, which
joins both to samples.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

LANGS = ("en", "zh")
TRANSCRIBE = {"en": "Write down what you hear.", "zh": "请写下你听到的。"}

# Things that are counted, placed, moved, coloured: code of the emoji, Mandarin, measure word.
NOUNS = {
    "cat": ("1F408", "猫", "只"), "dog": ("1F415", "狗", "只"), "apple": ("1F34E", "苹果", "个"),
    "car": ("1F697", "汽车", "辆"), "bird": ("1F426", "鸟", "只"), "fish": ("1F41F", "鱼", "条"),
    "book": ("1F4D5", "书", "本"), "ball": ("26BD", "球", "个"), "tree": ("1F333", "树", "棵"),
    "flower": ("1F33B", "花", "朵"), "house": ("1F3E0", "房子", "座"),
    "cup": ("2615", "杯子", "个"),
    "star": ("2B50", "星星", "颗"), "key": ("1F511", "钥匙", "把"), "horse": ("1F40E", "马", "匹"),
    "banana": ("1F34C", "香蕉", "根"), "bus": ("1F68C", "公共汽车", "辆"),
    "plane": ("2708", "飞机", "架"), "rabbit": ("1F407", "兔子", "只"),
    "chair": ("1FA91", "椅子", "把"),
}  # fmt: skip
COUNTS = {"one": "一", "two": "两", "three": "三", "four": "四", "five": "五", "six": "六"}
SIDES = {
    "left": ("on the left", "在左边"), "right": ("on the right", "在右边"),
    "top": ("at the top", "在上面"), "bottom": ("at the bottom", "在下面"),
    "middle": ("in the middle", "在中间"),
}  # fmt: skip
MOVES = {
    "left": ("to the left", "向左"), "right": ("to the right", "向右"),
    "up": ("up", "向上"), "down": ("down", "向下"),
}  # fmt: skip
COLOURS = {
    "red": "红色", "blue": "蓝色", "green": "绿色", "yellow": "黄色", "black": "黑色",
    "brown": "棕色", "gray": "灰色", "teal": "青色", "white": "白色", "orange": "橙色",
}  # fmt: skip
SHAPES = {"circle": "圆形", "rectangle": "长方形", "triangle": "三角形"}
KINDS = {
    3: ("an animal or a plant", "动物或植物"), 4: ("food or drink", "食物或饮料"),
    5: ("a place or a vehicle", "地点或交通工具"), 6: ("an activity", "活动"),
    7: ("an object", "物品"),
}  # fmt: skip

_WORDS = json.loads(Path(__file__).with_name("talk.json").read_text("utf-8"))
# Task -> language -> forms; "*" marks those that are never trained on. {noun}, its plural {nouns}
# and measure word {unit}, {colour} and {side} are filled.
FORMS: dict[str, dict[str, list[str]]] = _WORDS["forms"]
# Small talk: language -> answer -> questions that it serves, marked in the same way.
TALK: dict[str, dict[str, list[str]]] = _WORDS["small_talk"]

SAID = {  # answers that stand alone
    "right": ("Yes.", "对。"),
    "wrong": ("No.", "不对。"),
    "yes": ("Yes, it is.", "是的。"),
    "no": ("No, it is not.", "不是。"),
    "seen": ("Yes, I can see it.", "是的，我看到了。"),
    "none": ("No, there is not.", "没有。"),
    "nothing": ("There is nothing in the picture.", "图片里什么都没有。"),
    "unknown": ("I do not know.", "我不知道。"),
    "no_picture": ("I cannot see a picture.", "我没有看到图片。"),
}

_MASS = frozenset(
    """salt butter honey rice bread cheese bacon soap money lacrosse baseball softball basketball
    volleyball football rugby tennis golf cricket hockey fishing camping thread yarn wine beer tea
    sake broccoli garlic ginger popcorn spaghetti sushi mahjong karaoke herb coral ice water juice
    mate fog snow rain lightning fire tape wood rock""".split()
)


def forms(task: str, lang: str, held_out: bool) -> tuple[str, ...]:
    """The forms of a task that are trained on, or those that are not (there may be none)."""
    return _split(FORMS[task][lang], held_out)


def small_talk(lang: str, held_out: bool) -> list[tuple[str, str]]:
    """(question, answer) pairs that need no picture."""
    return [(q, answer) for answer, said in TALK[lang].items() for q in _split(said, held_out)]


def ask(task: str, lang: str, rng: np.random.Generator, held_out: bool = False, **slots) -> str:
    """A question. `slots`: `noun` (English, one of `NOUNS` or any label pair), `colour`, `side`."""
    choice = forms(task, lang, held_out) or forms(task, lang, False)
    return fill(choice[rng.integers(len(choice))], lang, **slots)


def fill(form: str, lang: str, noun=None, colour=None, side=None) -> str:
    """A form with its slots filled. `noun`: a key of `NOUNS`, or (English, Mandarin)."""
    words = {}
    if noun is not None:
        en, zh = (noun, NOUNS[noun][1]) if isinstance(noun, str) else noun
        words["noun"] = en if lang == "en" else zh
        words["nouns"] = plural(en)
        words["unit"] = NOUNS[en][2] if en in NOUNS else "个"
        if lang == "en" and _article(en) != "a":
            form = form.replace(" a {noun}", f" {_article(en)} {{noun}}".replace("  ", " "))
    if colour is not None:
        words["colour"] = colour if lang == "en" else COLOURS[colour]
    if side is not None:
        words["side"] = SIDES[side][0] if lang == "en" else SIDES[side][1].removeprefix("在")
    return form.format(**words)


def plural(noun: str) -> str:
    """'cat' -> 'cats'."""
    return {"fish": "fish", "bus": "buses"}.get(noun, noun + "s")


def name(en: str, zh: str, lang: str) -> str:
    """'cat' -> 'This is a cat.'; 'grapes' -> 'These are grapes.'; 'salt' -> 'This is salt.'"""
    if lang == "zh":
        return f"这是{zh}。"
    if (article := _article(en)) == "some":
        return f"These are {en}."
    return f"This is {article} {en}.".replace("  ", " ")


def count(number: int, noun: str, lang: str) -> str:
    """'There are two cats.'"""
    word, zh = list(COUNTS.items())[number - 1]
    if lang == "zh":
        return f"有{zh}{NOUNS[noun][2]}{NOUNS[noun][1]}。"
    return f"There is one {noun}." if number == 1 else f"There are {word} {plural(noun)}."


def place(noun: str, side: str, lang: str) -> str:
    """'The cat is on the left.'"""
    en, zh = SIDES[side]
    return f"The {noun} is {en}." if lang == "en" else f"{NOUNS[noun][1]}{zh}。"


def side(word: str, lang: str) -> str:
    """'on the left'"""
    return SIDES[word][LANGS.index(lang)]


def move(noun: str, way: str, lang: str) -> str:
    """'The cat moves to the left.'"""
    en, zh = MOVES[way]
    return f"The {noun} moves {en}." if lang == "en" else f"{NOUNS[noun][1]}{zh}移动。"


def colour(noun: str, word: str, lang: str) -> str:
    """'The cat is red.'"""
    return f"The {noun} is {word}." if lang == "en" else f"{NOUNS[noun][1]}是{COLOURS[word]}的。"


def pair(one: str, other: str, lang: str) -> str:
    """'I see a cat and an apple.'"""
    if lang == "zh":
        return f"我看到{NOUNS[one][1]}和{NOUNS[other][1]}。"
    return f"I see {_article(one)} {one} and {_article(other)} {other}."


def quality(word: str, lang: str) -> str:
    """A colour or a shape: 'It is red.', 'It is a circle.'"""
    if word in COLOURS:
        return f"It is {word}." if lang == "en" else f"它是{COLOURS[word]}的。"
    return f"It is a {word}." if lang == "en" else f"它是{SHAPES[word]}。"


def kind(number: int, lang: str) -> str:
    """'This is food or drink.'"""
    en, zh = KINDS[number]
    return f"This is {en}." if lang == "en" else f"这是{zh}。"


def said(key: str, lang: str) -> str:
    """One of `SAID`."""
    return SAID[key][LANGS.index(lang)]


def answers(lang: str) -> list[str]:
    """All answers but names of concepts: what a voice must be able to say, without repetition."""
    nouns = list(NOUNS)
    pairs = [(a, b) for i, a in enumerate(nouns) for b in nouns[i + 1 :] + nouns[:i]]
    every = list(TALK[lang]) + [said(key, lang) for key in SAID]
    every += [kind(number, lang) for number in KINDS]
    every += [quality(word, lang) for word in (*COLOURS, *SHAPES)]
    every += [count(n, noun, lang) for noun in nouns for n in range(1, 1 + len(COUNTS))]
    every += [place(noun, side, lang) for noun in nouns for side in SIDES]
    every += [move(noun, way, lang) for noun in nouns for way in MOVES]
    every += [colour(noun, word, lang) for noun in nouns for word in COLOURS]
    return every + [pair(*both, lang) for both in pairs]


def _split(forms, held_out):
    return tuple(form.lstrip("*") for form in forms if form.startswith("*") == held_out)


def _article(noun):
    """'a', 'an', 'some' for a plural, '' for what is not counted."""
    last = noun.split()[-1].lower()
    if last in _MASS:
        return ""
    if last.endswith("s") and not last.endswith(("ss", "us", "is")):
        return "some"
    vowel = noun[0].lower() in "aeiou"
    return (
        "an"
        if vowel and not noun.lower().startswith(("uni", "one", "use", "eu", "uk", "ut"))
        else "a"
    )


def sample(name: str, question: str, answer: str, **more) -> dict:
    """A sample of one question in the release's format."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": turns, **more}


def transcription(row: dict) -> dict:
    """The sample that asks for the words of a clip."""
    return sample(
        row["file"], f"<audio>{TRANSCRIBE[row['lang']]}", row["text"], audio=[row["file"]]
    )
