"""Units that the CTC head writes with: Chinese characters, and pieces of the words of all else.

Goes in: transcripts to learn from, later the words of a clip. Comes out: ids, and text again. The
file `units.json` holds all of it:

    units     name of each unit of the head, the blank first; `▁` begins a word
    merges    pairs of pieces that become one, in the order in which they do (BPE)

Read next: `shard.py`, which writes the targets of stage 2.1a with them.
Source: VITA-1.5 paper, section 3.1 (CTC); the kinds of units are those of WeNet's recipes for
Mandarin with English.
"""

from __future__ import annotations

import collections
import json
import re
import unicodedata
import zlib
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from rich.console import Console
from rich.progress import track
from tokenizers import models, pre_tokenizers, trainers

from vita_jax.data.sources import open_source

FILE = "units.json"  # its name in a model's folder
BLANK = "<blank>"
MARK = "▁"
# Han characters, kana and the signs between them: each is a unit.
_HAN = "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"


class Units:
    """Text to ids and back; id i is unit i + 1 of the head, whose unit 0 is the blank.

    Attributes:
      vocab_size: number of ids, the blank not counted.
    """

    def __init__(self, names: list[str], merges: list[tuple[str, str]]):
        """Takes the names of all units but the blank, and the merges of pieces."""
        self._names, self._merges = names, [tuple(pair) for pair in merges]
        self._alphabet = {name for name in names if len(name) == 1}
        self._hf = _bpe({name: i for i, name in enumerate(names)}, self._merges)
        self.vocab_size = len(names)

    @classmethod
    def load(cls, file: str | Path) -> Units:
        """Reads units.json.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: it is none that `save` wrote.
        """
        if not Path(file).is_file():
            raise FileNotFoundError(f"{file}: no such file; make it with `vita data units`")
        try:
            held = json.loads(Path(file).read_text(encoding="utf-8"))
            blank, *names = held["units"]
            if blank != BLANK or len(set(names)) != len(names):
                raise ValueError(f"the first unit is {blank!r}, or one comes twice")
            return cls(names, held["merges"])
        except Exception as error:  # `tokenizers` raises nothing more special
            raise ValueError(f"{file}: no list of units ({error}); make it again") from error

    def save(self, file: str | Path) -> None:
        """Writes units.json."""
        Path(file).write_text(self._text(), encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as `words` writes it.

        Raises:
          ValueError: it has a character that no unit has; all such are named.
        """
        text = " ".join(words(text))
        if unknown := sorted(set(text) - self._alphabet - {" "}):
            raise ValueError(f"no unit for {' '.join(unknown)} in {text.replace(MARK, '')!r}")
        return self._hf.encode(text).ids

    def decode(self, ids) -> str:
        """Text of `ids`; an id that is not in use is nothing."""
        names = (self._names[i] for i in ids if 0 <= i < self.vocab_size)
        return "".join(names).replace(MARK, " ").strip()

    @property
    def checksum(self) -> int:
        """Differs where units do."""
        return zlib.crc32(self._text().encode())

    @property
    def num_characters(self) -> int:
        """Units that are Chinese characters (or kana); the others are pieces of words."""
        return sum(map(_is_han, self._names))

    def _text(self):
        held = {"units": [BLANK, *self._names], "merges": self._merges}
        return json.dumps(held, ensure_ascii=False, indent=0)


def check_head(units, num_units: int, where) -> None:
    """Refuses a CTC head that is too small.

    Args:
      units: `Units`, or the tokenizer whose ids they are.
      num_units: of the head, the blank included; 0 is no head.
      where: what the units come from, for the error.

    Raises:
      ValueError: the head has fewer than there are.
    """
    if 0 < num_units <= units.vocab_size:
        number = units.vocab_size + 1
        raise ValueError(
            f"{where}: {number} CTC units, the blank included, and the head has {num_units}; set "
            f"model.audio.num_units={number}, or learn fewer: vita data units --size {num_units}"
        )


def words(text: str) -> list[str]:
    """`text` as it is written with units: its words, each begun by `▁`, and its Han characters.

    NFKC, lower case; letters, their accents, digits and apostrophes inside words stay, all else
    (punctuation, signs, line breaks) parts words.
    """
    text = unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'")
    kept = (c if c == "'" or unicodedata.category(c)[0] in "LMN" else " " for c in text)
    split = (word for piece in apart("".join(kept)) for word in piece.split())
    bare = (word.strip("'") for word in split)
    return [word if _is_han(word) else MARK + word for word in bare if word]


def apart(text: str) -> list[str]:
    """`text` in pieces: each Han character, and all between two of them as it is."""
    return [piece for piece in re.split(f"([{_HAN}])", text) if piece]


def learn(texts: Iterable[str], size: int) -> tuple[Units, float]:
    """Units for transcripts.

    Args:
      texts: the transcripts.
      size: most units there may be, the blank included. Characters come first, the most frequent
        if there are too many; BPE over words fills the rest, with pairs that come twice or more.

    Returns:
      the units, and the share of words (a Han character is one) that they can write.

    Raises:
      ValueError: there are no words, or `size` is less than 2.
    """
    if size < 2:
        raise ValueError(f"{size} units: expected at least 2, the blank and another")
    counts = collections.Counter(word for text in texts for word in words(text))
    if not counts:
        raise ValueError("no words to learn units from; give speech with its transcripts")
    letters = collections.Counter()
    for word, number in counts.items():
        for letter in word:
            letters[letter] += number
    alphabet = sorted(letters, key=lambda letter: (-letters[letter], letter))[: size - 1]
    hf = _bpe({}, [])
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1,
        min_frequency=2,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    several = ((word, n) for word, n in sorted(counts.items()) if not _is_han(word))
    hf.train_from_iterator((f"{word} " * n for word, n in several), trainer)
    model = json.loads(hf.to_str())["model"]
    units = Units(sorted(model["vocab"], key=model["vocab"].get), model["merges"])
    written = sum(n for word, n in counts.items() if set(word) <= set(alphabet))
    return units, written / counts.total()


def transcripts(source: str, progress: bool = False) -> Iterable[str]:
    """The replies to each sample with sound of a source; samples that cannot be read are left out.

    Args:
      source: as in a mixture.
      progress: whether to draw a bar.
    """
    samples = open_source(source)
    console = Console(stderr=True)
    for index in track(range(len(samples)), "samples", console=console, disable=not progress):
        try:
            with samples.open(index) as sample:
                if sample.get("audio"):
                    yield " ".join(turn["value"] for turn in sample["conversations"][1::2])
        except (ValueError, OSError, TypeError, KeyError):  # the loader will name them
            continue


def _bpe(vocab, merges) -> tokenizers.Tokenizer:
    """BPE inside of what blanks part."""
    hf = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    hf.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf


def _is_han(word):
    return re.fullmatch(f"[{_HAN}]", word) is not None
