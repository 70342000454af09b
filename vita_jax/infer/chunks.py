"""Chunked synthesis: codec tokens one at a time in, windows for the codec's decoder out.

The codec's decoder looks both ways, so every chunk is decoded with tokens before and behind it, and
only the chunk itself is heard. Read next: `infer/voice.py`.
"""

from __future__ import annotations

import dataclasses

FIRST_CHUNK, CHUNK, PADDING = 20, 40, 10  # codes given out at once, and heard again on either side


@dataclasses.dataclass(frozen=True)
class Window:
    """Codes to decode together, of which those from `first` to before `last` are given out."""

    codes: list[int]
    first: int
    last: int


class Windows:
    """Cuts the codec tokens of one piece of text into windows; what is given out of them, side by
    side, is the whole. The first chunk is short, so that sound begins early.

    Source: the release's streaming codec decoding, which besides holds a chunk back up to a quiet
    place, lest its player run dry in the middle of a sound.
    """

    def __init__(self, first_chunk: int = FIRST_CHUNK, chunk: int = CHUNK, padding: int = PADDING):
        self._sizes = first_chunk, chunk
        self._padding = padding
        self._codes: list[int] = []
        self._given = 0  # codes at the front that are only there as padding
        self._begun = False

    def push(self, code: int) -> Window | None:
        """Takes the next code; returns the window it completes, mostly none."""
        self._codes.append(code)
        last = self._given + self._sizes[self._begun]
        if len(self._codes) < last + self._padding:
            return None
        window = Window(self._codes, self._given, last)
        self._begun, self._given = True, min(self._padding, last)
        self._codes = self._codes[last - self._given :]
        return window

    def flush(self) -> Window | None:
        """What is left after the last code, if anything is."""
        codes, first = self._codes, self._given
        self._codes, self._given = [], 0
        return Window(codes, first, len(codes)) if len(codes) > first else None
