"""A session: what one user gives, turn by turn, and what comes back.

Goes in: words, pictures, frames of a video and sound, as they come. Comes out: events. The engine
does the work (`engine.py`); here is what it works on: the conversation as the model reads it, and
the reply being written and spoken.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import time

import jax
import numpy as np

from vita_jax.batch import AUDIO_TOKEN, IMAGE_TOKEN
from vita_jax.data.audio import FRAME_SAMPLES, HOP_SAMPLES, SAMPLE_RATE_HZ, fbank
from vita_jax.data.image import normalize
from vita_jax.data.processor import Message, Turn, expand, place
from vita_jax.data.prompts import END, STATES
from vita_jax.data.tokenizer import StreamDecoder
from vita_jax.infer.voice import Segmenter, Speaker
from vita_jax.models.audio import AudioState

KEYS_PER_MEDIA = 1 << 20  # more embeddings than a clip or tile can have
_media_ids = itertools.count(1)


@dataclasses.dataclass(frozen=True)
class Seen:
    """What the model was given: tiles of pictures and video, filter-bank frames of sound, and
    embeddings in all.
    """

    num_tiles: int
    num_audio_frames: int
    num_tile_embeddings: int
    num_audio_embeddings: int
    num_text_tokens: int


@dataclasses.dataclass(frozen=True)
class TextDelta:
    """More text of the reply, `time_s` after the turn ended."""

    text: str
    time_s: float


@dataclasses.dataclass(frozen=True)
class AudioChunk:
    """More of the spoken reply: float32[W] in [-1, 1], `time_s` after the turn ended."""

    samples: np.ndarray
    sample_rate_hz: int
    time_s: float


@dataclasses.dataclass(frozen=True)
class Reply:
    """A whole reply, or as much as there was of it when it was cancelled.

    Attributes:
      text: what it says.
      state: its state token: "audio_reply", "noise" or "text_reply"; None if the model wrote none.
      audio: float32[W] in [-1, 1], or None if it was not spoken.
      sample_rate_hz: of `audio`.
      turn: the turn as `history` of another session takes it.
      seen: what went in, history included.
      times_s: seconds after the turn ended, by name: "prompt read", "first token",
        "first segment", "first codes", "first sound", "text done", "done".
      cancelled: whether it was broken off.
      gaps_s: of each piece of sound but the first, seconds from when the sound before it had run
        out, played as it came, until it was handed out; 0 if it came in time.
    """

    text: str
    state: str | None
    audio: np.ndarray | None
    sample_rate_hz: int | None
    turn: Turn
    seen: Seen
    times_s: dict[str, float]
    cancelled: bool = False
    gaps_s: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Done:
    """The end of a turn."""

    reply: Reply


@dataclasses.dataclass
class Stream:
    """How far a clip that arrives has been encoded: filter-bank frames `used`, and the encoder's
    state.
    """

    used: int = 0
    state: AudioState | None = None


class Media:
    """A tile or a clip in a conversation: what is to be encoded, then its embeddings.

    Attributes:
      source: float32[px, px, 3] pixels, float32[A, M] filter banks, or None while sound arrives.
      size: embeddings that are known by now, or will be of the whole source.
      rows: dtype[S, D] on the device, the first `size` of them real; None until encoded.
      stream: of a clip that arrives.
    """

    def __init__(self, source, size: int):
        self.key = -next(_media_ids) * KEYS_PER_MEDIA
        self.source, self.size, self.rows = source, size, None
        self.num_frames = 0 if source is None else len(source)
        self.stream = Stream() if source is None else None

    def grow(self, rows) -> None:
        """Takes the next embeddings dtype[S, D] of a clip that arrives."""
        self.rows = jax.lax.dynamic_update_slice(
            self.rows, rows.astype(self.rows.dtype), (self.size, 0)
        )
        self.size += len(rows)

    def keys(self):
        """int64[size]: below 0, of this tile or clip alone."""
        return self.key + np.arange(self.size)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What of a conversation is certain.

    Attributes:
      tokens: int32[T] ids and placeholders.
      keys: int64[T] equal where, and only where, the embeddings are: ids, and `Media.keys`.
      placed: (position, Media) of each tile and clip.
    """

    tokens: np.ndarray
    keys: np.ndarray
    placed: list


class Session:
    """A conversation of one user. Made by `Engine.session`.

    What is pushed is worked on, and `events` fills, as `Engine.step` is called, by the same thread.
    When the turn is over, what is pushed belongs to the next one. Of a conversation that becomes
    too long the oldest turns are forgotten.

    Attributes:
      events: deque of TextDelta, AudioChunk and, at the end of each turn, Done, to be taken from
        its left.
    """

    def __init__(
        self, engine, history, speak, global_tokens, max_new_tokens, sampler, speech_sampler, seed
    ):
        self.events: collections.deque = collections.deque()
        self.global_tokens, self.speak, self.seed = global_tokens, speak, seed
        self.max_new_tokens, self.sampler, self.speech_sampler = (
            max_new_tokens, sampler, speech_sampler,
        )  # fmt: skip
        self.reply: Writing | None = None
        self.row, self.hidden = None, None  # given by the engine
        self._engine, self._config, self._processor = engine, engine.config, engine.processor
        self._history = []
        for number, turn in enumerate(history, 1):
            where = f"history, turn {number}"
            if turn.reply is None:
                raise ValueError(f"{where}: no reply; give it or leave the turn out")
            message = self._processor.message(turn, where)
            self._history.append(self._with_media(message))
        self._clear()

    def push_text(self, text: str) -> None:
        """Words of the turn; as `Turn.text`. More words follow the first behind a blank."""
        self._text = text if self._text is None else f"{self._text} {text}"
        self._changed()

    def push_image(self, source) -> None:
        """A picture: a file, PIL image or array. Raises FileNotFoundError or ValueError."""
        tiles = self._processor.tiles(source)
        self._images.append(source)
        self._pictures.append([self._tile(tile) for tile in tiles])
        self._changed()

    def push_frame(self, source) -> None:
        """A frame of the turn's video: as `push_image`."""
        (tile,) = self._processor.tiles(source, tiled=False)
        self._video.append(source)
        self._frames.append(self._tile(tile))
        self._changed()

    def push_audio(self, samples: np.ndarray) -> None:
        """The next samples of the question, float32[W] in [-1, 1] at 16 kHz.

        Raises:
          ValueError: not one row of finite numbers, or the clip gets longer than the model hears.
        """
        samples = np.asarray(samples, np.float32)
        if samples.ndim != 1 or not np.isfinite(samples).all():
            raise ValueError(
                f"push_audio: {samples.dtype}{samples.shape}; give one row of finite samples"
            )
        limit = self._config.audio.max_frames * HOP_SAMPLES
        if self._num_samples + len(samples) > limit:
            raise ValueError(
                f"push_audio: more than {limit / SAMPLE_RATE_HZ:.2f} s of sound in a turn, which "
                "is the limit; end the turn"
            )
        if self._clip is None:
            self._clip = Media(None, 0)
        self._sound.append(samples)
        self._num_samples += len(samples)
        self._changed()

    def end_of_speech(self) -> None:
        """The turn is whole: it will be answered.

        Raises:
          ValueError: nothing was pushed, a turn is being answered, the turn is too long or too
            short to hear, or does not hold what its text says. The turn stays open.
        """
        if self.reply is not None:
            raise ValueError("end_of_speech: a turn is being answered; wait for Done, or cancel()")
        time_s = time.perf_counter()
        turn = self._turn()
        message = self._message(turn)  # refuses what does not fit
        if self._clip is not None:
            banks = self._processor.clip((np.concatenate(self._sound), SAMPLE_RATE_HZ), None)
            self._clip.source, self._clip.num_frames = banks, len(banks)
            if self._config.audio.chunk_size <= 0:
                self._clip.size = self._config.audio.num_embeddings(len(banks))
        self._processor.check_length(len(self._joined([message])[0]), "prompt")
        self._changed()
        self.reply = Writing(self, turn, time_s)

    def drop(self) -> None:
        """Forgets what was pushed of a turn that is open."""
        if self.reply is None:
            self._clear()

    def cancel(self) -> None:
        """Breaks the reply off: its row is free within a step, and Done holds what there was."""
        if self.reply is not None:
            self.reply.cancelled = True

    @property
    def active(self) -> bool:
        """Whether there is anything to read or to answer."""
        return self.reply is not None or self._clip is not None or bool(self._media())

    def banks(self):
        """float32[A, M] filter banks of the sound so far."""
        samples = np.concatenate(self._sound)
        if len(samples) < FRAME_SAMPLES:
            return np.zeros((0, self._config.audio.num_mel_bins), np.float32)
        return fbank(samples, self._config.audio.num_mel_bins)

    @property
    def clip(self) -> Media | None:
        """The sound of the turn that is open."""
        return self._clip

    def heard_more(self) -> None:
        """The clip has grown; for the engine."""
        self._prompt = None

    def prompt(self) -> Prompt:
        """The conversation as far as it is certain: whole once the turn is, else up to the sound,
        to the last picture or to the turn. History that does not fit is forgotten first.
        """
        if self._prompt is None:
            self._prompt = self._laid_out()
        return self._prompt

    def finish(self, reply: Reply) -> None:
        """Takes the turn into the history; for the engine."""
        if reply.text or not reply.cancelled:
            message = dataclasses.replace(self._message(self._turn()), reply=reply.turn.reply + END)
            self._history.append(message)
        self.reply = None
        self._clear()
        self.events.append(Done(reply))

    def seen(self) -> Seen:
        """What the prompt holds."""
        placed, tokens = [media for _, media in self.prompt().placed], self.prompt().tokens
        clips = [media for media in placed if media.source.ndim == 2]
        return Seen(
            num_tiles=len(placed) - len(clips),
            num_audio_frames=sum(media.num_frames for media in clips),
            num_tile_embeddings=int((tokens == IMAGE_TOKEN).sum()),
            num_audio_embeddings=int((tokens == AUDIO_TOKEN).sum()),
            num_text_tokens=int((tokens >= 0).sum()),
        )

    def _clear(self):
        self._text, self._images, self._pictures = None, [], []
        self._video, self._frames = [], []
        self._sound, self._num_samples, self._clip = [], 0, None
        self._changed()

    def _changed(self):
        self._prompt = None

    def _media(self):
        return [*itertools.chain(*self._pictures), *self._frames]

    def _tile(self, tile):
        return Media(normalize([tile])[0], self._config.vision.embeddings_per_tile)

    def _with_media(self, message):
        clips = [
            Media(clip, self._config.audio.num_embeddings(len(clip))) for clip in message.clips
        ]
        tiles = tuple(self._tile(tile) for tile in message.tiles)
        return dataclasses.replace(message, tiles=tiles, clips=tuple(clips))

    def _turn(self):
        sound = None if self._clip is None else (np.concatenate(self._sound), SAMPLE_RATE_HZ)
        return Turn(self._text, self._images, sound, self._video or None)

    def _message(self, turn):
        text, tiles = expand(place(turn, "turn"), list(self._pictures), self._frames)
        clips = () if self._clip is None else (self._clip,)
        return Message(text, None, tuple(tiles), clips, bool(self._video))

    def _joined(self, messages):
        sizes = [max(clip.size, 1) for message in messages for clip in message.clips]
        return self._processor.join(messages, sizes)

    def _laid_out(self):
        open_turn = []
        with contextlib.suppress(ValueError if self.reply is None else ()):
            open_turn = [self._message(self._turn())]  # an open turn may not be laid out yet
        limit, tokens = self._processor.max_tokens, []
        while True:
            messages = [*self._history, *open_turn]
            tokens, _, start = self._joined(messages)
            if len(tokens) <= limit or not self._history:
                break
            self._history.pop(0)
            limit = self._processor.max_tokens // 2  # more at once: what is left is read anew
        if self.reply is None and open_turn:
            tokens = tokens[: self._certain(tokens, start)]
        keys, placed = tokens.astype(np.int64), []
        for token, media in (
            (IMAGE_TOKEN, [tile for message in messages for tile in message.tiles]),
            (AUDIO_TOKEN, [clip for message in messages for clip in message.clips]),
        ):
            at = np.flatnonzero(tokens == token)
            for one in media:
                if len(at) and one.size:
                    here, at = at[: one.size], at[one.size :]
                    keys[here] = one.keys()[: len(here)]
                    placed.append((int(here[0]), one))
        return Prompt(tokens, keys, placed)

    def _certain(self, tokens, start):
        """How many tokens of a turn that is open, from `start` on, will stay."""
        if self._clip is not None:
            sound = np.flatnonzero(tokens == AUDIO_TOKEN)
            return sound[-1] + 1 if self._clip.size else sound[-1]
        pictures = np.flatnonzero(tokens[start:] == IMAGE_TOKEN)
        return start + pictures[-1] + 1 if len(pictures) else start


class Writing:
    """A reply while it is written and spoken.

    Attributes:
      turn: what it answers.
      cancelled: it is to be broken off.
      start_s: when the turn ended, by `time.perf_counter`.
      begun: its first token was asked for.
      tokens: that were written, the stop token included.
      left: the most that may be written.
      text_done: no more text will come.
      speaker: its voice, or None.
    """

    def __init__(self, session: Session, turn: Turn, start_s: float):
        engine = session._engine
        self.turn, self.cancelled, self.text_done, self.begun = turn, False, False, False
        self.speaker = None
        if session.speak:
            self.speaker = Speaker(
                engine.config, engine.tokenizer, session.seed, session.global_tokens
            )
        self.tokens: list[int] = []
        self.left = 0
        self.start_s = start_s
        self._session, self._engine = session, engine
        self._decoder, self._segmenter = StreamDecoder(engine.tokenizer), Segmenter()
        self._texts, self._sounds, self._state, self._times = [], [], None, {}
        self._gaps, self._runs_out_s = [], 0.0  # when the sound so far does

    def note(self, name: str) -> float:
        """Seconds since the turn ended, kept under `name` the first time."""
        seconds = time.perf_counter() - self.start_s
        self._times.setdefault(name, seconds)
        return seconds

    def push_token(self, token: int, last: bool) -> None:
        """Takes the next token, which may be a stop token; `last` if none may follow."""
        time_s = self.note("first token")
        engine = self._engine
        stop = token in engine.stop_ids
        if not self.tokens and token in engine.states:
            self._state = engine.states[token]
        elif not stop:
            self._say(self._decoder.push(token), time_s)
        self.tokens.append(token)
        if stop or last:
            self._say(self._decoder.flush(), time_s)
            self.text_done = True
            self.note("text done")
            if self.speaker:
                self._segments(self._segmenter.flush())

    def push_sound(self, samples: np.ndarray) -> None:
        """Takes the next float32[W] of the voice."""
        rate_hz, time_s = self._engine.config.codec.sample_rate_hz, self.note("first sound")
        if self._sounds:
            self._gaps.append(max(time_s - self._runs_out_s, 0.0))
        self._runs_out_s = max(time_s, self._runs_out_s) + len(samples) / rate_hz
        self._sounds.append(samples)
        self._session.events.append(AudioChunk(samples, rate_hz, time_s))

    def hungry(self, margin_s: float) -> bool:
        """Whether what was handed out of a voice that has more to say lasts no longer, if it is
        played as it comes.
        """
        if not (self.speaker and self.speaker.busy):
            return False
        time_s = time.perf_counter() - self.start_s
        return not self._sounds or self._runs_out_s - time_s < margin_s

    def finished(self) -> Reply:
        """The reply as it stands."""
        self.note("done")
        text = "".join(self._texts)
        spoken, config = self.speaker is not None, self._engine.config
        return Reply(
            text=text,
            state=self._state,
            audio=np.concatenate([np.zeros(0, np.float32), *self._sounds]) if spoken else None,
            sample_rate_hz=config.codec.sample_rate_hz if spoken else None,
            turn=dataclasses.replace(self.turn, reply=STATES.get(self._state, "") + text),
            seen=self._session.seen(),
            times_s=self._times,
            cancelled=self.cancelled,
            gaps_s=tuple(self._gaps),
        )

    def _say(self, delta, time_s):
        if delta:
            self._texts.append(delta)
            self._session.events.append(TextDelta(delta, time_s))
        if self.speaker:
            self._segments(self._segmenter.push(delta))

    def _segments(self, segments):
        if segments:
            self.note("first segment")
            self.speaker.segments.extend(segments)
