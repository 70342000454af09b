"""Speed of whole turns: from the end of a spoken question to the first sound of the reply, step by
step, for one user and for many.

Goes in: an engine, or what makes one, and recorded questions. Comes out: a report. Two clocks:
*engine*, from when the last samples are pushed to when the first sound is handed out, the host's
work included; *model*, from when the last input of the audio encoder is on the device to when the
first sound is there. Sound arrives in pieces of 100 ms; of one user faster than it was spoken, and
the engine has done what it can before the next piece comes. Read next: `infer/engine.py`, which is
watched.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from vita_jax import bench
from vita_jax import config as configs
from vita_jax.bench_programs import Work, model_of
from vita_jax.data.audio import SAMPLE_RATE_HZ, read_audio
from vita_jax.data.processor import Turn
from vita_jax.data.tokenizer import load_bundled
from vita_jax.infer import engine as engines
from vita_jax.infer.engine import AudioChunk, Done, Engine, load

SAMPLES = Path(__file__).parent / "samples"
PIECE_S = 0.1  # of sound that arrives at a time
PIECE_SAMPLES = round(PIECE_S * SAMPLE_RATE_HZ)
STAGGER_S = 2.0  # in which users begin one after the other
TENTHS = 10  # that an hour is reported in
KB_MAXRSS = 1 / 1024 if sys.platform == "darwin" else 1  # what `ru_maxrss` counts
MAX_NEW_TOKENS = 40
FORCED_TOKENS = 9  # that a model with random weights writes: a state token and eight of text
LISTENING = "while listening"
FEATURES, MORE_TEXT = "features", "more text"
# The step of the budget that a program of the engine belongs to, in the order of a turn.
STEPS = {
    "encode_tile": "vision",
    "encode_piece": "encoder",
    "encode_clip": "encoder",
    "embed_text": "prefill",
    "splice": "prefill",
    "read": "prefill",
    "begin_text": "first text token",
    "next_text": "first segment",
    "begin_speech": "NAR",
    "next_speech": "AR to first chunk",
    "decode_codes": "codec",
}
BUDGET = list(dict.fromkeys([FEATURES, *STEPS.values(), MORE_TEXT]))


@dataclasses.dataclass(frozen=True)
class Question:
    """A recorded question.

    Attributes:
      audio: sound file, or samples float32[W] at 16 kHz.
      image: picture that it is about, or None.
      history: tokens of the conversation before it.
    """

    audio: object
    image: object = None
    history: int = 0


QUESTIONS = (
    Question(SAMPLES / "cat_en.flac", SAMPLES / "cat.png"),
    Question(SAMPLES / "apples_zh.flac", SAMPLES / "apples.png"),
    Question(SAMPLES / "question_en.wav", SAMPLES / "picture.jpg"),
    Question(SAMPLES / "question_zh.wav"),
)


def engine_of(work: Work, num_rows: int = 1, max_tokens: int | None = None) -> Engine:
    """The engine of a checkpoint; or, of a preset, one with random weights that goes on until it is
    cut off, all of whose text is words and whose voice does not end by itself.
    """
    if work.model not in configs.PRESETS:
        return load(work.model, None, work.dtype, max_tokens, num_rows=num_rows)
    config, params = model_of(work)
    nano = load_bundled("vita_nano")
    enough = nano.vocab_size <= config.llm.vocab_size
    tokenizer = nano if enough else load_bundled("vita_tiny")
    tokenizer.token_bytes = lambda token_id: b"word "
    engine = Engine(config, params, tokenizer, None, max_tokens, num_rows=num_rows)
    llm, speech = params["llm"], params["speech"]
    llm["head"] = llm["head"].at[:, sorted(engine.stop_ids)].set(0)  # others are likelier
    speech["head_bias"] = speech["head_bias"].at[config.speech.eos_id].set(-1e4)
    return engine


def chat(
    work: Work, questions=QUESTIONS, num_repeats: int = 5, fresh: bool = True, engine=None
) -> dict:
    """Replays recorded questions, each in a conversation of its own.

    Every question is asked once before, so that nothing is compiled any more. Then it is asked for
    the engine clock, for the model clock, and with every program run to its end before the next
    begins, for the time of each step.

    Args:
      work: the model.
      questions: to ask.
      num_repeats: times that each is asked for each reading.
      fresh: also how long a new process takes to its first reply.
      engine: of `work`; None makes one.

    Returns:
      a report: `budget`, for each step p50_s and p95_s after the last sample and p50_s while
      listening; `clocks`, p50_s and p95_s of "engine" and "model"; real_time_factor, the seconds of
      a reply up to its end by those of its sound; `fresh_s`, without and with a warm compilation
      cache; silent, replies without sound; n; dtype, model and machine.

    Raises:
      FileNotFoundError, ValueError: a model without a voice, or input that cannot be used.
    """
    engine = engine or engine_of(work)
    if not engine.speaks:
        raise ValueError(f"{work.model}: has no speech decoder or codec; nothing can be heard")
    options = _options(work)
    for question in questions:
        _ask(engine, question, options)
    clocks, factors, budgets, silent = {"engine": [], "model": []}, [], [], 0
    for _ in range(num_repeats):
        for question in questions:
            turn = _ask(engine, question, options)
            if turn.first_s is None:
                silent += 1
                continue
            clocks["engine"].append(turn.first_s)
            factors.append(turn.done_s / turn.sound_s)
            clocks["model"].append(_model_clock(engine, question, options))
            budgets.append(_budget(engine, question, options))
    if not budgets:
        raise ValueError(f"{work.model}: no reply had sound; give other questions")
    return {
        "what": "chat",
        "budget": {
            step: _percentiles([after.get(step, 0.0) for _, after in budgets])
            | {LISTENING: statistics.median(before.get(step, 0.0) for before, _ in budgets)}
            for step in BUDGET
        },
        "clocks": {name: _percentiles(seconds) for name, seconds in clocks.items()},
        "real_time_factor": statistics.median(factors),
        "fresh_s": _fresh_processes(work, questions[0]) if fresh else None,
        "silent": silent,
        "n": len(budgets),
    } | _about(work)


def load_of_users(
    work: Work, num_slots: int, questions=QUESTIONS, numbers=(), num_turns: int = 2, engine=None
) -> dict:
    """One engine with `num_slots` rows, asked by several users at a time. They begin one after the
    other within two seconds and speak as fast as was recorded; each asks again, in a conversation
    of its own, as soon as it was answered.

    Args:
      work: the model.
      num_slots: rows of the engine.
      questions: that the users ask, one after the other.
      numbers: of users; () is 1, 2, 4, ... up to `num_slots`.
      num_turns: of each user.
      engine: of `work` with so many rows; None makes one.

    Returns:
      a report: `rows`, objects with users, replies_per_s, sound_s_per_s, p50_s and p95_s of the
      engine clock, gaps (chunks handed out after the sound before them ran out) and gap_s, the
      longest; dtype, model and machine.
    """
    engine = engine or engine_of(work, num_slots)
    numbers = numbers or sorted({min(1 << i, num_slots) for i in range(num_slots.bit_length() + 1)})
    for number in numbers:  # compiles
        _serve_users(engine, questions, number, 1, _options(work))
    rows = [_serve_users(engine, questions, n, num_turns, _options(work)) for n in numbers]
    return {"what": "load", "rows": rows} | _about(work)


def hour(work: Work, questions=QUESTIONS, minutes: float = 60.0, engine=None) -> dict:
    """One conversation of `minutes`, in which the questions are asked again and again; what would
    be spoken and listened to takes no time, but counts.

    Args:
      work: the model.
      questions: to ask.
      minutes: of sound, questions and replies together.
      engine: of `work`; None makes one and compiles all that it may need, so that its memory tells
        what a conversation takes.

    Returns:
      a report: `rows`, objects for each tenth of the conversation with minutes (up to its end),
      turns, p50_s and p95_s of the engine clock, tokens of what is remembered of the conversation,
      and memory_mb, the most that the process has had; dtype, model and machine.

    Raises:
      FileNotFoundError, ValueError: a model without a voice, input that cannot be used, or a tenth
        without a sound.
    """
    options = _options(work)
    if engine is None:
        engine = engine_of(work)
        engine.warm_up(max(len(_sound(question)) for question in questions) / SAMPLE_RATE_HZ)
    for question in questions:
        _ask(engine, question, options)
    session, asked, turns = engine.session(**options), itertools.cycle(questions), []
    rows, spoken_s = [], 0.0
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("minutes talked", total=minutes)
        while len(rows) < TENTHS:
            pieces = _begin(session, next(asked))
            turns.append(_answered(engine, session, pieces))
            spoken_s += sum(map(len, pieces)) / SAMPLE_RATE_HZ + turns[-1].sound_s
            progress.update(bar, completed=spoken_s / 60)
            if spoken_s / 60 < minutes * (len(rows) + 1) / TENTHS:
                continue
            clocks = [turn.first_s for turn in turns if turn.first_s is not None]
            if not clocks:
                raise ValueError(f"{work.model}: no reply had sound; give other questions")
            memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KB_MAXRSS / 1e3
            size = {"tokens": len(session.prompt().tokens), "memory_mb": memory_mb}
            rows.append(
                {"minutes": spoken_s / 60, "turns": len(turns), **_percentiles(clocks)} | size
            )
            turns = []
    return {"what": "hour", "rows": rows} | _about(work)


def table(report: dict) -> Table:
    """The report of `chat`, `load_of_users` or `hour`, to be printed."""
    machine = report["machine"]
    shown = Table(
        title=f"{report['model']}, {report['dtype']}",
        caption=f"{machine['processor']}, {machine['cores']} cores, {machine['device']}",
    )
    if report["what"] == "load":
        names = ("users", "replies/s", "sound s/s", "p50 s", "p95 s", "gaps", "longest s")
        keys = (
            "users", "replies_per_s", "sound_s_per_s", "p50_s", "p95_s", "gaps", "gap_s"
        )  # fmt: skip
        for name in names:
            shown.add_column(name, justify="right")
        for row in report["rows"]:
            shown.add_row(*(f"{row[key]:.3g}" for key in keys))
        return shown
    if report["what"] == "hour":
        for name in ("minutes", "turns", "p50 s", "p95 s", "tokens kept", "MB, most"):
            shown.add_column(name, justify="right")
        for row in report["rows"]:
            times = (f"{row['p50_s']:.3f}", f"{row['p95_s']:.3f}")
            sizes = (str(row["tokens"]), f"{row['memory_mb']:.0f}")
            shown.add_row(f"{row['minutes']:.1f}", str(row["turns"]), *times, *sizes)
        return shown
    for name in ("ms", "p50", "p95", LISTENING):
        shown.add_column(name, justify="left" if name == "ms" else "right")
    for step, row in report["budget"].items():
        cells = (row["p50_s"], row["p95_s"], row[LISTENING])
        shown.add_row(step, *(f"{seconds * 1e3:.1f}" for seconds in cells))
    shown.add_section()
    for name, row in report["clocks"].items():
        cells = (row["p50_s"], row["p95_s"])
        shown.add_row(f"{name} clock", *(f"{seconds * 1e3:.1f}" for seconds in cells), "")
    shown.add_row("real-time factor", f"{report['real_time_factor']:.2f}", "", "")
    for name, seconds in (report["fresh_s"] or {}).items():
        shown.add_row(f"fresh process, {name}", f"{seconds * 1e3:.0f}", "", "")
    return shown


@dataclasses.dataclass
class _Turn:
    """When the last samples were pushed, by `time.perf_counter`; seconds after that: when the first
    sound came (None: no sound) and when all was done; seconds of sound; what pushing them took.
    """

    start_s: float
    first_s: float | None = None
    done_s: float = 0.0
    sound_s: float = 0.0
    features_s: float = 0.0


def _options(work):
    forced = work.model in configs.PRESETS
    return {"max_new_tokens": FORCED_TOKENS if forced else MAX_NEW_TOKENS}


@functools.cache
def _samples(source):
    return read_audio(source)


def _open(engine, question, options):
    """A session that sees the picture of the question; and the pieces of its sound."""
    words = " word" * (question.history // len(engine.tokenizer.encode(" word")))
    history = (Turn(text=words, reply="word"),) if words else ()
    session = engine.session(history=history, **options)
    return session, _begin(session, question)


def _begin(session, question):
    """Shows the picture of the question; gives the pieces of its sound."""
    if question.image is not None:
        session.push_image(question.image)
    samples = _sound(question)
    return np.split(samples, range(PIECE_SAMPLES, len(samples), PIECE_SAMPLES))


def _sound(question):
    """float32[W] at 16 kHz."""
    given = question.audio
    return given if isinstance(given, np.ndarray) else _samples(given)


def _ask(engine, question, options, whole=True):
    """A turn, broken off at its first sound unless it is asked for as a `whole`."""
    return _answered(engine, *_open(engine, question, options), whole)


def _answered(engine, session, pieces, whole=True):
    """A turn whose sound comes in these pieces."""
    *pieces, last = pieces
    for piece in pieces:
        session.push_audio(piece)
        while engine.step():
            pass
    turn = _Turn(time.perf_counter())
    session.push_audio(last)
    session.end_of_speech()
    turn.features_s = time.perf_counter() - turn.start_s
    late_s = session.reply.start_s - turn.start_s
    while True:
        engine.step()
        while session.events:
            event = session.events.popleft()
            if isinstance(event, AudioChunk):
                if turn.first_s is None:
                    turn.first_s = late_s + event.time_s
                turn.sound_s += len(event.samples) / event.sample_rate_hz
                if not whole:
                    session.cancel()
            elif isinstance(event, Done):
                turn.done_s = late_s + event.reply.times_s["done"]
                return turn


def _model_clock(engine, question, options):
    """Seconds from the last input of the encoder to the first sound, both on the device."""
    marks = {}

    def watch(name, run):
        def call(*args):
            if name.startswith("encode_"):
                on_host = np.ndarray, np.generic
                args = [jax.device_put(x) if isinstance(x, on_host) else x for x in args]
                jax.block_until_ready([x for x in args if isinstance(x, jax.Array)])
                if "sound" not in marks:
                    marks["heard"] = time.perf_counter()
                return run(*args)
            result = jax.block_until_ready(run(*args))
            marks.setdefault("sound", time.perf_counter())
            return result

        return call

    with _watched(watch, ("encode_piece", "encode_clip", "decode_codes")):
        _ask(engine, question, options, whole=False)
    return marks["sound"] - marks["heard"]


def _budget(engine, question, options):
    """Seconds of each step up to the first sound: while listening, and after the last sample."""
    calls = []

    def watch(name, run):
        def call(*args):
            start_s = time.perf_counter()
            result = jax.block_until_ready(run(*args))
            calls.append((name, start_s, time.perf_counter()))
            return result

        return call

    with _watched(watch, STEPS):
        turn = _ask(engine, question, options, whole=False)
    end_s = next(start_s for name, start_s, _ in calls if name == "decode_codes")
    before, after = collections.Counter(), collections.Counter({FEATURES: turn.features_s})
    segmented = False
    for name, start_s, stop_s in calls:
        segmented |= name == "begin_speech"
        step = MORE_TEXT if name == "next_text" and segmented else STEPS[name]
        if start_s <= end_s:
            (before if start_s < turn.start_s else after)[step] += stop_s - start_s
    return before, after


@contextlib.contextmanager
def _watched(watch, names):
    """Puts `watch(name, function)` for the functions of these names that the engine calls."""
    kept = {name: getattr(engines, name) for name in names if hasattr(engines, name)}
    try:
        for name, run in kept.items():
            setattr(engines, name, watch(name, run))
        yield
    finally:
        for name, run in kept.items():
            setattr(engines, name, run)


@dataclasses.dataclass
class _User:
    """Someone who asks, waits for the reply to be handed out, and asks again.

    Attributes:
      seed: of the replies, and which question comes first.
      left: turns to come.
      next_s: when the next piece of sound is there.
      session, pieces: of the turn, and what of its sound is still to come.
      late_s: from when the last piece was there to when the turn was ended.
      chunks: (time handed out, seconds of sound) of the reply so far.
    """

    seed: int
    left: int
    next_s: float
    session: object = None
    pieces: list = dataclasses.field(default_factory=list)
    late_s: float = 0.0
    chunks: list = dataclasses.field(default_factory=list)

    def speak(self, engine, questions, options):
        """Pushes what has been said by now."""
        if self.session is None and self.left and time.perf_counter() >= self.next_s:
            self.left -= 1
            question = questions[(self.seed + self.left) % len(questions)]
            self.session, self.pieces = _open(engine, question, options | {"seed": self.seed})
            self.next_s, self.chunks = time.perf_counter() + PIECE_S, []
        while self.pieces and time.perf_counter() >= self.next_s:
            self.session.push_audio(self.pieces.pop(0))
            if not self.pieces:
                self.session.end_of_speech()
                self.late_s = self.session.reply.start_s - self.next_s
            self.next_s += PIECE_S

    def listen(self) -> bool:
        """Takes what was handed out; whether the reply is over."""
        while self.session and self.session.events:
            event = self.session.events.popleft()
            if isinstance(event, AudioChunk):
                seconds = len(event.samples) / event.sample_rate_hz
                self.chunks.append((self.late_s + event.time_s, seconds))
            elif isinstance(event, Done):
                self.session, self.next_s = None, time.perf_counter()
                return True
        return False


def _serve_users(engine, questions, number, num_turns, options):
    """`number` users at a time, each with `num_turns` turns: a row of the report."""
    start_s = time.perf_counter()
    users = [_User(i, num_turns, start_s + i * STAGGER_S / number) for i in range(number)]
    clocks, gaps, sound_s = [], [], 0.0
    while any(user.left or user.session for user in users):
        for user in users:
            user.speak(engine, questions, options)
        if not engine.step():
            time.sleep(0.001)  # until somebody says more
        for user in users:
            if user.listen() and user.chunks:
                clocks.append(user.chunks[0][0])
                gaps += _gaps(user.chunks)
                sound_s += sum(seconds for _, seconds in user.chunks)
    seconds = time.perf_counter() - start_s
    return {
        "users": number,
        "replies_per_s": number * num_turns / seconds,
        "sound_s_per_s": sound_s / seconds,
        **_percentiles(clocks or [0.0]),
        "gaps": len(gaps),
        "gap_s": max(gaps, default=0.0),
    }


def _gaps(chunks):
    """Seconds of silence before each chunk that came late, of (time handed out, length) pairs: each
    is played when it is there and the one before it is over.
    """
    gaps, over_s = [], chunks[0][0]
    for time_s, seconds in chunks:
        if time_s > over_s:
            gaps.append(time_s - over_s)
        over_s = max(over_s, time_s) + seconds
    return gaps


def _fresh_processes(work, question):
    """Seconds of a new process up to the first sound of its first reply, by what it finds."""
    with tempfile.TemporaryDirectory() as folder:
        return {name: _fresh_s(work, question, folder) for name in ("empty cache", "warm cache")}


def _fresh_s(work, question, folder):
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_first_reply, args=(work, question, folder, there), daemon=True)
    start_s = time.perf_counter()
    process.start()
    there.close()
    try:
        here.recv()
        return time.perf_counter() - start_s
    except EOFError:
        raise RuntimeError("a new process ended before it had replied") from None
    finally:
        process.join()


def _first_reply(work, question, folder, pipe):
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    _ask(engine_of(work), question, _options(work), whole=False)
    pipe.send(None)


def _percentiles(seconds):
    p50_s, p95_s = (float(x) for x in np.percentile(seconds, (50, 95)))
    return {"p50_s": p50_s, "p95_s": p95_s}


def _about(work):
    return {"model": work.model, "dtype": work.dtype, "machine": bench.machine()}
