"""A first data set: a few hundred real samples, enough to try every stage on a laptop.

Goes in: recordings in a folder, and pictures with questions out of the package `easy-vqa`. Comes
out: folders in the release's sample format, one for each kind of data that a stage reads.
Read next: `sources.py`, which reads them.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from vita_jax.data.audio import SAMPLE_RATE_HZ, write_wav
from vita_jax.data.sources import CLIPS, MANIFEST, SOUNDS, with_files

SPLITS = {"train": ".", "held_out": "held_out"}  # of the clips -> folder of their samples
SIZES = {"captions": 160, "qa": 240, "noise": 24}  # samples to train on
COLOURS = {
    "black": "黑色", "blue": "蓝色", "brown": "棕色", "gray": "灰色", "green": "绿色",
    "red": "红色", "teal": "青色", "yellow": "黄色",
}  # fmt: skip
SHAPES = {"circle": "圆形", "rectangle": "长方形", "triangle": "三角形"}
DESCRIBE = {"en": "Describe the picture.", "zh": "请描述这张图片。"}
ASK = {  # a caption answers these as well
    "en": ("What is this?", "What do you see?", "What is in the picture?"),
    "zh": ("这是什么？", "你看到了什么？", "图片里有什么？"),
}
TRANSCRIBE = "Write down what you hear."


def starter(
    clips: str | Path,
    target: str | Path,
    seed: int = 0,
    sizes: dict[str, int] = SIZES,
    progress: bool = False,
) -> dict:
    """Writes the folders text, captions, qa, speech and noise, and the same in `held_out`.

    Held out are the speech of some voices (in spoken questions, too), easy-vqa's own test pictures,
    every tenth written question, and other noise. The captions, and what is asked about pictures,
    have the same words in both.

    Args:
      clips: folder of recordings with `manifest.jsonl`, an object a line: `file` in the folder,
        `text` that it says, and `split`, "train" or "held_out", the same for all of a voice.
      target: folder to write. It is there only once it is whole.
      seed: the same seed writes the same bytes.
      sizes: samples of "captions", "qa" and "noise" to train on; a quarter as many are held out.
      progress: whether to draw a bar.

    Returns:
      What `manifest.json` in `target` holds: numbers of `samples` by folder, the `seed`, and
      `sources` with their licences.

    Raises:
      FileNotFoundError: there is no such folder of clips, or no manifest in it.
      ModuleNotFoundError: easy-vqa is not installed.
      ValueError: `target` is there already, a line of the clips' manifest is not as above, or none
        is of one of the splits.
    """
    clips, target = Path(clips), Path(target)
    if target.exists():
        raise ValueError(f"{target}: is there already; remove it or name another folder")
    recordings, pictures = _recordings(clips), _pictures()
    whole, target = target, target.with_name(target.name + ".part")
    shutil.rmtree(target, ignore_errors=True)
    numbers = {}
    folders = list(itertools.product(SPLITS.items(), enumerate(_KINDS.items())))
    console = Console(stderr=True)
    for (split, place), (stream, (kind, make)) in track(
        folders, "folders", console=console, disable=not progress
    ):
        folder = target / place / kind
        (folder / "audio").mkdir(parents=True)
        held_out = split == "held_out"
        number = -(-sizes.get(kind, 0) // (4 if held_out else 1))
        rng = np.random.default_rng([seed, held_out, stream])
        samples = make(_Given(rng, number, split, pictures[split], recordings, folder))
        _write(folder, kind, samples)
        numbers[str(folder.relative_to(target))] = len(samples)
    manifest = {
        "samples": numbers,
        "seed": seed,
        "sources": {
            "pictures and questions about them": "easy-vqa 1.0, MIT",
            "recordings": f"{clips.absolute().name}, terms in its README.md",
            "all else": "written or drawn by vita_jax, Apache-2.0",
        },
    }
    (target / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    target.replace(whole)
    return manifest


@dataclasses.dataclass
class _Given:
    """What samples of one kind are made from."""

    rng: np.random.Generator
    number: int  # how many, where that is a choice
    split: str
    pictures: list  # of the split
    recordings: dict  # of all splits
    folder: Path  # where they go


def _recordings(folder):
    """{split: [line of the clips' manifest, `file` with its folder]}."""
    path = folder / CLIPS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a folder of clips that has one")
    held, names = {split: [] for split in SPLITS}, set()
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            row = {key: row[key] for key in ("file", "text", "split")}
            held[row["split"]].append(row | {"file": str(folder / row["file"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: {error!r}; expected an object with file, text and "
                f"split ({' or '.join(SPLITS)})"
            ) from None
        if (name := Path(row["file"]).name) in names:
            raise ValueError(f"{path}, line {number}: a second {name}; files need different names")
        names.add(name)
    if empty := [split for split, rows in held.items() if not rows]:
        raise ValueError(f"{path}: no clip of split {empty[0]}; mark those of a voice or two so")
    return held


def _pictures():
    """{split: [(file, [(question, answer)], colour and shape)]} of easy-vqa: those of its pictures
    that are asked for both colour and shape.
    """
    try:
        import easy_vqa
    except ModuleNotFoundError:
        message = "easy-vqa is not installed; pip install 'vita_jax[data]'"
        raise ModuleNotFoundError(message) from None
    held = {}
    for split, name in zip(SPLITS, ("train", "test")):
        files = getattr(easy_vqa, f"get_{name}_image_paths")()
        talks = collections.defaultdict(list)
        for question, answer, picture in zip(*getattr(easy_vqa, f"get_{name}_questions")()):
            talks[picture].append((question, answer))
        held[split] = []
        for picture, talk in sorted(talks.items()):
            answers = {answer for _, answer in talk}
            look = sorted(answers & COLOURS.keys()) + sorted(answers & SHAPES.keys())
            if len(look) == 2:
                held[split].append((files[picture], talk, look))
    return held


def _caption(look, lang):
    colour, shape = look
    return f"a {colour} {shape}" if lang == "en" else f"一个{COLOURS[colour]}的{SHAPES[shape]}"


def _text(given):
    """Written questions: sums, descriptions to look up, translations, sentences to repeat."""
    talks = [(f"{a} + {b} = ?", str(a + b)) for a in range(10) for b in range(10)]
    for colour in COLOURS:
        for shape in SHAPES:
            en, zh = (_caption((colour, shape), lang) for lang in DESCRIBE)
            talks += [
                (f"In Chinese: {en}", zh),
                (f"用英语说：{zh}", en),
                (f"There is {en}. what color is it?", colour),
                (f"There is {en}. what shape is it?", shape),
            ]
    said = {row["text"] for row in given.recordings["train"]}
    talks += [(f"Repeat: {text}", text) for text in sorted(said)]
    held_out = np.random.default_rng(0).permutation(len(talks)) % 10 == 0
    return [_sample(*t) for t, out in zip(talks, held_out) if out == (given.split == "held_out")]


def _captions(given):
    """Pictures to describe, in both languages by turns."""
    chosen = [given.pictures[i] for i in _choose(given)]
    langs = [lang for _ in chosen for lang in DESCRIBE]
    return [
        _sample(f"<image>\n{DESCRIBE[lang]}", _caption(look, lang), image=file)
        for (file, _, look), lang in zip(chosen, langs)
    ]


def _questions(given):
    """Questions about pictures, easy-vqa's and `ASK`; two of three have recordings if clips do."""
    spoken = collections.defaultdict(list)
    for row in given.recordings[given.split]:
        spoken[row["text"].lower()].append(row["file"])
    asks = [(question, lang) for lang, questions in ASK.items() for question in questions]
    samples = []
    for turn, i in enumerate(_choose(given)):
        file, talk, look = given.pictures[i]
        question, lang = asks[given.rng.integers(len(asks))]
        talk = [(q, a) for q, a in talk if (q in spoken) == (turn % 3 == 1)]
        if turn % 3 == 2 or not talk:
            talk = [(question, _caption(look, lang))]
        question, answer = talk[given.rng.integers(len(talk))]
        files = spoken.get(question.lower())
        more = {"recordings": files} if files else {}
        samples.append(_sample(f"<image>\n{question}", answer, image=file, **more))
    return samples


def _speech(given):
    """Clips to write down."""
    rows = given.recordings[given.split]
    return [_sample(f"<audio>{TRANSCRIBE}", row["text"], audio=[row["file"]]) for row in rows]


def _noise(given):
    """Noise that asks nothing, from white to a low rumble, 1 to 2 s."""
    rng, samples = given.rng, []
    for i in range(given.number):
        length = int(rng.uniform(1, 2) * SAMPLE_RATE_HZ)
        spectrum = np.fft.rfft(rng.standard_normal(length))
        spectrum /= np.maximum(np.arange(len(spectrum)), 1) ** rng.uniform(0, 1)
        wave = np.fft.irfft(spectrum, length)
        path = given.folder / "audio" / f"noise_{i}.wav"
        write_wav(path, wave * rng.uniform(0.05, 0.5) / np.abs(wave).max(), SAMPLE_RATE_HZ)
        samples.append(_sample("<audio>", "", audio=[str(path)], inserted_id=1))
    return samples


def _choose(given):
    """Indices of so many pictures."""
    return given.rng.permutation(len(given.pictures))[: given.number]


def _sample(question, answer, **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **more}


def _write(folder, kind, samples):
    """The samples as JSON lines, their files beside them."""

    def place(key, index, file):
        copy = (folder / "audio" if key in SOUNDS else folder) / Path(file).name
        if not copy.exists():
            shutil.copyfile(file, copy)
        return copy.name

    lines = [
        json.dumps({"id": f"{kind} {i}", **with_files(sample, place)}, ensure_ascii=False)
        for i, sample in enumerate(samples)
    ]
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


_KINDS = {
    "text": _text,
    "captions": _captions,
    "qa": _questions,
    "speech": _speech,
    "noise": _noise,
}
