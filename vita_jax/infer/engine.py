"""Engine: pictures, video, speech and text in; a reply in text and in speech out, as it comes.

    engine = vita_jax.load("checkpoints/vita")
    for event in engine.stream(images=["cat.jpg"], audio="question.wav"):
        ...

One turn: files -> `data/processor.py` -> `decode.embed_prompt` -> `decode.start_text` ->
`decode.next_text` until a stop token; each finished segment of text -> `voice.py` -> waveform. Read
next: `decode.py`, `voice.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path

import jax
import numpy as np

from vita_jax import checkpoint
from vita_jax.data.audio import read_audio
from vita_jax.data.collate import bucket, collate
from vita_jax.data.processor import Processor, Turn
from vita_jax.data.prompts import PAD, START, STATES
from vita_jax.data.tokenizer import StreamDecoder, Tokenizer
from vita_jax.infer.decode import embed_prompt, hear_voice, next_text, start_text
from vita_jax.infer.sampling import Sampler
from vita_jax.infer.voice import SPEECH_SAMPLER, Segmenter, Voice
from vita_jax.sharding import make_mesh, rules

MAX_VOICE_S = 10  # of a clip to speak in the voice of


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
    """More text of the reply, `time_s` after the turn began."""

    text: str
    time_s: float


@dataclasses.dataclass(frozen=True)
class AudioChunk:
    """More of the spoken reply: float32[W] in [-1, 1]."""

    samples: np.ndarray
    sample_rate_hz: int
    time_s: float


@dataclasses.dataclass(frozen=True)
class Reply:
    """A whole reply.

    Attributes:
      text: what it says.
      state: its state token: "audio_reply", "noise" or "text_reply"; None if the model wrote none.
      audio: float32[W] in [-1, 1], or None if it was not spoken.
      sample_rate_hz: of `audio`.
      turn: the turn as `history` of the next one takes it.
      seen: what went in.
      times_s: seconds after the turn began, by name: "prompt read", "first token", "first sound",
        "text done", "done".
    """

    text: str
    state: str | None
    audio: np.ndarray | None
    sample_rate_hz: int | None
    turn: Turn
    seen: Seen
    times_s: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Done:
    """The end of a turn."""

    reply: Reply


class Engine:
    """A model ready to talk. Make one with `load`."""

    def __init__(
        self,
        config,
        params,
        tokenizer: Tokenizer,
        mesh=None,
        max_tokens: int | None = None,
        video_rate: float = 1.0,
    ):
        """Joins a model and its tokenizer.

        Args:
          config: VitaConfig, codec folded (as `checkpoint.load` returns it).
          params: its parameters, on the mesh if there is one.
          tokenizer: its tokenizer.
          mesh: mesh of the parameters, or None for one device.
          max_tokens: longest prompt; None is the config's.
          video_rate: frames of a video to look at in a second.
        """
        self.config, self.params, self.tokenizer, self.mesh = config, params, tokenizer, mesh
        self.processor = Processor(config, tokenizer, max_tokens, video_rate)
        stops = [tokenizer.eos_id, *tokenizer.encode(PAD), *tokenizer.encode(START)]
        self._stop_ids = frozenset(stops)
        self._states = {i: name for name, i in tokenizer.state_ids.items()}

    def chat(self, text=None, images=(), audio=None, video=None, **options) -> Reply:
        """One turn, whole. Arguments as for `stream`."""
        for event in self.stream(text, images, audio, video, **options):
            if isinstance(event, Done):
                return event.reply

    def stream(
        self,
        text: str | None = None,
        images=(),
        audio=None,
        video=None,
        *,
        history=(),
        speak: bool = True,
        voice=None,
        max_new_tokens: int = 512,
        sampler: Sampler = Sampler(),
        speech_sampler: Sampler = SPEECH_SAMPLER,
        seed: int = 0,
    ):
        """One turn, as it comes: TextDelta for each token, AudioChunk once a segment is spoken,
        Done at the end.

        Args:
          text: written question.
          images: picture files, PIL images or arrays.
          audio: spoken question: a file, or (samples, rate in Hz).
          video: video file or list of frames.
          history: earlier turns (`Reply.turn`), oldest first.
          speak: also answer in speech.
          voice: a clip to speak in the voice of, 1 s or longer: a file, or (samples, rate in Hz);
            None is the model's own.
          max_new_tokens: the reply is cut after as many.
          sampler: how text is drawn; greedy by default.
          speech_sampler: how codes are drawn; by default among the two likeliest, as the release
            does.
          seed: of all draws.

        Raises:
          FileNotFoundError, ValueError: input that cannot be used (see `Processor.prompt`).
          ValueError: `speak` for a model without a voice, `voice` without `speak`.
        """
        if speak and (self.config.speech is None or self.config.codec is None):
            raise ValueError(f"{self.config.name} has no speech decoder or codec: pass speak=False")
        if voice is not None and not speak:
            raise ValueError("voice: given with speak=False; leave one of them out")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens}: expected at least 1")
        history = tuple(history)
        begin = time.perf_counter()
        example = self.processor.prompt(text, images, audio, video, history)
        speaker = None
        if speak:
            global_tokens = None if voice is None else self._hear_voice(voice)
            speaker = Voice(
                self.config, self.params, self.tokenizer, speech_sampler, seed, global_tokens
            )
        turn = Turn(text, images, audio, video)
        return self._run(example, turn, begin, speaker, max_new_tokens, sampler, seed)

    def _run(self, example, turn, begin, voice, max_new_tokens, sampler, seed):
        times = {}

        def now(name=None):
            seconds = time.perf_counter() - begin
            if name is not None:
                times.setdefault(name, seconds)
            return seconds

        decoder, segmenter = StreamDecoder(self.tokenizer), Segmenter()
        texts, sounds, state = [], [], None

        def sound():
            with self._on_mesh():
                samples = voice.advance()
            if not samples.size:
                return []
            sounds.append(samples)
            return [AudioChunk(samples, self.config.codec.sample_rate_hz, now("first sound"))]

        for i, token in enumerate(self._tokens(example, max_new_tokens, sampler, seed, now)):
            now("first token")
            if i == 0 and token in self._states:
                state = self._states[token]
                continue
            delta = decoder.push(token)
            if delta:
                texts.append(delta)
                yield TextDelta(delta, now())
            if voice:
                for segment in segmenter.push(delta):
                    voice.say(segment)
                yield from sound()
        rest = decoder.flush()
        if rest:
            texts.append(rest)
            yield TextDelta(rest, now())
        now("text done")
        if voice:
            for segment in segmenter.push(rest) + segmenter.flush():
                voice.say(segment)
            while voice.busy:
                yield from sound()
        now("done")
        text = "".join(texts)
        yield Done(
            Reply(
                text=text,
                state=state,
                audio=np.concatenate([np.zeros(0, np.float32), *sounds]) if voice else None,
                sample_rate_hz=self.config.codec.sample_rate_hz if voice else None,
                turn=dataclasses.replace(turn, reply=STATES.get(state, "") + text),
                seen=self._seen(example),
                times_s=times,
            )
        )

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

    def _tokens(self, example, max_new_tokens, sampler, seed, now):
        """The ids of the reply one by one, up to a stop token, which is not given out."""
        batch, length = collate([example]), len(example.tokens)
        max_new_tokens = min(max_new_tokens, self.config.llm.max_positions - length)
        num_slots = bucket(batch.tokens.shape[1] + max_new_tokens, 128)
        sampling = sampler.arrays()
        with self._on_mesh():
            embeddings = embed_prompt(self.config, self.params, batch)
            state = start_text(
                self.config,
                num_slots,
                self.params,
                embeddings,
                batch.tokens,
                np.array([length], np.int32),
                jax.random.key(seed),
                sampling,
            )
        for i in range(max_new_tokens):
            token = int(state.token[0])
            now("prompt read")
            if token in self._stop_ids:
                return
            yield token
            if i + 1 < max_new_tokens:
                with self._on_mesh():
                    state = next_text(self.config, self.params, state, sampling)

    def write(self, turns, max_new_tokens: int = 64) -> list[tuple[str | None, str]]:
        """Replies to several turns at once: each the likeliest token after the other, unspoken.

        Args:
          turns: `Turn`s without a history, one or more. Few lengths make few compilations.
          max_new_tokens: a reply is cut after as many.

        Returns:
          (state, text) of each reply, as in `Reply`.

        Raises:
          FileNotFoundError, ValueError: input that cannot be used (see `Processor.prompt`).
        """
        examples = [self.processor.prompt(t.text, t.images, t.audio, t.video) for t in turns]
        batch = collate(examples)
        lengths = np.array([len(example.tokens) for example in examples], np.int32)
        num_slots = bucket(batch.tokens.shape[1] + max_new_tokens, 128)
        sampling, columns = Sampler().arrays(), []
        with self._on_mesh():
            given = embed_prompt(self.config, self.params, batch), batch.tokens, lengths
            key = jax.random.key(0)
            state = start_text(self.config, num_slots, self.params, *given, key, sampling)
            over = np.zeros(len(turns), bool)
            for i in range(max_new_tokens):
                columns.append(np.asarray(state.token))
                over |= np.isin(columns[-1], list(self._stop_ids))
                if over.all() or i + 1 == max_new_tokens:
                    break
                state = next_text(self.config, self.params, state, sampling)
        return [self._read(row) for row in np.stack(columns, axis=1).tolist()]

    def _read(self, ids):
        """(state, text) of a reply's ids, what stands behind a stop token left out."""
        end = next((i for i, token in enumerate(ids) if token in self._stop_ids), len(ids))
        state = self._states.get(ids[0])
        decoder = StreamDecoder(self.tokenizer)
        text = "".join(decoder.push(token) for token in ids[state is not None : end])
        return state, text + decoder.flush()

    def _seen(self, example) -> Seen:
        num_tiles = 0 if example.tiles is None else len(example.tiles)
        tile_embeddings = num_tiles * self.config.vision.embeddings_per_tile
        audio_embeddings = sum(
            self.config.audio.num_embeddings(len(clip)) for clip in example.audio
        )
        return Seen(
            num_tiles=num_tiles,
            num_audio_frames=sum(len(clip) for clip in example.audio),
            num_tile_embeddings=tile_embeddings,
            num_audio_embeddings=audio_embeddings,
            num_text_tokens=len(example.tokens) - tile_embeddings - audio_embeddings,
        )

    @contextlib.contextmanager
    def _on_mesh(self):
        if self.mesh is None:
            yield
        else:
            with jax.set_mesh(self.mesh), rules():
                yield


def load(
    path,
    mesh=None,
    dtype: str = "bfloat16",
    max_tokens: int | None = None,
    video_rate: float = 1.0,
) -> Engine:
    """The engine of a checkpoint folder.

    Args:
      path: folder made by `vita init`, `vita convert` or training.
      mesh: (data, fsdp, tensor) sizes or a Mesh to spread the model over; None is one device.
      dtype: "float32", "bfloat16" or "float16"; norms, softmax, logits and the codec stay float32.
      max_tokens: longest prompt, up to the LLM's positions; None is the checkpoint's.
      video_rate: frames of a video to look at in a second (4 to 16 in all).

    Raises:
      FileNotFoundError, ValueError: the folder is not a checkpoint, or not a whole one.
    """
    mesh = make_mesh(mesh) if isinstance(mesh, (tuple, list)) else mesh
    config, params = checkpoint.load(path, mesh, dtype)
    return Engine(config, params, Tokenizer.load(path), mesh, max_tokens, video_rate)
