"""Samples about pictures that are drawn when they are asked for: hardly ever the same one twice.

Goes in: a folder that `vita data build` wrote, with drawings and recorded questions. Comes out:
samples in the release's format, each made of its number alone, so that a run goes on where it was.
Read next: `scenes.py`, which draws, and `talk.py`, which asks and answers.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import io
import itertools
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import PIL.Image

from vita_jax.data import scenes, splice, talk, voices
from vita_jax.data.concepts import MAIN, Concept
from vita_jax.data.sources import CONCEPTS

LENGTHS = {"train": 1_000_000, "held_out": 256}  # samples before the first comes again
HELD_OUT = 1_000_003  # of the seed, for samples that are not trained on
PX = 112  # of a picture's edge
FRAMES = 4  # of a video
SPOKEN = ("spoken", "talk", "pieced")  # kinds of which the first question has a sound
TRIES = 20  # to find one
RESTYLED = 0.5  # of the samples to learn from: in any style and colours, as others draw things
KINDS_OF = {  # task -> subgroups of which it is true
    "is_animal": "animal", "is_plant": "plant", "is_food": ("food", "drink"),
    "is_vehicle": "transport", "is_tool": "tool",
}  # fmt: skip
TURNS = {  # least, most
    "captions": (1, 1), "views": (1, 1), "mosaics": (1, 1), "labels": (1, 1), "names": (2, 2),
    "quarters": (4, 4),
}  # fmt: skip
SHAPE_COLOURS = tuple(talk.COLOURS)[:8]  # easy-vqa's
CORNERS = [  # of a picture, as they are read
    [functools.partial(talk.side, side) for side in both]
    for both in itertools.product(("top", "bottom"), ("left", "right"))
]


class DrawnSource:
    """Samples of one kind: `FOLDER#KIND`, or `FOLDER#KIND-held_out` for some to validate with.

    "captions" are plain pictures with what they show and no question, "views" harder ones,
    "mosaics" four things in one, "quarters" the same with a reply for each and its place, "labels"
    the number, side or colour of a thing, or a shape; `captions` lists what all these say. "names"
    asks what a picture shows, in both languages; "qa" asks all that `talk.FORMS` lists, about one
    thing or several, shapes, clips in which something moves, and nothing at all; "spoken" are of
    both kinds; the others (`KINDS` has them) are parts of "qa". Those of `SPOKEN` begin with a
    question that recordings ask, or for "pieced" pieces of several (`splice.Pieces`), if `TRIES`
    draws find one. Held-out samples have the forms that are not trained on, recordings of other
    voices (pieces are of trained ones), and drawings of the main styles as they are.
    `FOLDER#KIND:8` shows every eighth concept only: of few, pictures are sooner told apart.

    Attributes:
      name: as given to `open_source`.
      media: "image", "video" and "recordings".
    """

    def __init__(self, name: str):
        self.name = name
        folder, _, kind = name.partition("#")
        kind, _, every = kind.partition(":")
        self.kind, _, split = kind.partition("-")
        if self.kind not in KINDS or split not in ("", "held_out") or not f"{every}1".isdecimal():
            form = "FOLDER#KIND or FOLDER#KIND:EVERY, EVERY a number"
            raise ValueError(f"{name}: expected {form}, KIND one of {', '.join(KINDS)}")
        self._folder, self.split = Path(folder).absolute(), split or "train"
        held = json.loads((self._folder / CONCEPTS).read_text("utf-8"))
        self.concepts = [Concept(**row["concept"]) for row in held[:: int(every or 1)]]
        self.styles = {row["concept"]["code"]: row["styles"] for row in held}
        self.recordings = collections.defaultdict(list)
        for speech in (self._folder / "speech", self._folder / "other_speech"):
            for row in voices.clips(speech):
                if row["kind"] in ("question", "vqa") and row["split"] == self.split:
                    self.recordings[row["text"]].append(str(speech / row["file"]))
        self._pieces = splice.Pieces(folder) if self.kind == "pieced" else None
        self.media = frozenset(["image", "video", "recordings"])

    def __reduce__(self):
        return DrawnSource, (self.name,)

    def __len__(self):
        return LENGTHS[self.split]

    @contextlib.contextmanager
    def open(self, index: int):
        """The sample, its pictures read already."""
        yield self.sample(index)

    def sample(self, index: int) -> dict:
        """The sample of this number: one to four questions with answers, and where recordings say
        the first question, these (key `recordings`).
        """
        seed = HELD_OUT * (self.split == "held_out")
        draw = _Draw(self, np.random.default_rng([seed, list(KINDS).index(self.kind), index]))
        media, asks = KINDS[self.kind](draw)
        langs = draw.rng.permutation(talk.LANGS)
        turns, recordings = [], []
        for number in range(draw.rng.integers(*TURNS.get(self.kind, (2, 4)), endpoint=True)):
            lang = str(langs[number % 2])
            ask = asks[number] if self.kind == "quarters" else draw.choose(asks)
            question, reply = ask(lang)
            if not number:
                recordings = self._sounds(question, lang, draw.rng)
                for _ in range(TRIES if self.kind in SPOKEN else 0):
                    if recordings:
                        break
                    question, reply = draw.choose(asks)(lang)
                    recordings = self._sounds(question, lang, draw.rng)
                question = "".join(f"<{kind}>\n" for kind in media) + question
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": reply}]
        more = {"recordings": recordings} if recordings else {}
        return {"id": f"{self.kind} {index}", "conversations": turns, **media, **more}

    def _sounds(self, question, lang, rng):
        """What says a question: paths, or one sound with its rate."""
        if self._pieces is None:
            return self.recordings.get(question, [])
        wave = self._pieces.say(question, lang, rng)
        return [] if wave is None else [(wave, voices.RATE_HZ)]

    def drawing(self, code: str, style: str) -> np.ndarray:
        """uint8[px, px, 4], red, green, blue and cover, of a concept in one style."""
        file = _bytes(self._folder / "drawings" / style / f"{code}.png")
        with PIL.Image.open(io.BytesIO(file)) as image:
            return np.asarray(image.convert("RGBA"))


@functools.cache
def _bytes(file: Path) -> bytes:
    """A file, read once: all drawings are 63 MB."""
    return file.read_bytes()


class _Draw:
    """What one sample is made with: its source and its generator."""

    def __init__(self, source: DrawnSource, rng: np.random.Generator):
        self.source, self.rng = source, rng
        self.held_out = source.split == "held_out"
        self.restyled = not self.held_out and rng.random() < RESTYLED  # only to learn from

    def choose(self, items):
        items = list(items)
        return items[self.rng.integers(len(items))]

    def nouns(self, number):
        return [list(talk.NOUNS)[i] for i in self.rng.permutation(len(talk.NOUNS))[:number]]

    def drawing(self, code):
        """In one of the main styles; where it may be restyled, in any style as often."""
        styles = self.source.styles[code]
        main = [style for style in styles if style in MAIN]
        any_style = self.restyled and self.rng.random() < 0.5
        return self.source.drawing(code, self.choose(styles if any_style else main or styles))

    def noun(self, noun):
        return self.drawing(talk.NOUNS[noun][0])

    def ask(self, task, answer, **slots):
        """A question of the task with its answer, once a language is given."""

        def asked(lang):
            return talk.ask(task, lang, self.rng, self.held_out, **slots), answer(lang)

        return asked

    def fixed(self, task, key, **slots):
        return self.ask(task, functools.partial(talk.said, key), **slots)


def _names(draw):
    """One thing, to be named."""
    concept = draw.choose(draw.source.concepts)
    picture = scenes.single(draw.rng, draw.drawing(concept.code), PX, restyled=draw.restyled)
    return {"image": picture}, [_name(draw, concept)]


def _captions(draw):
    """One thing with nothing in the way, and its name unasked."""
    concept = draw.choose(draw.source.concepts)
    picture = scenes.plain(draw.rng, draw.drawing(concept.code), PX)
    return {"image": picture}, [_told(_naming(concept))]


def _views(draw):
    """One thing as it may be met, and its name unasked."""
    concept = draw.choose(draw.source.concepts)
    picture = scenes.single(draw.rng, draw.drawing(concept.code), PX, restyled=draw.restyled)
    return {"image": picture}, [_told(_naming(concept))]


def _mosaics(draw):
    """Four things in one picture, named one after the other: four names for one pass through the
    vision encoder.
    """
    concepts, media = _four(draw)

    def names(lang):
        told = (talk.name(concept.en, concept.zh, lang) for concept in concepts)
        return "", (" " if lang == "en" else "").join(told)

    return media, [names]


def _quarters(draw):
    """Four things in one picture, the name and the place of each unasked, as they are read: what
    each quarter is embedded as then says where it is, too, and not only to who knows the order.
    """
    concepts, media = _four(draw)
    return media, [_told(_naming(concept), *sides) for concept, sides in zip(concepts, CORNERS)]


def _four(draw):
    """Four concepts and the picture of them."""
    concepts = [draw.choose(draw.source.concepts) for _ in range(4)]
    drawings = [draw.drawing(concept.code) for concept in concepts]
    return concepts, {"image": scenes.mosaic(draw.rng, drawings, PX, restyled=draw.restyled)}


def _labels(draw):
    """How many of what, where, or of which colour: what a picture is matched with should hold more
    than a name.
    """
    noun = draw.nouns(1)[0]
    kind = draw.choose(["count", "count", "place", "place", "colour", "shape"])
    if kind == "count":
        number = int(draw.rng.integers(1, 1 + len(talk.COUNTS)))
        picture = scenes.group(draw.rng, [draw.noun(noun)] * number, PX, draw.restyled)
        answers = [functools.partial(talk.count, number, noun)]
    elif kind == "place":
        side = draw.choose(talk.SIDES)
        picture = scenes.arrange(draw.rng, [draw.noun(noun)], [side], PX, draw.restyled)
        answers = [functools.partial(talk.place, noun, side)]
    elif kind == "colour":
        word = draw.choose(talk.COLOURS)
        drawing = scenes.tint(draw.noun(noun), word)
        picture = scenes.arrange(draw.rng, [drawing], ["middle"], PX, restyled=False)
        answers = [functools.partial(talk.colour, noun, word)]
    else:
        shape, word = draw.choose(talk.SHAPES), draw.choose(SHAPE_COLOURS)
        picture = scenes.shape(draw.rng, shape, word, PX)
        answers = [functools.partial(talk.quality, what) for what in (shape, word)]
    return {"image": picture}, [_told(*answers)]


def captions(concepts: Iterable[Concept]) -> list[str]:
    """All that "captions", "views", "quarters" and "labels" may say."""
    part, names = functools.partial, [_naming(concept) for concept in concepts]
    told = [[name] for name in names] + [[name, *sides] for name in names for sides in CORNERS]
    for noun in talk.NOUNS:
        told += [[part(talk.count, 1 + i, noun)] for i in range(len(talk.COUNTS))]
        told += [[part(talk.place, noun, side)] for side in talk.SIDES]
        told += [[part(talk.colour, noun, word)] for word in talk.COLOURS]
    shapes = itertools.product(talk.SHAPES, SHAPE_COLOURS)
    told += [[part(talk.quality, what) for what in both] for both in shapes]
    return [_told(*answers)("")[1] for answers in told]


def _told(*answers):
    """A reply without a question: these answers, each in both languages, in lines, so that their
    tokens are those of answers to questions.
    """
    reply = "\n".join(answer(lang) for answer in answers for lang in talk.LANGS)
    return lambda lang: ("", reply)


def _naming(concept):
    """Its name, once a language is given."""
    return functools.partial(talk.name, concept.en, concept.zh)


def _name(draw, concept):
    return draw.ask("name", _naming(concept))


def _one(draw):
    """One thing, and all that can be asked about it."""
    concept, other = draw.choose(draw.source.concepts), draw.choose(draw.source.concepts)
    picture = scenes.single(draw.rng, draw.drawing(concept.code), PX, restyled=draw.restyled)
    asks = [_name(draw, concept)] * 6
    asks += [draw.ask("kind", functools.partial(talk.kind, concept.kind))] * 2
    for task, subgroups in KINDS_OF.items():
        asks.append(draw.fixed(task, "yes" if concept.subgroup.startswith(subgroups) else "no"))
    for it in (concept, other):
        key = "yes" if it is concept else "no"
        asks += [draw.fixed("is_noun", key, noun=(it.en, it.zh))] * 2
    noun = draw.nouns(1)[0]
    if noun not in (concept.en, other.en):
        asks.append(draw.fixed("there", "none", noun=noun))
        asks.append(
            draw.fixed(draw.choose(["where", "colour_noun", "beside"]), "unknown", noun=noun)
        )
    asks += [draw.fixed("anything", "seen"), draw.fixed("can_see", "seen")]
    return {"image": picture}, asks


def _count(draw):
    """One to six of a thing, to be counted."""
    noun, absent = draw.nouns(2)
    number = int(draw.rng.integers(1, 7))
    picture = scenes.group(draw.rng, [draw.noun(noun)] * number, PX, draw.restyled)
    answer = functools.partial(talk.count, number, noun)
    asks = [draw.ask("count", answer), draw.ask("count_noun", answer, noun=noun)] * 3
    asks += [draw.fixed("there", "seen", noun=noun), draw.fixed("there", "none", noun=absent)]
    return {"image": picture}, asks


def _place(draw):
    """One thing at a side, or two on opposite sides: where, what is there, what is beside it."""
    sides = draw.choose([("left", "right"), ("top", "bottom")] * 3 + [(s,) for s in talk.SIDES])
    sides = [str(side) for side in draw.rng.permutation(sides)]
    nouns = draw.nouns(len(sides) + 1)
    absent = nouns.pop()
    picture = scenes.arrange(
        draw.rng, [draw.noun(noun) for noun in nouns], sides, PX, draw.restyled
    )
    asks = [draw.fixed("where", "unknown", noun=absent), draw.fixed("there", "none", noun=absent)]
    for noun, side in zip(nouns, sides):
        place = functools.partial(talk.place, noun, side)
        asks += [draw.ask("where", place, noun=noun)] * 4
        asks += [draw.ask("at", functools.partial(_noun, noun), side=side)] * 2
        asks.append(draw.fixed("there", "seen", noun=noun))
    if len(nouns) == 2:
        asks += _of_both(draw, nouns, sides)
    return {"image": picture}, asks


def _pair(draw):
    """Two things on opposite sides: which, and which is beside which."""
    sides = draw.choose([("left", "right"), ("top", "bottom")])
    nouns = draw.nouns(2)
    drawings = [draw.noun(noun) for noun in nouns]
    picture = scenes.arrange(draw.rng, drawings, sides, PX, draw.restyled)
    return {"image": picture}, _of_both(draw, nouns, sides)


def _of_both(draw, nouns, sides):
    """What can be asked about one of two things by the other."""
    one, other = nouns
    asks = [draw.ask("see", functools.partial(talk.pair, *_in_order(nouns, sides)))] * 3
    asks.append(draw.ask("beside", functools.partial(_noun, one), noun=other))
    asks.append(draw.ask("beside", functools.partial(_noun, other), noun=one))
    if set(sides) == {"left", "right"}:
        left, right = _in_order(nouns, sides)
        asks += [draw.ask("left_of", functools.partial(_noun, left), noun=right)] * 2
        asks += [draw.ask("right_of", functools.partial(_noun, right), noun=left)] * 2
    return asks


def _noun(noun, lang):
    return talk.name(noun, talk.NOUNS[noun][1], lang)


def _in_order(nouns, sides):
    """As they are read: left before right, top before bottom."""
    order = sorted(range(len(nouns)), key=lambda i: list(talk.SIDES).index(sides[i]))
    return [nouns[i] for i in order]


def _colour(draw):
    """A thing in one colour, or two of a kind in two colours."""
    noun = draw.nouns(1)[0]
    words = [str(word) for word in draw.rng.permutation(list(talk.COLOURS))[:2]]
    drawing = draw.noun(noun)
    tinted = [scenes.tint(drawing, word) for word in words]
    if draw.rng.random() < 0.3:
        sides = [
            str(side)
            for side in draw.rng.permutation(draw.choose([("left", "right"), ("top", "bottom")]))
        ]
        picture = scenes.arrange(draw.rng, tinted, sides, PX, restyled=False)
        return {"image": picture}, [
            draw.ask("where_colour", functools.partial(talk.place, noun, side), colour=word)
            for word, side in zip(words, sides)
        ]
    answer = functools.partial(talk.colour, noun, words[0])
    asks = [draw.ask("colour", answer), draw.ask("colour_noun", answer, noun=noun)] * 3
    asks += [
        draw.fixed("is_colour", "yes", colour=words[0]),
        draw.fixed("is_colour", "no", colour=words[1]),
    ]
    picture = scenes.arrange(draw.rng, tinted[:1], ["middle"], PX, restyled=False)
    return {"image": picture}, asks


def _shape(draw):
    """A circle, rectangle or triangle."""
    shape, word, other = (
        draw.choose(talk.SHAPES),
        *map(str, draw.rng.permutation(SHAPE_COLOURS)[:2]),
    )
    asks = [draw.ask("shape", functools.partial(talk.quality, shape))]
    asks.append(draw.ask("colour", functools.partial(talk.quality, word)))
    asks += [
        draw.fixed("is_colour", "yes", colour=word),
        draw.fixed("is_colour", "no", colour=other),
    ]
    return {"image": scenes.shape(draw.rng, shape, word, PX)}, asks


def _move(draw):
    """A clip in which a thing moves."""
    noun, way = draw.nouns(1)[0], draw.choose(talk.MOVES)
    frames = scenes.move(draw.rng, draw.noun(noun), way, FRAMES, PX, draw.restyled)
    answer = functools.partial(talk.move, noun, way)
    asks = [draw.ask("move", answer), draw.ask("move_noun", answer, noun=noun)] * 3
    asks += [draw.ask("up_down", answer)] * (way in ("up", "down"))
    return {"video": frames}, asks


def _nothing(draw):
    """An empty picture."""
    asks = [draw.fixed("name", "nothing"), draw.fixed("anything", "nothing")]
    return {"image": scenes.blank(draw.rng, PX)}, asks


def _talk(draw):
    """No picture: small talk, and questions that would need one."""

    def chat(lang):
        return draw.choose(talk.small_talk(lang, draw.held_out))

    slots = {
        "noun": draw.nouns(1)[0],
        "colour": draw.choose(talk.COLOURS),
        "side": draw.choose(talk.SIDES),
    }
    tasks = [str(task) for task in draw.rng.permutation(list(talk.FORMS))[:6]]
    return {}, [chat] * 6 + [draw.fixed(task, "no_picture", **slots) for task in tasks]


SHARES = {
    _one: 0.22,
    _count: 0.18,
    _place: 0.24,
    _colour: 0.08,
    _shape: 0.05,
    _move: 0.1,
    _nothing: 0.02,
    _talk: 0.11,
}


def _qa(draw):
    """Any of the others."""
    shares = np.array(list(SHARES.values()))
    return list(SHARES)[draw.rng.choice(len(shares), p=shares / shares.sum())](draw)


def _spoken(draw):
    """Names or any of the others."""
    return (_names if draw.rng.random() < 0.3 else _qa)(draw)


KINDS = {
    "captions": _captions, "names": _names, "qa": _qa, "one": _one, "count": _count,
    "place": _place, "colour": _colour, "shape": _shape, "move": _move, "nothing": _nothing,
    "talk": _talk, "views": _views, "mosaics": _mosaics, "labels": _labels,
    "spoken": _spoken, "quarters": _quarters, "pair": _pair,
    "pieced": _spoken,
}  # fmt: skip
