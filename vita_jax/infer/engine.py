"""Engine: pictures, video, speech and text in; a reply in text and in speech out, as it comes.

    engine = vita_jax.load("checkpoints/vita")
    for event in engine.stream(images=["cat.jpg"], audio="question.wav"):
        ...

or, for sound that is still being spoken, `engine.session()`. One turn: what is pushed
(`session.py`) -> encoded and read into a row of the cache, as it comes -> `begin_text` and
`next_text` until a stop token; each finished segment of text -> `begin_speech`, `next_speech` ->
codes -> windows -> waveform. All of it happens in `Engine.step`, a bit at a time and for all
sessions together. Read next: `session.py`, then `decode.py` for the programs that are run.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import os
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vita_jax import checkpoint
from vita_jax.data.audio import read_audio
from vita_jax.data.collate import bucket
from vita_jax.data.processor import Processor, Turn
from vita_jax.data.prompts import PAD, START
from vita_jax.data.tokenizer import Tokenizer
from vita_jax.data.video import read_video
from vita_jax.infer import voice as voices
from vita_jax.infer.chunks import CHUNK, FIRST_CHUNK, PADDING
from vita_jax.infer.decode import (
    audio_prompts,
    begin_speech,
    begin_text,
    decode_codes,
    embed_text,
    encode_clip,
    encode_piece,
    encode_tile,
    hear_voice,
    init_speech,
    init_text,
    next_speech,
    next_text,
    read,
    splice,
)
from vita_jax.infer.sampling import Sampler
from vita_jax.infer.session import (  # noqa: F401  (events are part of the engine)
    AudioChunk,
    Done,
    Media,
    Reply,
    Seen,
    Session,
    TextDelta,
)
from vita_jax.models.audio import init_audio_state, stream_frames
from vita_jax.sharding import make_mesh, rules

MOST_CODES = CHUNK + 2 * PADDING  # of a window
MAX_VOICE_S = 10  # of a clip to speak in the voice of
SPANS = (64, 256, 512)  # sizes in which a prompt is read
TOKENS_PER_CALL, CODES_PER_CALL = 4, 10  # drawn in one dispatch
CALLS_AHEAD = 2  # dispatches of a kind whose results are not known yet
HUNGRY_S = 0.5  # a reply whose sound lasts no longer comes first
MAX_SKIPPED = 3  # but no more often in a row than this before others' text goes on


@dataclasses.dataclass(eq=False)
class Row:
    """A row of the caches.

    Attributes:
      keys: int64[T] what is in the cache of the LLM, as `Prompt.keys`.
      session: who has it, or None.
      last_used: number of the step in which it was given back.
    """

    keys: np.ndarray
    session: Session | None = None
    last_used: int = 0


class Engine:
    """A model ready to talk. Make one with `load`.

    Sessions share the rows: a session has one from when its turn begins to be read until the reply
    is over, and waits if there is none. All is done by the thread that calls.
    """

    def __init__(
        self,
        config,
        params,
        tokenizer: Tokenizer,
        mesh=None,
        max_tokens: int | None = None,
        video_rate: float = 1.0,
        num_rows: int = 1,
        max_new_tokens: int = 512,
        int8_cache: bool = False,
    ):
        """Joins a model and its tokenizer.

        Args:
          config: VitaConfig, codec folded (as `checkpoint.load` returns it).
          params: its parameters, on the mesh if there is one.
          tokenizer: its tokenizer.
          mesh: mesh of the parameters, or None for one device.
          max_tokens: longest conversation; None is the config's.
          video_rate: frames of a video to look at in a second.
          num_rows: replies that can be given at a time.
          max_new_tokens: longest reply.
          int8_cache: keep keys and values of conversations in 8 bits.
        """
        if num_rows < 1 or max_new_tokens < 1:
            raise ValueError(
                f"num_rows={num_rows}, max_new_tokens={max_new_tokens}: expected 1 or more of each"
            )
        self.config, self.tokenizer, self.mesh = config, tokenizer, mesh
        # A program is compiled again for arrays that were not put anywhere.
        self._device = None if mesh else jnp.asarray(jax.tree.leaves(params)[0]).sharding
        self.params = self._placed(params)
        self.processor = Processor(config, tokenizer, max_tokens, video_rate)
        self.stop_ids = frozenset(
            [tokenizer.eos_id, *tokenizer.encode(PAD), *tokenizer.encode(START)]
        )
        self.states = {i: name for name, i in tokenizer.state_ids.items()}
        self.speaks = config.speech is not None and config.codec is not None
        self._max_new_tokens = max_new_tokens
        size = min(self.processor.max_tokens + max_new_tokens, config.llm.max_positions)
        self._num_slots = -(-size // 256) * 256
        self._rows = [Row(np.zeros(0, np.int64)) for _ in range(num_rows)]
        self._sessions: list[weakref.ref] = []
        self._results: collections.deque = collections.deque()  # (array, what to do with it)
        self._ahead = collections.Counter()
        self._steps = self._skipped = 0
        self._stops = np.array(sorted(self.stop_ids), np.int32)
        with self._on_mesh():
            sampling = Sampler().arrays()
            args = config, num_rows, self._num_slots, sampling
            self._text = self._placed(init_text(*args, int8=int8_cache))
            if self.speaks:
                slots = voices.num_speech_slots(config) + CODES_PER_CALL
                self._speech = self._placed(init_speech(config, num_rows, slots, sampling))
                self._banned = voices.banned(config)

    def warm_up(self, max_audio_s: float = 30.0) -> None:
        """Compiles what sessions need, so that none waits for the compiler. What the rows hold is
        forgotten.

        Left out, and compiled when first used, are longer clips and voices taken from a clip.

        Args:
          max_audio_s: longest clip, of a model that hears clips whole.

        Raises:
          ValueError: a session has a row.
        """
        from vita_jax.infer.warm_up import warm_up

        if any(row.session for row in self._rows):
            raise ValueError("warm_up: a turn is being read or answered; wait until it is over")
        for row in self._rows:
            row.keys = np.zeros(0, np.int64)
        with self._on_mesh():
            warm_up(self, max_audio_s)

    def session(
        self,
        *,
        history=(),
        speak: bool = True,
        voice=None,
        max_new_tokens: int | None = None,
        sampler: Sampler = Sampler(),
        speech_sampler: Sampler | None = None,
        seed: int = 0,
    ) -> Session:
        """A conversation.

        Args:
          history: earlier turns (`Reply.turn`), oldest first.
          speak: also answer in speech.
          voice: a clip to speak in the voice of, 1 s or longer: a file, or (samples, rate in Hz);
            None is the model's own.
          max_new_tokens: a reply is cut after as many; None is the engine's limit.
          sampler: how text is drawn; greedy by default.
          speech_sampler: how codes are drawn; None is as the model's config says.
          seed: of all draws; with the same, a request gets the same reply whatever else is asked.

        Raises:
          FileNotFoundError, ValueError: a history that cannot be used.
          ValueError: `speak` for a model without a voice, `voice` without `speak`, or
            `max_new_tokens` out of range.
        """
        if speak and not self.speaks:
            raise ValueError(f"{self.config.name} has no speech decoder or codec: pass speak=False")
        if voice is not None and not speak:
            raise ValueError("voice: given with speak=False; leave one of them out")
        limit = self._max_new_tokens
        max_new_tokens = limit if max_new_tokens is None else max_new_tokens
        if not 1 <= max_new_tokens <= limit:
            raise ValueError(f"max_new_tokens={max_new_tokens}: expected 1 to {limit}")
        global_tokens = None if voice is None else self._hear_voice(voice)
        session = Session(
            self, history, speak, global_tokens, max_new_tokens, sampler, speech_sampler, seed
        )
        self._sessions.append(weakref.ref(session))
        return session

    def stream(self, text: str | None = None, images=(), audio=None, video=None, **options):
        """One turn, as it comes: TextDelta for each token, AudioChunk once a piece is spoken, Done
        at the end.

        Args:
          text: written question.
          images: picture files, PIL images or arrays.
          audio: spoken question: a file, or (samples, rate in Hz).
          video: video file or list of frames.
          **options: of `session`.

        Raises:
          FileNotFoundError, ValueError: input that cannot be used (see `Processor.prompt`), or as
            `session`.
        """
        return self.answer(self.session(**options), text, images, audio, video)

    def answer(self, session: Session, text: str | None = None, images=(), audio=None, video=None):
        """The next turn of a conversation, as it comes. Arguments, events and errors as for
        `stream`; of what was read of the conversation before, nothing is read again. A turn that
        is refused leaves the conversation as it was.
        """
        self._push(session, Turn(text, images, audio, video))
        return self._events(session)

    def chat(self, text=None, images=(), audio=None, video=None, **options) -> Reply:
        """One turn, whole. Arguments as for `stream`."""
        for event in self.stream(text, images, audio, video, **options):
            if isinstance(event, Done):
                return event.reply

    def write(self, turns, max_new_tokens: int = 64) -> list[tuple[str | None, str]]:
        """Replies to several turns, each in a conversation of its own, unspoken: the likeliest
        token after the other.

        Args:
          turns: `Turn`s, one or more.
          max_new_tokens: a reply is cut after as many.

        Returns:
          (state, text) of each reply, as in `Reply`.

        Raises:
          FileNotFoundError, ValueError: input that cannot be used (see `Processor.prompt`).
        """
        sessions = [self.session(speak=False, max_new_tokens=max_new_tokens) for _ in turns]
        for session, turn in zip(sessions, turns):
            self._push(session, turn)
        replies = [list(self._events(session))[-1].reply for session in sessions]
        return [(reply.state, reply.text) for reply in replies]

    def transcribe(self, audio) -> str:
        """What a clip says, word for word: read off its embeddings, without the LLM.

        Args:
          audio: a file, or (samples, rate in Hz).

        Raises:
          FileNotFoundError, ValueError: a sound that cannot be used, or one that is longer or
            shorter than the model can hear.
          ValueError: the model does not embed what it hears as words (`AudioConfig.aligned`).
        """
        from vita_jax.infer.transcribe import transcribe

        with self._on_mesh():
            return transcribe(self, audio)

    def _push(self, session, turn):
        """A whole turn."""
        try:
            if turn.text:
                session.push_text(turn.text)
            for image in turn.images:
                session.push_image(image)
            video = turn.video
            if isinstance(video, (str, Path)):
                video = read_video(video, self.processor.video_rate)
            for frame in video or ():
                session.push_frame(frame)
            if turn.audio is not None:
                samples = read_audio(turn.audio)
                try:
                    session.push_audio(samples)
                except ValueError as e:
                    name = turn.audio if isinstance(turn.audio, (str, Path)) else "sound"
                    raise ValueError(f"{name}: {e}") from e
            session.end_of_speech()
        except (ValueError, OSError):
            session.drop()
            raise

    def _events(self, session):
        """The events of a turn up to Done."""
        try:
            while True:
                while session.events:
                    event = session.events.popleft()
                    yield event
                    if isinstance(event, Done):
                        return
                self.step()
        finally:
            session.cancel()  # who stops listening must not keep a row

    def step(self) -> bool:
        """Does the next bit of work for all sessions; False if there was nothing to do.

        Work is dispatched ahead of the device; results are taken as they come, and waited for only
        if nothing else is to be done.
        """
        self._steps += 1
        with self._on_mesh():
            self._free_cancelled()
            did = self._listen()
            dry = any(reply.hungry(HUNGRY_S) for reply in self._replies())
            self._skipped = self._skipped + 1 if dry and self._skipped < MAX_SKIPPED else 0
            if not self._skipped:
                did |= self._write()
            if self.speaks:
                did |= self._speak()
                did |= self._sound()
            while self._results and (not did or self._results[0][0].is_ready()):
                array, use = self._results.popleft()
                use(np.asarray(array))
                did = True
        for row in self._rows:
            reply = row.session and row.session.reply
            if reply and reply.text_done and not (reply.speaker and reply.speaker.busy):
                self._finish(row)
        return did

    def _replies(self):
        return [row.session.reply for row in self._rows if row.session and row.session.reply]

    def _free_cancelled(self):
        for ref in list(self._sessions):
            session = ref()
            if session is None:
                self._sessions.remove(ref)
            elif session.reply is not None and session.reply.cancelled:
                if session.row is None:
                    session.finish(session.reply.finished())
                else:
                    self._finish(self._rows[session.row])

    def _finish(self, row):
        """Gives the row back, and the reply to the session."""
        session = row.session
        written = session.reply.tokens[:-1]  # the last one was never read
        row.keys = np.concatenate([row.keys, np.array(written, np.int64)])
        row.session, row.last_used, session.row = None, self._steps, None
        session.finish(session.reply.finished())

    def _listen(self) -> bool:
        """Encodes or reads one thing for the session that needs it most."""
        sessions = [session for ref in self._sessions if (session := ref())]
        waiting = [s for s in sessions if s.active and not (s.reply and s.reply.begun)]
        waiting.sort(key=lambda s: s.reply.start_s if s.reply else float("inf"))
        return any(self._hear(session) or self._read(session) for session in waiting)

    def _hear(self, session) -> bool:
        """Encodes the next piece of sound, of a model that takes it in pieces."""
        clip, config = session.clip, self.config
        if clip is None or config.audio.chunk_size <= 0 or clip.stream is None:
            return False
        banks, final = session.banks(), session.reply is not None
        stream, c = clip.stream, config.audio
        if stream.state is None:
            self._begin_clip(clip)
        kept = stream.state.frames.shape[1]
        number = stream_frames(c, kept)
        left = len(banks) - stream.used
        if left < number and not final:
            return False
        last = final and left < number
        if last:  # of what does not fill a chunk, the frames that fill encoder frames
            number = max(4 * max(c.encoder_frames(kept + left), 0) + 3 - kept, 0)
            number = min(number, left)
        self._encode_piece(clip, banks[stream.used : stream.used + number], last)
        if last:
            clip.stream = None
        session.heard_more()
        return True

    def _begin_clip(self, clip):
        """Room for a clip that arrives."""
        config, c = self.config, self.config.audio
        clip.stream.state = self._placed(init_audio_state(c, 1, c.max_positions))
        shape = c.num_embeddings(c.max_frames) + 1, config.llm.embed_dim
        clip.rows = self._placed(jnp.zeros(shape, config.llm.dtype))
        if c.num_prompts:
            clip.grow(audio_prompts(config, self.params))

    def _encode_piece(self, clip, banks, last):
        """Encodes the next float32[A, M] of a clip that arrives."""
        stream = clip.stream
        rows, stream.state = encode_piece(self.config, last, self.params, banks, stream.state)
        stream.used += len(banks)
        clip.grow(rows)

    def _read(self, session) -> bool:
        """Reads the next span of what a session's model should know; begins the reply if that is
        all. False if there is nothing to read, or no row.
        """
        prompt = session.prompt()
        if session.row is None:
            if not self._claim(session, prompt):
                return False
        row, reply = self._rows[session.row], session.reply
        common = _common(row.keys, prompt.keys)
        if reply:  # the last embedding is read in any case: the reply comes from it
            common = min(common, len(prompt.keys) - 1)
        number = min(len(prompt.keys) - common, SPANS[-1])
        if number <= 0:
            return False
        size = next(size for size in SPANS if size >= number)
        tokens = np.zeros(size, np.int32)
        tokens[:number] = prompt.tokens[common : common + number]
        embeddings = embed_text(self.config, self.params, tokens)
        for at, media in prompt.placed:
            first, last = max(at, common), min(at + media.size, common + number)
            if first < last:
                embeddings = splice(
                    embeddings, self._embeddings(media), first - at, first - common, last - first
                )
        self._text, hidden = read(
            self.config,
            self._num_seen(common + size),
            self.params,
            self._text,
            session.row,
            embeddings,
            common,
            number,
        )
        row.keys = prompt.keys[: common + number]
        if reply and len(row.keys) == len(prompt.keys):
            self._begin(session, prompt, hidden)
        return True

    def _claim(self, session, prompt) -> bool:
        """Gives the session the free row that holds most of its prompt, else the one longest
        unused.
        """
        free = [row for row in self._rows if row.session is None]
        if not free:
            return False
        best = max(free, key=lambda row: (_common(row.keys, prompt.keys), -row.last_used))
        best.session, session.row = session, self._rows.index(best)
        return True

    def _embeddings(self, media: Media):
        """dtype[S, D] of a tile or a clip, encoded once."""
        if media.rows is None:
            if media.source.ndim == 3:
                media.rows = encode_tile(self.config, self.params, media.source)
            else:
                frames = np.zeros(
                    (bucket(len(media.source), 32), media.source.shape[1]), np.float32
                )
                frames[: len(media.source)] = media.source
                args = self.config, self.params, frames, np.int32(len(media.source))
                media.rows = encode_clip(*args)
        return media.rows

    def _begin(self, session, prompt, hidden):
        """The first token of the reply."""
        tokens = np.full(self._num_slots, -1, np.int32)
        tokens[: len(prompt.tokens)] = prompt.tokens
        left = min(session.max_new_tokens, self._num_slots - len(prompt.tokens))
        reply = session.reply
        reply.begun, reply.left = True, left
        self._text, token = begin_text(
            self.config,
            self.params,
            self._text,
            session.row,
            hidden,
            tokens,
            jax.random.key(session.seed),
            left,
            session.sampler.arrays(),
            self._stops,
        )
        row = self._rows[session.row]

        def use(token):
            reply.note("prompt read")
            if row.session is session and session.reply is reply:
                reply.push_token(int(token), left == 1)

        self._later(token, use, None)

    def _write(self) -> bool:
        """The next few tokens of all replies."""
        owners = self._owners(lambda reply: reply.begun and not reply.text_done)
        if not owners or self._ahead["text"] >= CALLS_AHEAD:
            return False
        ahead = (self._ahead["text"] + 1) * TOKENS_PER_CALL
        longest = max(len(self._rows[i].keys) + len(reply.tokens) for i, _, reply in owners)
        self._text, tokens = next_text(
            self.config,
            self._num_seen(longest + ahead + 1),
            TOKENS_PER_CALL,
            self.params,
            self._text,
            self._running(owners),
            self._stops,
        )

        def use(tokens):
            for row, _, reply in self._still(owners):
                for token in tokens[:, row]:
                    if token >= 0 and not reply.text_done:
                        reply.push_token(int(token), len(reply.tokens) + 1 == reply.left)

        self._later(tokens, use, "text")
        return True

    def _speak(self) -> bool:
        """The next few codes of all replies that have something to say."""
        owners = self._owners(lambda reply: reply.speaker)
        did = False
        for i, session, reply in owners:
            speaker = reply.speaker
            if not speaker.speaking and speaker.segments:
                self._begin_speech(i, session, speaker)
                did = True
        owners = [owner for owner in owners if owner[2].speaker.speaking]
        if not owners or self._ahead["speech"] >= CALLS_AHEAD:
            return did
        longest = max(reply.speaker.num_slots for _, _, reply in owners) + CODES_PER_CALL
        self._speech, codes = next_speech(
            self.config,
            min(_power_of_two(longest), self._speech.cache.k.shape[2]),
            CODES_PER_CALL,
            self.params,
            self._banned,
            self._speech,
            self._running(owners),
        )
        numbers = {}
        for i, _, reply in owners:
            reply.speaker.num_slots += CODES_PER_CALL
            numbers[i] = reply.speaker.number

        def use(codes):
            for row, _, reply in self._still(owners):
                if reply.speaker.number == numbers[row]:
                    reply.note("first codes")
                    reply.speaker.push(codes[:, row])

        self._later(codes, use, "speech")
        return True

    def _begin_speech(self, row, session, speaker):
        tokens, length, key = speaker.next_segment()
        self._speech = begin_speech(
            self.config,
            self.params,
            self._speech,
            row,
            tokens,
            length,
            key,
            np.int32(voices.MAX_CODES),
            (session.speech_sampler or voices.sampler_of(self.config)).arrays(),
        )

    def _sound(self) -> bool:
        """Decodes a window of each reply that has one; short windows apart from long ones."""
        did = False
        for least, size in ((0, FIRST_CHUNK + PADDING), (FIRST_CHUNK + PADDING, MOST_CODES)):
            owners = self._owners(functools.partial(_has_window, least, size))
            if not owners:
                continue
            number = 1 << (len(owners) - 1).bit_length()
            codes = np.zeros((number, size), np.int32)
            lengths = np.ones(number, np.int32)
            timbre = np.zeros((number, self.config.codec.num_global_tokens), np.int32)
            windows = []
            for i, (_, _, reply) in enumerate(owners):
                window = reply.speaker.windows.popleft()
                reply.speaker.decoding += 1
                windows.append(window)
                lengths[i] = len(window.codes)
                codes[i, : lengths[i]] = window.codes
                timbre[i] = reply.speaker.voice
            waveforms = decode_codes(self.config, self.params, codes, lengths, timbre)
            self._later(waveforms, self._handed_out(owners, windows), None)
            did = True
        return did

    def _handed_out(self, owners, windows):
        """What is done with waveforms: each goes to its reply, without its padding."""
        rate = self.config.codec.samples_per_token

        def use(waveforms):
            for (_, session, reply), window, waveform in zip(owners, windows, waveforms):
                if session.reply is reply:
                    reply.speaker.decoding -= 1
                    reply.push_sound(waveform[window.first * rate : window.last * rate])

        return use

    def _num_seen(self, length) -> int:
        """How many slots of a row are looked at where `length` may be in use."""
        return min(_power_of_two(length), self._num_slots)

    def _owners(self, wanted):
        """(row, session, reply) of the replies in rows that are `wanted`."""
        return [
            (i, row.session, row.session.reply)
            for i, row in enumerate(self._rows)
            if row.session and row.session.reply and wanted(row.session.reply)
        ]

    def _still(self, owners):
        """Those whose reply has not been given up since."""
        return [owner for owner in owners if owner[1].reply is owner[2]]

    def _running(self, owners):
        """bool[B] True in the rows of `owners`."""
        running = np.zeros(len(self._rows), bool)
        running[[row for row, _, _ in owners]] = True
        return running

    def _later(self, array, use, kind):
        """Has `use` called with the array once it is there; `kind` counts what is ahead."""
        array.copy_to_host_async()
        self._ahead[kind] += 1

        def counted(array):
            self._ahead[kind] -= 1
            use(array)

        self._results.append((array, counted))

    def _hear_voice(self, clip):
        """int32[G] global tokens of a clip: of its whole seconds, ten at most."""
        rate_hz = self.config.codec.sample_rate_hz
        waveform = read_audio(clip, rate_hz)
        seconds = min(len(waveform) // rate_hz, MAX_VOICE_S)
        if not seconds:
            name = clip if isinstance(clip, (str, Path)) else "voice"
            raise ValueError(
                f"{name}: {len(waveform) / rate_hz:.2f} s of sound; give at least 1 s of the voice"
            )
        with self._on_mesh():
            return np.asarray(hear_voice(self.config, self.params, waveform[: seconds * rate_hz]))

    def _placed(self, arrays):
        """Arrays where the parameters are."""
        return arrays if self._device is None else jax.device_put(arrays, self._device)

    @contextlib.contextmanager
    def _on_mesh(self):
        if self.mesh is None:
            yield
        else:
            with jax.set_mesh(self.mesh), rules():
                yield


def _has_window(least, most, reply) -> bool:
    """Whether the next window of a reply has more codes than `least` and at most `most`."""
    windows = reply.speaker and reply.speaker.windows
    return bool(windows) and least < len(windows[0].codes) <= most


def _power_of_two(length: int) -> int:
    """The least power of two, 256 or more, that is not less: few sizes make few compilations."""
    return max(256, 1 << (length - 1).bit_length())


def lengths(most: int) -> list[int]:
    """All numbers of slots that programs look at, in a row of `most`."""
    return sorted({min(_power_of_two(length), most) for length in range(1, most + 1)})


def _common(a, b) -> int:
    """How many keys two conversations begin with alike."""
    number = min(len(a), len(b))
    differs = np.flatnonzero(a[:number] != b[:number])
    return int(differs[0]) if len(differs) else number


def load(
    path,
    mesh=None,
    dtype: str | None = None,
    max_tokens: int | None = None,
    video_rate: float = 1.0,
    num_rows: int = 1,
    max_new_tokens: int = 512,
    int8: bool = False,
    int8_cache: bool = False,
) -> Engine:
    """The engine of a checkpoint folder.

    Args:
      path: folder made by `vita init`, `vita convert` or training.
      mesh: (data, fsdp, tensor) sizes or a Mesh to spread the model over; None is one device.
      dtype: "float32", "bfloat16" or "float16"; norms, softmax, logits and the codec stay float32.
        None is float32 on CPUs, which are slower in 16 bits, and bfloat16 elsewhere.
      max_tokens: longest prompt, up to the LLM's positions; None is the checkpoint's.
      video_rate: frames of a video to look at in a second (4 to 16 in all).
      num_rows: replies that can be given at a time.
      max_new_tokens: longest reply.
      int8: keep the weights of a checkpoint by `vita quantize` in 8 bits (`checkpoint.load`).
      int8_cache: keep keys and values of conversations in 8 bits.

    Raises:
      FileNotFoundError, ValueError: the folder is not a checkpoint, or not a whole one; or there
        are no weights of 8 bits to keep.
    """
    mesh = make_mesh(mesh) if isinstance(mesh, (tuple, list)) else mesh
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    config, params = checkpoint.load(path, mesh, dtype, int8=int8)
    sizes = max_tokens, video_rate, num_rows, max_new_tokens, int8_cache
    return Engine(config, params, Tokenizer.load(path), mesh, *sizes)


def keep_compiled() -> str:
    """Has JAX keep every program that it compiles in a folder, and look there first: a new process
    finds what an earlier one compiled.

    Returns:
      The folder: $JAX_COMPILATION_CACHE_DIR, else `vita_jax` in the user's cache directory.
    """
    if jax.config.jax_compilation_cache_dir is None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(home, "vita_jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return jax.config.jax_compilation_cache_dir
