"""Clips put together from pieces of others: what is said is new every time, without speaking it.

An audio encoder that hears the same few thousand sentences in every epoch knows them by heart, and
then hears them in others. Goes in: a folder of synthesised clips with `cuts.jsonl`, the times at
which each can be cut between its words. Comes out: samples that ask for the words of a clip, each
made of its number alone. Read next: `voices.py`, whose synthesiser says where words are.
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

from vita_jax.data import nano, voices
from vita_jax.data.audio import read_audio, trim
from vita_jax.data.sources import SPLICED

CUTS = "cuts.jsonl"
LENGTH = 1_000_000  # samples before the first comes again
PIECES = (2, 4)  # of a clip: least, most
WORDS = {"en": (1, 4), "zh": (2, 5)}  # or characters, of a piece: least, most
EDGE_S = 0.03  # of silence that is left at either end of a piece
FADE_S = 0.005  # of a piece into the next
SILENCE_S = 0.4  # at most, at either end


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
    with file.open("a", encoding="utf-8") as cuts:
        console = Console(stderr=True)
        rows = voices.clips(speech)
        for row in track(rows, "finding words", console=console, disable=not progress):
            if row["split"] == "train" and row["file"] not in done:
                timing = timing or voices.Timing(packages)
                words, at = timing(row["text"], row["lang"], row["voice"])
                kept = {key: row[key] for key in ("file", "lang", "voice")}
                cuts.write(json.dumps(kept | {"words": words, "at": at}, ensure_ascii=False) + "\n")


class SplicedSource:
    """Samples that ask for the words of a clip: pieces of clips of one voice, one behind the other.

    Attributes:
      name: as given to `open_source`.
      media: "audio".
    """

    def __init__(self, name: str):
        """`name`: FOLDER#spliced, FOLDER with a folder `speech` that `write_cuts` was given.

        Raises:
          FileNotFoundError: there is no list of cuts.
        """
        self.name, self.media = name, frozenset(["audio"])
        self._speech = Path(name.removesuffix(SPLICED)).absolute() / "speech"
        file = self._speech / CUTS
        if not file.exists():
            message = "no such list; vita data build writes it"
            raise FileNotFoundError(f"{file}: {message}")
        by_voice = collections.defaultdict(list)
        for line in file.read_text("utf-8").splitlines():
            row = json.loads(line)
            if sum(at is not None for at in row["at"]) > 2:
                by_voice[row["lang"], row["voice"]].append(row)
        self._voices = [(lang, rows) for (lang, _), rows in sorted(by_voice.items())]
        sizes = np.array([len(rows) for _, rows in self._voices], float)
        self._shares = np.cumsum(sizes) / sizes.sum()

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
        rng = np.random.default_rng([3, index])
        lang, rows = self._voices[int(np.searchsorted(self._shares, rng.random(), "right"))]
        least, most = PIECES
        words, pieces = [], [self._silence(rng)]
        for _ in range(rng.integers(least, most, endpoint=True)):
            said, piece = self._piece(rows[rng.integers(len(rows))], WORDS[lang], rng)
            words += said
            pieces.append(piece)
        pieces.append(self._silence(rng))
        row = {"file": f"spliced {index}", "lang": lang, "text": voices.question(words, lang)}
        return nano.transcription(row) | {"audio": [(joined(pieces), voices.RATE_HZ)]}

    def _piece(self, row, lengths, rng):
        """Neighbouring words of a clip, and their sound."""
        cuts = [i for i, at in enumerate(row["at"]) if at is not None]
        first = cuts[rng.integers(len(cuts) - 1)]
        wanted = first + rng.integers(*lengths, endpoint=True)
        last = min((i for i in cuts if i > first), key=lambda i: abs(i - wanted))
        start, end = row["at"][first], row["at"][last]
        wave = read_audio(self._speech / row["file"], voices.RATE_HZ)
        wave = wave[round(start * voices.RATE_HZ) : round(end * voices.RATE_HZ)]
        return row["words"][first:last], trim(wave, voices.RATE_HZ, EDGE_S, EDGE_S)

    def _silence(self, rng):
        return np.zeros(int(rng.uniform(FADE_S, SILENCE_S) * voices.RATE_HZ), np.float32)


def joined(pieces: list[np.ndarray]) -> np.ndarray:
    """float32[W] of float32[.] each, every one faded into the next."""
    size = round(FADE_S * voices.RATE_HZ)
    up = np.linspace(0, 1, size, dtype=np.float32)
    wave = pieces[0]
    for piece in pieces[1:]:
        over = wave[-size:] * up[::-1] + piece[:size] * up
        wave = np.concatenate([wave[:-size], over, piece[size:]])
    return wave
