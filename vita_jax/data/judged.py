"""What the small model is judged by: pictures, questions and clips that no stage trains on.

Goes in: a folder in which `nano.build` has made drawings and speech. Comes out: `eval/SET` in it,
samples in the release's format with their files, for `vita eval nano`. Read next: `eval_nano.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import av
import numpy as np
import PIL.Image
from rich.console import Console
from rich.progress import track

from vita_jax.data import concepts as drawings
from vita_jax.data import nano, talk
from vita_jax.data.concepts import Concept
from vita_jax.data.drawn import DrawnSource

NUMBER = 240  # samples of a set, if there are as many
OPENMOJI = "candidates.json"  # all names that the pictures of this set may have


def write_sets(
    target: Path, packages: Path, known: Iterable[Concept], progress: bool = False
) -> dict[str, int]:
    """Writes the sets anew and returns how many samples each has.

    Questions have the forms, recordings the voices, and sounds and sentences the texts that are
    held out; pictures are new ones of known drawings, or, in "openmoji", drawings of an unknown
    style; "easy_vqa" is of its test split.
    """
    root, known = target / "eval", list(known)
    shutil.rmtree(root, ignore_errors=True)
    made = {
        **_pictures(target), "openmoji": _openmoji(root / "openmoji", packages, known),
        "easy_vqa": _spread(nano.easy_vqa("test"), 2 * NUMBER), **_speech(target),
        "noise": list(nano.noises(target / "held_out" / "noise", NUMBER, True)),
    }  # fmt: skip
    for name, samples in track(
        made.items(), "sets to judge by", console=Console(stderr=True), disable=not progress
    ):
        nano.write(root / name, [_with_files(root / name, i, s) for i, s in enumerate(samples)])
    return {name: len(samples) for name, samples in made.items()}


def _pictures(target):
    """{set: samples} of drawn pictures; those with recordings make the sets of spoken questions."""
    sets = {}
    kinds = {
        "name_en": "names",
        "name_zh": "names",
        "count": "count",
        "place": "place",
        "move": "move",
    }
    kinds |= {"spoken_en": "qa", "spoken_zh": "qa"}
    for name, kind in kinds.items():
        source, sets[name], index = DrawnSource(f"{target}#{kind}-held_out"), [], 10_000
        while len(sets[name]) < NUMBER and index < 10_000 + 8 * NUMBER:
            sample, index = source.sample(index), index + 1
            sample["conversations"] = sample["conversations"][:2]
            sample["lang"] = _lang(sample["conversations"][1]["value"])
            spoken = name.startswith("spoken")
            if name[-3:] in ("_en", "_zh") and not name.endswith(sample["lang"]):
                continue
            if spoken and not ("recordings" in sample and {"image", "video"} & sample.keys()):
                continue
            if not spoken:
                sample.pop("recordings", None)
            sets[name].append(sample)
    return sets


def _lang(text):
    return "zh" if any("\u4e00" <= c <= "\u9fff" for c in text) else "en"


def _openmoji(folder, packages, known):
    """Drawings of the unknown style on white, and the names to choose from."""
    made, samples = drawings.Drawings(packages), []
    (style,) = drawings.HELD_OUT
    for concept in _spread(known, 2 * NUMBER):
        drawing = PIL.Image.fromarray(made.draw(style, concept.code, 96))
        picture = PIL.Image.new("RGB", (112, 112), "white")
        picture.paste(drawing, (8, 8), drawing)
        name = talk.name(concept.en, concept.zh, "en")
        samples.append(talk.sample(concept.code, "<image>\nWhat is this?", name, image=picture))
    folder.mkdir(parents=True)
    names = sorted({talk.name(concept.en, concept.zh, "en") for concept in known})
    (folder / OPENMOJI).write_text(json.dumps(names, indent=0))
    return samples


def _speech(target):
    """{set: samples} of clips."""
    beside = Path(target, "eval", "audio")  # as deep as the folders that the files are seen from
    rows = [row | {"file": str((beside / row["file"]).resolve())} for row in nano.clips(target)]
    unseen = [row for row in rows if row["split"] == "unseen"]
    rows = [row for row in rows if row["split"] == "held_out"]
    sets = {}
    for lang in talk.LANGS:
        asked, read = (
            [row for row in rows if row["lang"] == lang and row["kind"] in kinds]
            for kinds in (("question", "vqa"), ("sentence",))
        )
        sets[f"asr_domain_{lang}"] = _spread(map(talk.transcription, asked), NUMBER)
        sets[f"asr_sentences_{lang}"] = _spread(map(talk.transcription, read), NUMBER)
        answers = [
            row["text"]
            for row in nano.clips(target)
            if row["kind"] == "answer" and row["lang"] == lang
        ]
        sets[f"say_{lang}"] = [
            talk.sample(text, "", text, lang=lang)
            for text in _spread(dict.fromkeys(answers), NUMBER)
        ]
    human = [row for row in rows if row["kind"] == "prompt"]
    sets["asr_human"] = list(map(talk.transcription, human))
    read = [row for row in rows if row["kind"] == "sentence"] + human
    sets["overheard"] = [_heard(row, inserted_id=1) for row in _spread(read, NUMBER)]
    asked = [row for row in rows if row["kind"] == "question"]
    sets["query"] = [_heard(row) for row in _spread(asked, NUMBER)]
    held_out = [row for row in rows if row["kind"] != "prompt"]
    sets["codec_answer"] = [_heard(row) for row in _spread(unseen, NUMBER)]
    sets["codec_held_out"] = [_heard(row) for row in _spread(held_out, NUMBER)]
    return sets


def _heard(row, **more):
    return talk.sample(
        row["file"], "<audio>", row["text"], audio=[row["file"]], lang=row["lang"], **more
    )


def _spread(items, number):
    """So many of the items, from all over the list."""
    items = list(items)
    chosen = np.random.default_rng(0).permutation(len(items))[:number]
    return [items[i] for i in sorted(chosen)]


def _with_files(folder, index, sample):
    """The sample with its pictures and sounds copied into the folder."""
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    sample = dict(sample)
    if "image" in sample:
        image = sample["image"]
        image = PIL.Image.open(image) if isinstance(image, str) else image
        image.save(folder / f"{index}.png")
        sample["image"] = f"{index}.png"
    if "video" in sample:
        _film(folder / f"{index}.mkv", sample["video"])
        sample["video"] = f"{index}.mkv"
    for key in ("audio", "recordings"):
        if key in sample:
            for file in sample[key]:
                shutil.copyfile(file, folder / "audio" / Path(file).name)
            sample[key] = [Path(file).name for file in sample[key]]
    return sample


def _film(path, frames, rate=1):
    """A video without loss, a frame a second, as `Processor` takes them by default."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("ffv1", rate=rate)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "bgr0"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_image(frame)))
        file.mux(stream.encode())
