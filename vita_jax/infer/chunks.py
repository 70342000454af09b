"""Chunked synthesis: codec tokens one at a time in, pieces of waveform out, cut where it is quiet.

The codec's decoder looks both ways, so every chunk is decoded with tokens before and behind it.
Read next: `infer/voice.py`, which runs one of these for every piece of text that is spoken.
"""

from __future__ import annotations

import numpy as np


class ChunkedSynthesis:
    """Turns the codec tokens of one piece of text into waveform segments.

    A decoded chunk is given out up to a quiet place in its second half; if there is none it is kept
    and goes out with the next one. The segments side by side are the whole waveform, none of it
    changed. Source: the release's streaming codec decoding.
    """

    def __init__(
        self,
        decode,
        *,
        samples_per_token: int,
        chunk_size: int = 40,
        padding: int = 10,
        window: int = 2401,
        threshold: float = 0.01,
    ):
        """Starts with no tokens.

        Args:
          decode: function from a list of codec tokens to their waveform, float32[W].
          samples_per_token: samples that `decode` makes of one token.
          chunk_size: tokens of a chunk.
          padding: tokens decoded with a chunk on either side of it, and heard with its neighbours.
          window: samples over which loudness is averaged in search of a place to cut.
          threshold: mean |x| of a window below which it is quiet.
        """
        self._decode = decode
        self._samples_per_token = samples_per_token
        self._chunk_size, self._padding = chunk_size, padding
        self._window, self._threshold = window, threshold
        self._tokens: list[int] = []
        self._num_heard = 0  # tokens at the front that are only there as padding
        self._held = np.zeros(0, np.float32)  # decoded, waiting for a quiet place

    def push(self, token: int) -> np.ndarray:
        """Takes the next codec token; returns the segment it completes, float32[W], often empty."""
        self._tokens.append(token)
        if len(self._tokens) < self._num_heard + self._chunk_size + self._padding:
            return self._held[:0]
        rate = self._samples_per_token
        waveform = np.asarray(self._decode(self._tokens), np.float32)
        chunk = waveform[self._num_heard * rate : len(waveform) - self._padding * rate]
        self._num_heard = min(self._padding, self._num_heard + self._chunk_size)
        self._tokens = self._tokens[len(self._tokens) - self._num_heard - self._padding :]
        cut = quiet_cut(chunk, self._window, self._threshold)
        if cut is None:
            self._held = np.concatenate([self._held, chunk])
            return self._held[:0]
        segment, self._held = np.concatenate([self._held, chunk[:cut]]), chunk[cut:]
        return segment

    def flush(self) -> np.ndarray:
        """Returns what is left after the last token, float32[W]."""
        segment = self._held
        if self._tokens:
            waveform = np.asarray(self._decode(self._tokens), np.float32)
            rest = waveform[self._num_heard * self._samples_per_token :]
            segment = np.concatenate([segment, rest])
        self._tokens, self._num_heard, self._held = [], 0, self._held[:0]
        return segment


def quiet_cut(chunk: np.ndarray, window: int, threshold: float) -> int | None:
    """Where to cut a chunk: at the quietest sample of the quietest window of its second half.

    Args:
      chunk: float32[W] waveform.
      window: samples over which loudness is averaged; all of the chunk if it is shorter.
      threshold: mean |x| that the window must be below.

    Returns:
      Number of samples before the cut, or None where it is nowhere quiet.
    """
    loudness = np.abs(chunk)
    window = min(window, len(chunk))
    sums = np.cumsum(np.concatenate([[0.0], loudness]))  # in float64: differences must not drift
    sums = sums[window:] - sums[: len(sums) - window]
    middle = len(chunk) // 2 - window // 2
    offset = int(np.argmin(sums[middle:]))
    start = middle + offset
    if sums[start] / window >= threshold:
        return None
    # As in the release, what is searched for the sample is longer than the window by the offset.
    return start + int(np.argmin(loudness[start : start + offset + window]))
