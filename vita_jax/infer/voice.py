"""The voice: text of a reply, piece by piece -> codec tokens -> 24 kHz waveform, chunk by chunk.

Each segment of text is spoken on its own, as the release was trained. Read next: `chunks.py`.
"""

from __future__ import annotations

import collections

import jax
import numpy as np

from vita_jax.config import VitaConfig
from vita_jax.data.collate import bucket
from vita_jax.data.prompts import END, PAD, START, STATES
from vita_jax.data.tokenizer import Tokenizer
from vita_jax.infer.chunks import Window, Windows
from vita_jax.infer.decode import begin_speech, decode_codes, init_speech, next_speech
from vita_jax.infer.sampling import Sampler

MAX_CODES = 1000  # of one segment: 25 s
MIN_SEGMENT_CHARS = 5
MAX_SEGMENT_TOKENS = 32  # then a segment ends even without punctuation
SEGMENT_ENDS = ",，.。?？!！、\n"


class Segmenter:
    """Cuts streamed text where a segment may be spoken: after punctuation, at least five
    characters; or where it gets too long, before a word.
    """

    def __init__(self, max_pushes: int = MAX_SEGMENT_TOKENS):
        """A segment of more than `max_pushes` pushes is cut."""
        self._text, self._pushes, self._max_pushes = "", 0, max_pushes

    def push(self, text: str) -> list[str]:
        """The segments that `text` completes. A point or comma between digits ends none."""
        segments = []
        self._pushes += 1
        for i, char in enumerate(text):
            too_long = self._pushes > self._max_pushes and i == 0
            if self._ends_before(char) or too_long and (char == " " or ord(char) > 0x2E80):
                segments += self.flush()
            self._text += char
        if self._ends_before(""):
            segments += self.flush()
        return segments

    def flush(self) -> list[str]:
        """What is left, unless there is nothing to say in it."""
        text, self._text, self._pushes = self._text.strip(), "", 0
        return [text] if any(c.isalnum() for c in text) else []

    def _ends_before(self, char):
        """Whether a segment ends before `char`; after "3." one has to see what follows."""
        before, last = self._text[-2:-1], self._text[-1:]
        in_number = last in ".," and before.isdigit() and (char.isdigit() or not char)
        return len(self._text) >= MIN_SEGMENT_CHARS and last in SEGMENT_ENDS and not in_number


class Speaker:
    """What of a reply waits to be spoken, is being spoken, and waits to be heard."""

    def __init__(self, config: VitaConfig, tokenizer: Tokenizer, seed: int, global_tokens=None):
        """Starts silent. `seed` makes the draws; int32[G] `global_tokens` are the voice, None is
        the config's.
        """
        self.voice = voice_of(config, global_tokens)
        self.segments: collections.deque[str] = collections.deque()
        self.windows: collections.deque[Window] = collections.deque()
        self.speaking = False  # a segment is in the row
        self.decoding = 0  # windows on their way
        self.num_slots = 0  # of the row, in use when all that was dispatched is done
        self.number = 0  # of segments begun
        self._config, self._tokenizer, self._seed = config, tokenizer, seed
        self._cut, self._left = Windows(), 0

    @property
    def busy(self) -> bool:
        """Whether there is more to hear."""
        return bool(self.segments or self.speaking or self.windows or self.decoding)

    def next_segment(self):
        """Tokens int32[T] of the next segment, padded, how many are real, the key of its draws."""
        tokens, length = padded(self._tokenizer, self.segments.popleft())
        key = jax.random.fold_in(jax.random.key(self._seed), self.number)
        self.number += 1
        self._cut, self._left, self.speaking = Windows(), MAX_CODES, True
        self.num_slots = 2 + len(tokens) * self._config.speech_frames_per_token
        return tokens, np.int32(length), key

    def push(self, codes) -> None:
        """Takes codes that were drawn, -1 where the segment had ended."""
        for code in codes:
            if not self.speaking or code < 0:
                break
            self._left -= 1
            if code != self._config.speech.eos_id and (window := self._cut.push(int(code))):
                self.windows.append(window)
            if code == self._config.speech.eos_id or not self._left:
                self._end()

    def _end(self):
        self.speaking = False
        if window := self._cut.flush():
            self.windows.append(window)


def num_speech_slots(config: VitaConfig) -> int:
    """Slots of a row in which any segment has room."""
    return 2 + 2 * MAX_SEGMENT_TOKENS * config.speech_frames_per_token + MAX_CODES


def padded(tokenizer: Tokenizer, segment: str):
    """int32[T] tokens of a text to be spoken, padded to a bucket, and how many are real; of a text
    far longer than a segment the rest is left out.
    """
    ids = tokenizer.encode(speakable(segment))[: 2 * MAX_SEGMENT_TOKENS]
    tokens = np.zeros(bucket(len(ids), 8), np.int32)
    tokens[: len(ids)] = ids
    return tokens, len(ids)


def speak(
    config: VitaConfig,
    params,
    tokenizer: Tokenizer,
    texts,
    max_codes: int = MAX_CODES,
    sampler: Sampler | None = None,
    seed: int = 0,
    global_tokens=None,
) -> list[np.ndarray]:
    """Several texts at once, each as one segment: float32[W] waveforms, not cut into chunks.

    Args:
      config: of the model.
      params: its parameters; of the LLM the input embeddings will do.
      tokenizer: its tokenizer.
      texts: one or more, none of them empty.
      max_codes: where a text that does not end is cut off.
      sampler: how codes are drawn; None is the config's.
      seed: of the draws.
      global_tokens: int32[G] the voice; None is the config's.
    """
    segments = [padded(tokenizer, text) for text in texts]
    sampling = (sampler or sampler_of(config)).arrays()
    longest = max(len(tokens) for tokens, _ in segments)
    num_slots = 2 + longest * config.speech_frames_per_token + max_codes
    state = init_speech(config, len(texts), num_slots, sampling)
    keys = jax.random.split(jax.random.key(seed), len(texts))
    for row, ((tokens, length), key) in enumerate(zip(segments, keys)):
        tokens = np.pad(tokens, (0, longest - len(tokens)))
        state = begin_speech(
            config, params, state, row, tokens, length, key, np.int32(max_codes), sampling
        )
    codes, running = [], np.ones(len(texts), bool)
    while len(codes) < max_codes and (np.asarray(state.left) > 0).any():
        state, new = next_speech(config, num_slots, 40, params, banned(config), state, running)
        codes.extend(np.asarray(new))
    codes = np.stack(codes, axis=1)
    real = (codes >= 0) & (codes != config.speech.eos_id)
    num_codes = real.sum(axis=1).astype(np.int32)
    voices = np.tile(voice_of(config, global_tokens), (len(texts), 1))
    waveforms = decode_codes(config, params, np.where(real, codes, 0), num_codes, voices)
    samples = num_codes * config.codec.samples_per_token
    return [row[:size] for row, size in zip(np.asarray(waveforms), samples)]


def sampler_of(config: VitaConfig) -> Sampler:
    """How codes are drawn unless one is told otherwise. Source: the release's speech decoder."""
    return Sampler(temperature=1.0, top_k=config.speech.top_k)


def voice_of(config: VitaConfig, global_tokens=None) -> np.ndarray:
    """int32[G] the voice: as given, or the config's."""
    return np.asarray(
        config.codec.global_tokens if global_tokens is None else global_tokens, np.int32
    )


def banned(config: VitaConfig) -> np.ndarray:
    """bool[V] ids that are no codes and do not end speech either."""
    c = config.speech
    return np.isin(np.arange(c.vocab_size), (c.bos_id, c.sos_id, c.pad_id))


def speakable(text: str) -> str:
    """The text without state tokens and special tokens."""
    for token in (*STATES.values(), PAD, START, END):
        text = text.replace(token, "")
    return text.strip()
