"""Text to token ids and back: byte-level BPE as in Qwen2, on Hugging Face `tokenizers`.

Goes in: a folder with a vocabulary, or texts to learn one from. Comes out: a `Tokenizer`, and a
`StreamDecoder` that turns ids into text one at a time. Read next: `processor.py`.
Source: Qwen2 technical report, section 2.1; the byte table of GPT-2.
"""

from __future__ import annotations

import base64
import codecs
import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from vita_jax.data.prompts import END, PAD, START, STATES

# Qwen2's: endings like 's, words with the mark before them, digits, marks, line breaks, blanks.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIALS = (PAD, START, END)  # at the ids after the vocabulary, in this order


def _byte_chars() -> list[str]:
    """The printable character that stands for each byte in a vocabulary file. Source: GPT-2."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_CHARS = _byte_chars()
_BYTES = {char: byte for byte, char in enumerate(_CHARS)}


class Tokenizer:
    """Text to ids and back, special tokens and state tokens included.

    Attributes:
      vocab_size: one more than the largest id.
      pad_id: of `<|endoftext|>`.
      eos_id: of `<|im_end|>`, the end of a reply.
      state_ids: id of each state token by its name in `prompts.STATES`.
    """

    def __init__(self, hf: tokenizers.Tokenizer, source: str = "tokenizer"):
        """Wraps a byte-level BPE; `source` names it in errors.

        Raises:
          ValueError: it is not byte-level, or a special or state token is not exactly one token.
        """
        if not isinstance(hf.decoder, decoders.ByteLevel):
            raise ValueError(f"{source}: not a byte-level BPE; give a tokenizer of Qwen2's kind")
        self._hf = hf
        self._added = {i: t.content.encode() for i, t in hf.get_added_tokens_decoder().items()}
        single = {}
        for token in (*_SPECIALS, *STATES.values()):
            ids = self.encode(token)
            if len(ids) != 1:
                raise ValueError(
                    f"{source}: {token} is {len(ids)} tokens and must be one; "
                    "give a tokenizer that has it"
                )
            single[token] = ids[0]
        self.pad_id = single[PAD]
        self.eos_id = single[END]
        self.state_ids = {name: single[token] for name, token in STATES.items()}
        self.vocab_size = max(hf.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Reads tokenizer.json, else vocab.json and merges.txt, else qwen.tiktoken.

        The last two hold no special tokens: those of tokenizer_config.json are added, or, without
        that file, Qwen2's three.

        Raises:
          FileNotFoundError: `folder` has none of these files.
          ValueError: a file cannot be read, or the tokenizer lacks a token that the model needs.
        """
        folder = Path(folder)
        readers = {
            "tokenizer.json": _read_json,
            "vocab.json": _read_vocab_and_merges,
            "qwen.tiktoken": _read_tiktoken,
        }
        file = next((folder / name for name in readers if (folder / name).is_file()), None)
        if file is None:
            raise FileNotFoundError(
                f"{folder}: no tokenizer; put tokenizer.json, vocab.json with merges.txt, "
                "or qwen.tiktoken there"
            )
        try:
            hf = readers[file.name](file)
        except FileNotFoundError:
            raise
        except Exception as error:  # `tokenizers` raises nothing more special
            raise ValueError(f"{file}: not a tokenizer ({error}); copy it again") from error
        return cls(hf, str(file))

    def save(self, folder: str | Path) -> None:
        """Writes `folder`/tokenizer.json."""
        Path(folder, "tokenizer.json").write_text(self._hf.to_str(), encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Special tokens written in it are recognised, none is added."""
        return self._hf.encode(text, add_special_tokens=False).ids

    def decode(self, ids) -> str:
        """Text of `ids`, special tokens kept; a character that is cut becomes U+FFFD."""
        return b"".join(self.token_bytes(i) for i in ids).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes of one id, maybe of part of a character; none if the id is not in use."""
        if token_id in self._added:
            return self._added[token_id]
        return bytes(_BYTES[char] for char in self._hf.id_to_token(int(token_id)) or "")


class StreamDecoder:
    """Ids to text one at a time; a character comes out once its last byte is in."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that `token_id` completes: none, one or several."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was not completed, else nothing."""
        return self._utf8.decode(b"", final=True)


def load_bundled(preset: str) -> Tokenizer:
    """The tokenizer of a small preset: `vita_nano` (English and Chinese) or `vita_tiny` (bytes).

    Raises:
      ValueError: the preset has none; that of vita_7b comes with the weights.
    """
    if preset == "vita_tiny":
        return byte_tokenizer()
    if preset == "vita_nano":
        return Tokenizer(_read_json(Path(__file__).with_name("nano_tokenizer.json")), preset)
    raise ValueError(
        f"no tokenizer is bundled for {preset!r}, only for vita_nano and vita_tiny; "
        "give a folder that holds one"
    )


def byte_tokenizer() -> Tokenizer:
    """One id for each byte (its value), then the state tokens, then the special tokens."""
    return train_tokenizer((), 0)


def train_tokenizer(texts, vocab_size: int, whole: tuple[str, ...] = ()) -> Tokenizer:
    """Learns a byte-level BPE: ids of bytes, state tokens, what is learnt, `whole`, special tokens.

    Args:
      texts: strings; the more often one comes, the more it weighs.
      vocab_size: most ids there may be. There are fewer if no pair is left that comes twice, and
        never fewer than those of bytes, state tokens, special tokens and `whole`.
      whole: texts that become one token each, as a system prompt that all conversations begin with.
    """
    states = _state_merges()
    hf = _byte_level({}, [])
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocab_size - len(states) - len(_SPECIALS) - len(whole), 256),
        min_frequency=2,
        initial_alphabet=_CHARS,
        show_progress=False,
    )
    # State tokens come from their own merges and must not grow: "☜It" stays "☜" and "It".
    drop = {ord(token): None for token in STATES.values()}
    hf.train_from_iterator((text.translate(drop) for text in texts), trainer)
    learnt = map(tuple, json.loads(hf.to_str())["model"]["merges"])
    merges = list(dict.fromkeys([*states, *learnt]))
    tokens = dict.fromkeys([*_CHARS, *map("".join, merges)])
    hf = _byte_level({t: i for i, t in enumerate(tokens)}, merges)
    hf.add_tokens([AddedToken(text, normalized=False) for text in whole])
    return Tokenizer(_with_specials(hf))


def _state_merges() -> list[tuple[str, str]]:
    """The merges that make the state tokens of three bytes each, of which they share two."""
    merges = []
    for token in STATES.values():
        first, second, third = (_CHARS[byte] for byte in token.encode())
        merges += [(first, second), (first + second, third)]
    return list(dict.fromkeys(merges))


def _byte_level(vocab, merges) -> tokenizers.Tokenizer:
    """Qwen2's steps around a vocabulary: NFC, split, bytes, BPE."""
    hf = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    split = pre_tokenizers.Split(tokenizers.Regex(_SPLIT), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    hf.normalizer = normalizers.NFC()
    hf.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    hf.decoder = decoders.ByteLevel()
    return hf


def _with_specials(hf, config: Path | None = None) -> tokenizers.Tokenizer:
    """Adds the tokens that the file `config` lists or, without it, the three special ones."""
    listed = {}
    if config is not None and config.is_file():
        text = config.read_text(encoding="utf-8")
        listed = json.loads(text).get("added_tokens_decoder", {})
    if not listed:
        hf.add_special_tokens([AddedToken(token, special=True) for token in _SPECIALS])
    for token_id, token in sorted((int(i), t) for i, t in listed.items()):
        hf.add_tokens([AddedToken(**{k: v for k, v in token.items() if k != "__type"})])
        if (given := hf.token_to_id(token["content"])) != token_id:
            raise ValueError(f"{token['content']} is {token_id} in {config.name}, here {given}")
    return hf


def _read_json(file: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))


def _read_vocab_and_merges(file: Path) -> tokenizers.Tokenizer:
    vocab = json.loads(file.read_text(encoding="utf-8"))
    lines = file.with_name("merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    return _with_specials(_byte_level(vocab, merges), file.with_name("tokenizer_config.json"))


def _read_tiktoken(file: Path) -> tokenizers.Tokenizer:
    """Lines of base64 bytes and rank. A token's merge is what BPE by all lower ranks leaves."""
    lines = [line.split() for line in file.read_bytes().splitlines() if line]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    vocab, merges = {}, []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joined = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            at = joined.index(min(joined))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        parts = ["".join(_CHARS[byte] for byte in part) for part in parts]
        vocab["".join(parts)] = rank
        if len(parts) == 2:
            merges.append(tuple(parts))
    return _with_specials(_byte_level(vocab, merges), file.with_name("tokenizer_config.json"))
