"""The voice: text of a reply, piece by piece -> codec tokens -> 24 kHz waveform, chunk by chunk.

Each segment of text is spoken on its own, as the release was trained. Read next: `chunks.py`.
"""

from __future__ import annotations

import collections

import jax
import jax.numpy as jnp
import numpy as np

from vita_jax.config import VitaConfig
from vita_jax.data.collate import bucket
from vita_jax.data.prompts import END, PAD, START, STATES
from vita_jax.data.tokenizer import Tokenizer
from vita_jax.infer.chunks import ChunkedSynthesis
from vita_jax.infer.decode import decode_codes, next_speech, start_speech
from vita_jax.infer.sampling import Sampler

CHUNK_CODES, PADDING_CODES = 40, 10  # codes synthesised at a time, and heard again on either side
CODES_PER_CALL = 10  # drawn in one dispatch
MAX_CODES = 1000  # of one segment: 25 s
MIN_SEGMENT_CHARS = 5
SEGMENT_ENDS = ",，.。?？!！、\n"
SPEECH_SAMPLER = Sampler(temperature=1.0, top_k=2)  # the release's


class Segmenter:
    """Cuts streamed text where a segment may be spoken: after punctuation, at least five
    characters.
    """

    def __init__(self):
        self._text = ""

    def push(self, text: str) -> list[str]:
        """The segments that `text` completes. A point or comma between digits ends none."""
        segments = []
        for char in text:
            if self._ends_before(char):
                segments += self.flush()
            self._text += char
        if self._ends_before(""):
            segments += self.flush()
        return segments

    def flush(self) -> list[str]:
        """What is left, unless there is nothing to say in it."""
        text, self._text = self._text.strip(), ""
        return [text] if any(c.isalnum() for c in text) else []

    def _ends_before(self, char):
        """Whether a segment ends before `char`; after "3." one has to see what follows."""
        before, last = self._text[-2:-1], self._text[-1:]
        in_number = last in ".," and before.isdigit() and (char.isdigit() or not char)
        return len(self._text) >= MIN_SEGMENT_CHARS and last in SEGMENT_ENDS and not in_number


class Voice:
    """Speaks the segments it is given, in order; `advance` does the next bit of work."""

    def __init__(
        self,
        config: VitaConfig,
        params,
        tokenizer: Tokenizer,
        sampler: Sampler,
        seed: int,
        global_tokens=None,
    ):
        """Starts silent; `sampler` draws the codes, `seed` makes the draws. int32[G]
        `global_tokens` are the voice, None is the config's.
        """
        self._config, self._params, self._tokenizer = config, params, tokenizer
        self._global_tokens = _voice(config, global_tokens)
        self._sampling, self._num_recent = sampler.arrays(), max(sampler.penalty_window, 1)
        if not sampler.penalty_window:
            self._sampling["penalty"] = np.float32(1)
        self._key = jax.random.key(seed)
        self._banned = _banned(config.speech)
        self._waiting: collections.deque[str] = collections.deque()
        self._state = self._synthesis = None
        self._num_codes = 0

    def say(self, segment: str) -> None:
        """Puts a segment of text behind those that wait."""
        self._waiting.append(segment)

    @property
    def busy(self) -> bool:
        """Whether `advance` has anything to do."""
        return bool(self._waiting) or self._state is not None

    def advance(self) -> np.ndarray:
        """Draws the next few codes; float32[W] waveform that they complete, mostly empty."""
        if self._state is None:
            if not self._waiting:
                return np.zeros(0, np.float32)
            self._begin(self._waiting.popleft())
        codes, self._state = next_speech(
            self._config, CODES_PER_CALL, self._params, self._banned, self._state, self._sampling
        )
        pieces = []
        for code in np.asarray(codes)[0]:
            self._num_codes += 1
            if code == self._config.speech.eos_id or self._num_codes > MAX_CODES:
                pieces.append(self._synthesis.flush())
                self._state = None
                break
            pieces.append(self._synthesis.push(int(code)))
        return np.concatenate(pieces)

    def _begin(self, segment):
        ids = self._tokenizer.encode(speakable(segment))
        tokens = np.zeros((1, bucket(len(ids), 8)), np.int32)
        tokens[0, : len(ids)] = ids
        num_slots = (
            2 + tokens.shape[1] * self._config.speech_frames_per_token + MAX_CODES + CODES_PER_CALL
        )
        self._key, key = jax.random.split(self._key)
        self._state = start_speech(
            self._config,
            num_slots,
            self._num_recent,
            self._params,
            tokens,
            np.array([len(ids)], np.int32),
            key,
        )
        self._num_codes = 0
        self._synthesis = ChunkedSynthesis(
            self._synthesize,
            samples_per_token=self._config.codec.samples_per_token,
            chunk_size=CHUNK_CODES,
            padding=PADDING_CODES,
        )

    def _synthesize(self, codes):
        """float32[W] of a window of codes, padded to the largest one so that one program serves
        all.
        """
        padded = np.zeros((1, CHUNK_CODES + 2 * PADDING_CODES), np.int32)
        padded[0, : len(codes)] = codes
        waveform = decode_codes(
            self._config,
            self._params,
            padded,
            np.array([len(codes)], np.int32),
            self._global_tokens,
        )
        return np.asarray(waveform)[0, : len(codes) * self._config.codec.samples_per_token]


def speak(
    config: VitaConfig,
    params,
    tokenizer: Tokenizer,
    texts,
    max_codes: int = MAX_CODES,
    sampler: Sampler = SPEECH_SAMPLER,
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
      sampler: how codes are drawn.
      seed: of the draws.
      global_tokens: int32[G] the voice; None is the config's.
    """
    ids = [tokenizer.encode(speakable(text)) for text in texts]
    lengths = np.array(list(map(len, ids)), np.int32)
    tokens = np.zeros((len(ids), bucket(lengths.max(), 8)), np.int32)
    for row, text in zip(tokens, ids):
        row[: len(text)] = text
    calls = -(-max_codes // CHUNK_CODES)
    num_slots = 2 + tokens.shape[1] * config.speech_frames_per_token + calls * CHUNK_CODES
    key, sampling = jax.random.key(seed), sampler.arrays()
    state = start_speech(config, num_slots, 1, params, tokens, lengths, key)
    codes = []
    for _ in range(calls):
        new, state = next_speech(
            config, CHUNK_CODES, params, _banned(config.speech), state, sampling
        )
        codes.append(np.asarray(new))
        if np.asarray(state.done).all():
            break
    codes = np.concatenate(codes, axis=1)
    over = codes == config.speech.eos_id
    num_codes = np.where(over.any(axis=1), over.argmax(axis=1), codes.shape[1]).astype(np.int32)
    waveforms = decode_codes(
        config, params, np.where(over, 0, codes), num_codes, _voice(config, global_tokens)
    )
    samples = num_codes * config.codec.samples_per_token
    return [row[:size] for row, size in zip(np.asarray(waveforms), samples)]


def _voice(config, global_tokens):
    return np.asarray(config.codec.global_tokens if global_tokens is None else global_tokens)


def _banned(config):
    """bool[V] ids that are no codes and do not end speech either."""
    ids = jnp.array([config.bos_id, config.sos_id, config.pad_id])
    return jnp.isin(jnp.arange(config.vocab_size), ids)


def speakable(text: str) -> str:
    """The text without state tokens and special tokens."""
    for token in (*STATES.values(), PAD, START, END):
        text = text.replace(token, "")
    return text.strip()
