"""Clips put together from pieces of others: what is said is new every time, without speaking it.

An audio encoder that hears the same few thousand sentences in every epoch knows them by heart, and
then hears them in others. Goes in: a folder of synthesised clips with `cuts.jsonl`, the times at
which each can be cut between its words, as the synthesiser's own durations say. Comes out: samples
that ask for the words of a clip, each made of its number alone. Read next: `voices.py`.
Source: Lam et al. 2021, On-the-Fly Aligned Data Augmentation for Sequence-to-Sequence ASR.
"""

from __future__ import annotations

import collections
import contextlib
import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from vita_jax.data import talk, voices
from vita_jax.data.audio import read_audio, trim
from vita_jax.data.sources import SPLICED

CUTS = "cuts.jsonl"
DURATIONS, DURATION_S = "/encoder/Clip_output_0", 0.025  # of Kokoro's phonemes; their unit
LEAD_S = 0.05  # of its sound over these; at cuts the mean energy is then lowest, as measured
TONES, STRESS = "→↓↗↘", "ˈˌ"  # behind a syllable, before a vowel
LENGTH = 1_000_000  # samples before the first comes again
PIECES = (2, 4)  # of a clip: least, most
WORDS = {"en": (1, 4), "zh": (2, 5)}  # or characters, of a piece: least, most
EDGE_S = 0.03  # of silence that is left at either end of a piece
FADE_S = 0.005  # of a piece into the next
MAX_SILENCE = round(0.4 * voices.RATE_HZ)  # samples, at either end
TRIES = 8  # voices, and places in which a word is looked for


def write_cuts(speech: Path, packages: Path, progress: bool = False) -> None:
    """Adds to a folder's `CUTS` the clips to train on that are not in it.

    Args:
      speech: folder of clips that `voices.Kokoro` spoke.
      packages: as for it.
      progress: whether to draw a bar.

    Raises:
      ModuleNotFoundError, FileNotFoundError: as `voices.Kokoro`.
    """
    file = speech / CUTS
    lines = file.read_text("utf-8").splitlines() if file.exists() else ()
    done = {json.loads(line)["file"] for line in lines}
    timing = None
    with file.open("a", encoding="utf-8", buffering=1) as cuts:  # by the line: it may be stopped
        console = Console(stderr=True)
        rows = voices.clips(speech)
        for row in track(rows, "finding words", console=console, disable=not progress):
            if row["split"] == "train" and row["file"] not in done:
                timing = timing or Timing(packages)
                words, at = timing(row["text"], row["lang"], row["voice"])
                kept = {key: row[key] for key in ("file", "lang", "voice")}
                cuts.write(json.dumps(kept | {"words": words, "at": at}, ensure_ascii=False) + "\n")


class Timing(voices.Kokoro):
    """When the synthesiser says each word of a clip: `timing(text, lang, voice)` is its words, by
    `voices.words_of`, and as many seconds and one more, before, between and behind them; None where
    it is not known.
    """

    def _part(self, model):
        """The network as far as the durations of phonemes: a fiftieth of the work."""
        try:
            import onnx.utils
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{error}; pip install 'vita_jax[data]'") from None
        whole = onnx.load_from_string(model)
        inputs = [put.name for put in whole.graph.input]
        return onnx.utils.Extractor(whole).extract_model(inputs, [DURATIONS]).SerializeToString()

    def __call__(self, text: str, lang: str, voice: str) -> tuple[list[str], list[float | None]]:
        words, symbols = voices.words_of(text, lang), self._symbols(text, lang)
        # Before the first symbol there is silence, whose end is that symbol's beginning.
        begins = np.cumsum(self._run(symbols, voice)) * DURATION_S - LEAD_S
        sounds = [i for i, symbol in enumerate(symbols) if _is_sound(symbol)]

        def number(words):
            return sum(map(_is_sound, self._symbols(voices.SPACE[lang].join(words), lang)))

        at: list[float | None] = [begins[sounds[0]]]
        for i in range(1, len(words)):
            before = number(words[:i])
            # Words said together may have fewer sounds than apart: which are whose is not known.
            known = before + number(words[i:]) == len(sounds)
            at.append(_between(symbols, sounds[before - 1], begins) if known else None)
        at.append(_between(symbols, sounds[-1], begins))
        return words, [time if time is None else round(float(time), 4) for time in at]


def _between(symbols, last, begins):
    """When a word is over of which the last sound is this one: amid the space, if one follows."""
    end = last + 1
    while end < len(symbols) and symbols[end] in TONES:
        end += 1
    spaced = end < len(symbols) and symbols[end] == " "
    return (begins[end] + begins[end + spaced]) / 2


def _is_sound(symbol):
    """Whether a symbol is neither punctuation nor a mark of tone or stress."""
    return symbol.isalpha() and symbol not in STRESS


class Pieces:
    """What voices have said, to be put together anew."""

    def __init__(self, folder: str | Path):
        """`folder`: with a folder `speech` that `write_cuts` was given.

        Raises:
          FileNotFoundError: there is no list of cuts.
        """
        self._speech = Path(folder).absolute() / "speech"
        file = self._speech / CUTS
        if not file.exists():
            raise FileNotFoundError(f"{file}: no such list; vita data build writes it")
        by_voice = collections.defaultdict(list)
        for line in file.read_text("utf-8").splitlines():
            row = json.loads(line)
            by_voice[row["lang"], row["voice"]].append(row)
        self._voices = [(lang, rows) for (lang, _), rows in sorted(by_voice.items())]
        sizes = [len(rows) for _, rows in self._voices]
        self._shares = np.cumsum(sizes) / sum(sizes)
        self._places = [self._index(rows) for _, rows in self._voices]

    def _index(self, rows):
        """{word: (row, number of the word in it) of each that can be cut before it}."""
        places = collections.defaultdict(list)
        for row in rows:
            for number, word in enumerate(row["words"]):
                if row["at"][number] is not None:
                    places[word].append((row, number))
        return places

    def draw(self, rng: np.random.Generator) -> tuple[str, list[str], np.ndarray]:
        """Language, words and sound, float32[W] at 24 kHz, of pieces drawn at random."""
        lang, rows = self._voices[int(np.searchsorted(self._shares, rng.random(), "right"))]
        words, sounds = [], []
        for _ in range(rng.integers(*PIECES, endpoint=True)):
            row = rows[rng.integers(len(rows))]
            cuts = [i for i, at in enumerate(row["at"]) if at is not None]
            first = cuts[rng.integers(len(cuts) - 1)]
            wanted = first + rng.integers(*WORDS[lang], endpoint=True)
            last = min((i for i in cuts if i > first), key=lambda i: abs(i - wanted))
            words += row["words"][first:last]
            sounds.append(self._sound(row, first, last))
        return lang, words, joined(sounds, rng)

    def say(self, text: str, lang: str, rng: np.random.Generator) -> np.ndarray | None:
        """float32[W] at 24 kHz: the text in pieces of one voice, each as long as it is found in one
        of a few clips; None if none of a few voices has said all of its words.
        """
        words = voices.words_of(text, lang)
        speaks = [i for i, (spoken, _) in enumerate(self._voices) if spoken == lang]
        for voice in rng.permutation(speaks)[:TRIES]:
            sounds, at = [], 0
            while at < len(words) and (places := self._places[voice].get(words[at])):
                few = rng.permutation(len(places))[:TRIES]
                most = at + rng.integers(*WORDS[lang], endpoint=True)
                found = [(*places[i], _shared(*places[i], words[at:most])) for i in few]
                row, first, length = max(found, key=lambda it: it[2])
                if not length:
                    break
                sounds.append(self._sound(row, first, first + length))
                at += length
            if at == len(words):
                return joined(sounds, rng)
        return None

    def _sound(self, row, first, last):
        """Of words `first` to `last` of a clip."""
        start, end = (round(row["at"][i] * voices.RATE_HZ) for i in (first, last))
        wave = read_audio(self._speech / row["file"], voices.RATE_HZ)[start:end]
        return trim(wave, voices.RATE_HZ, EDGE_S, EDGE_S)


def _shared(row, first, words):
    """How many of the words the clip says from its `first` on, up to where it can be cut."""
    same = 0
    for number, (one, other) in enumerate(zip(row["words"][first:], words), 1):
        if one != other:
            break
        if row["at"][first + number] is not None:
            same = number
    return same


class SplicedSource:
    """Samples that ask for the words of a clip: pieces of clips of one voice, one behind the other.

    Attributes:
      name: as given to `open_source`.
      media: "audio".
    """

    def __init__(self, name: str):
        """`name`: FOLDER#spliced, FOLDER as for `Pieces`."""
        self.name, self.media = name, frozenset(["audio"])
        self._pieces = Pieces(name.removesuffix(SPLICED))

    def __reduce__(self):
        return SplicedSource, (self.name,)

    def __len__(self):
        return LENGTH

    @contextlib.contextmanager
    def open(self, index: int):
        """The sample, its sound read already."""
        yield self.sample(index)

    def sample(self, index: int) -> dict:
        """The sample of this number."""
        lang, words, wave = self._pieces.draw(np.random.default_rng([3, index]))
        text = voices.question(words, lang)
        row = {"file": f"spliced {index}", "lang": lang, "text": text}
        return talk.transcription(row) | {"audio": [(wave, voices.RATE_HZ)]}


def joined(sounds: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """float32[W] of float32[.] each, every one faded into the next, with silence around them."""
    size = round(FADE_S * voices.RATE_HZ)
    before, after = (np.zeros(n, np.float32) for n in rng.integers(size, MAX_SILENCE, 2))
    up = np.linspace(0, 1, size, dtype=np.float32)
    wave = before
    for sound in (*sounds, after):
        over = wave[-size:] * up[::-1] + sound[:size] * up
        wave = np.concatenate([wave[:-size], over, sound[size:]])
    return wave
