"""vita_jax/infer/engine.py: one turn and several, whole and streamed, on one device and more."""

import dataclasses

import jax
import numpy as np
import PIL.Image
import pytest

from vita_jax import sharding
from vita_jax.config import vita_tiny
from vita_jax.data.collate import collate
from vita_jax.data.processor import Processor, Turn
from vita_jax.data.tokenizer import load_bundled
from vita_jax.infer import engine as engines
from vita_jax.infer import session as sessions
from vita_jax.infer import voice
from vita_jax.infer.engine import AudioChunk, Done, Engine, TextDelta
from vita_jax.infer.sampling import Sampler
from vita_jax.models.codec import fold_weight_norm
from vita_jax.models.vita import Vita, boxed_shapes, init_params

PICTURE = PIL.Image.fromarray(np.arange(60 * 40 * 3, dtype=np.uint8).reshape(40, 60, 3))
SOUND = (0.1 * np.sin(np.arange(9000) / 7).astype(np.float32), 16000)


def make_engine(mesh=None, chunk_size=-1, **options):
    config = vita_tiny()
    audio = dataclasses.replace(config.audio, chunk_size=chunk_size)
    config = dataclasses.replace(config, audio=audio)
    params = init_params(config, 0)
    params["codec"] = fold_weight_norm(params["codec"])
    config = dataclasses.replace(config, codec=dataclasses.replace(config.codec, weight_norm=False))
    if mesh is not None:
        params = jax.device_put(params, sharding.param_shardings(boxed_shapes(config), mesh))
    else:
        params = jax.device_put(params)
    return Engine(config, params, load_bundled("vita_tiny"), mesh, **options)


@pytest.fixture(scope="module")
def engine():
    return make_engine()


@pytest.fixture(autouse=True)
def short_speech(monkeypatch):
    monkeypatch.setattr(voice, "MAX_CODES", 60)


def ask(engine, text=None, images=(), audio=None, **options):
    """A session whose turn is whole, not yet answered."""
    options = {"speak": False, "max_new_tokens": 8} | options
    session = engine.session(**options)
    engine._push(session, Turn(text, images, audio))
    return session


def tokens_of(engine, *sessions):
    """The tokens that are written to each, the stop token included."""
    replies = [session.reply for session in sessions]
    while any(session.reply for session in sessions):
        assert engine.step()
    assert all(isinstance(session.events[-1], Done) for session in sessions)
    return [reply.tokens for reply in replies]


@pytest.fixture
def num_read(monkeypatch):
    """Counts the embeddings that are read into rows, by call."""
    counts, read = [], engines.read

    def counted(*args):
        counts.append(args[-1])
        return read(*args)

    monkeypatch.setattr(engines, "read", counted)
    return counts


def test_everything_at_once(engine):
    wild = Sampler(temperature=2.0)  # random weights: the likeliest bytes alone need not be words
    events = list(engine.stream("What?", [PICTURE], SOUND, max_new_tokens=30, sampler=wild))
    assert isinstance(events[-1], Done) and sum(isinstance(e, Done) for e in events) == 1
    reply = events[-1].reply
    assert reply.text == "".join(e.text for e in events if isinstance(e, TextDelta))
    chunks = [e for e in events if isinstance(e, AudioChunk)]
    np.testing.assert_array_equal(reply.audio, np.concatenate([c.samples for c in chunks]))
    assert len(reply.audio) and np.abs(reply.audio).max() <= 1
    c = engine.config
    assert reply.seen.num_audio_embeddings == c.audio.num_embeddings(reply.seen.num_audio_frames)
    assert reply.seen.num_tile_embeddings == reply.seen.num_tiles * c.vision.embeddings_per_tile
    assert reply.times_s["first token"] <= reply.times_s["first sound"] <= reply.times_s["done"]


def test_greedy_tokens_are_the_arg_max_of_the_whole_pass(engine):
    example = engine.processor.prompt("Hello", [PICTURE], SOUND)
    (tokens,) = tokens_of(engine, ask(engine, "Hello", [PICTURE], SOUND, max_new_tokens=6))
    batch = collate([example])
    length = len(example.tokens)
    ids = np.zeros((1, batch.tokens.shape[1] + 16), np.int32)
    ids[0, :length] = example.tokens
    ids[0, length : length + len(tokens)] = tokens
    positions = np.arange(ids.shape[1], dtype=np.int32)[None]
    batch = batch.replace(
        tokens=ids, positions=positions, segment_ids=np.ones_like(ids), loss_mask=None
    )
    logits = jax.jit(lambda b: Vita(engine.config).apply({"params": engine.params}, b))(batch)
    expected = np.asarray(logits)[0, length - 1 : length - 1 + len(tokens)].argmax(-1)
    np.testing.assert_array_equal(tokens, expected)
    assert len(set(tokens)) > 1


def said(engine):
    """Tokens, codes and waveform of a reply that says more than its text."""
    options = {"speak": True, "sampler": Sampler(temperature=1.0), "seed": 2}
    session = ask(engine, "Hello", [PICTURE], SOUND, **options)
    reply, codes, push = session.reply, [], session.reply.speaker.push
    # How many calls draw nothing more, because the last results are not known yet, is up to chance.
    reply.speaker.push = lambda new: (codes.extend(new[new >= 0]), push(new))
    reply.speaker.segments.append("hello there")
    (tokens,) = tokens_of(engine, session)
    return tokens, codes, session.events[-1].reply.audio


def test_two_devices_say_the_same(engine):
    (tokens, codes, audio), together = said(engine), make_engine(sharding.make_mesh((1, 1, 2)))
    sharded = "tensor" in together._text.cache.k.sharding.spec
    assert sharded and together.params["llm"]["blocks"]["mlp"]["up"].sharding.num_devices > 1
    theirs = said(together)
    assert (tokens, codes) == theirs[:2] and len(tokens) > 1 and len(codes) > 20
    np.testing.assert_allclose(theirs[2], audio, atol=1e-4)


def test_four_devices_say_the_same(engine):
    asked = {"text": "Hello", "images": [PICTURE], "audio": SOUND, "max_new_tokens": 8}
    alone, together = engine.chat(**asked), make_engine(sharding.make_mesh((1, 2, 2))).chat(**asked)
    assert together.text == alone.text
    np.testing.assert_allclose(together.audio, alone.audio, atol=1e-4)


def compiled(action):
    """The programs that XLA compiles while `action` runs, by name."""
    names = []

    def listen(event, duration, fun_name="", **_):
        if event.endswith("backend_compile_duration"):
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    action()
    return names


def test_another_length_in_the_bucket_compiles_nothing():
    engine = make_engine()  # whose rows hold nothing of other tests, which need not be read again
    asked = {"images": [PICTURE], "max_new_tokens": 5, "speak": False}
    shorter = (SOUND[0][:8500], 16000)
    drawn = Sampler(0.7, 5, 0.9, 1.1)
    jax.clear_caches()  # what other tests compiled
    for audio in (SOUND, shorter, SOUND):
        engine.chat("Who is it?", audio=audio, **asked)
        engine.chat("What?", audio=audio, **asked)
    assert not compiled(lambda: engine.chat("What is this here?", audio=shorter, **asked))
    assert not compiled(lambda: engine.chat("Who?", audio=SOUND, sampler=drawn, seed=3, **asked))
    assert compiled(lambda: engine.chat("What? " * 200, **asked))  # the listener does hear


@pytest.mark.parametrize(
    "chunk_size, mesh",
    [(-1, None), (2, None), pytest.param(-1, (1, 1, 2), marks=pytest.mark.slow)],
    ids=str,
)
def test_after_warming_up_nothing_is_compiled(chunk_size, mesh):
    mesh = mesh and sharding.make_mesh(mesh)
    sizes = dict(max_tokens=980, max_new_tokens=40, num_rows=2)
    engine = make_engine(mesh, chunk_size=chunk_size, **sizes)
    engine.warm_up(1.0)
    drawn, events = Sampler(2.0, 0, 0.9, 1.1), []

    def talk():
        session = engine.session(sampler=drawn)
        for text, samples in (("Look. " * 20, 9000), ("Again?", 3000), ("And? " * 20, 16000)):
            sound = (np.resize(SOUND[0], samples), 16000)
            other = ask(engine, "What?", [PICTURE], speak=True, max_new_tokens=20, sampler=drawn)
            events.extend(engine.answer(session, text, [PICTURE], sound))
            while other.reply:
                engine.step()

    assert not compiled(talk)
    assert sum(isinstance(event, AudioChunk) for event in events) > 2
    waiting = ask(engine, "Hello")
    engine.step()
    with pytest.raises(ValueError, match="wait until it is over"):
        engine.warm_up()
    tokens_of(engine, waiting)


def test_conversations_kept_in_8_bits_are_near(engine):
    """Keys and values are off by half a step of 1/127 of the largest of their head, and by what
    that makes of them from layer to layer.
    """
    rounded = make_engine(int8_cache=True)
    for one in (engine, rounded):
        (tokens,) = tokens_of(one, ask(one, "What is it?", [PICTURE], max_new_tokens=6))
        assert len(tokens) > 1
    exact, near = engine._text.cache, rounded._text.cache
    assert near.k.dtype == near.v.dtype == np.int8
    read = np.s_[:, 0, : len(engine._rows[0].keys) - 6]
    for expected, values, scale in zip((exact.k, exact.v), (near.k, near.v), near.scales):
        expected, got = expected[read], values[read] * scale[read]
        error = np.abs(got - expected).max() / np.abs(expected).max()
        assert 0.001 < error < 0.03


def test_rows_join_and_leave(engine):
    """More questions than rows, of different lengths, asked one after the other while others are
    being answered: each gets what it gets alone.
    """
    several = make_engine(num_rows=2)
    asked = [
        dict(text="Hello", max_new_tokens=3),
        dict(text="What is it?", images=[PICTURE], max_new_tokens=11),
        dict(audio=SOUND, sampler=Sampler(temperature=1.0), seed=3, max_new_tokens=6),
        dict(text="Why? " * 30, max_new_tokens=7),
        dict(text="And?", sampler=Sampler(temperature=1.0, penalty=2.0), seed=3),
    ]
    alone = [tokens_of(engine, ask(engine, **one))[0] for one in asked]
    sessions = [ask(several, **one) for one in asked[:3]]
    replies = [session.reply for session in sessions]
    for one in asked[3:]:
        for _ in range(3):
            several.step()
        sessions.append(ask(several, **one))
        replies.append(sessions[-1].reply)
    while any(session.reply for session in sessions):
        assert several.step()
    assert [reply.tokens for reply in replies] == alone
    assert len({tuple(tokens) for tokens in alone}) == len(alone)
    while several._results:  # dispatched ahead of what was known to be needed
        several.step()
    assert not several.step()


def test_voices_do_not_mix(engine):
    several = make_engine(num_rows=3)
    asked = dict(speak=True, sampler=Sampler(temperature=2.0), max_new_tokens=12)
    alone = [engine.chat("Hi", seed=seed, **asked) for seed in range(3)]
    sessions = [ask(several, "Hi", seed=seed, **asked) for seed in range(3)]
    tokens_of(several, *sessions)
    for session, one in zip(sessions, alone):
        reply = session.events.pop().reply
        assert reply.text == one.text
        np.testing.assert_allclose(reply.audio, one.audio, atol=1e-4)
    assert sum(len(one.audio) > 0 for one in alone) > 1


def test_cancelling_frees_the_row_at_once(engine):
    first = ask(engine, "Hello", max_new_tokens=200, sampler=Sampler(temperature=1.0))
    second = ask(engine, "What?")
    while not any(isinstance(event, TextDelta) for event in first.events):
        engine.step()
    assert first.row == 0 and second.row is None  # there is one row only
    first.cancel()
    engine.step()
    assert first.row is None and second.row == 0
    reply = first.events[-1].reply
    assert reply.cancelled and reply.text
    (tokens,) = tokens_of(engine, second)
    assert tokens == tokens_of(engine, ask(engine, "What?"))[0]
    first.push_text("Go on.")  # what was said before is part of the conversation
    first.end_of_speech()
    tokens_of(engine, first)
    assert first.events[-1].reply.seen.num_text_tokens > len(engine.tokenizer.encode(reply.text))


def test_what_comes_before_the_sound_is_read_while_it_arrives(engine, num_read):
    at_once = engine.chat("Look.", [PICTURE], SOUND, speak=False, max_new_tokens=8)
    num_read.clear()
    session = engine.session(speak=False, max_new_tokens=8)
    engine.write([Turn("Something else, so that the row holds nothing of use")], 2)
    num_read.clear()
    session.push_text("Look.")
    session.push_image(PICTURE)
    for start in range(0, 9000, 3000):
        session.push_audio(SOUND[0][start : start + 3000])
        while engine.step():
            pass
    before = sum(num_read)
    session.end_of_speech()
    tokens_of(engine, session)
    reply = session.events[-1].reply
    assert (reply.text, reply.seen) == (at_once.text, at_once.seen)
    after = sum(num_read) - before
    assert after < reply.seen.num_audio_embeddings + 20 < before


def test_sound_is_heard_in_pieces_by_a_model_that_was_trained_so():
    engine = make_engine(chunk_size=4)
    whole, state = engines.Media(None, 0), None
    session = engine.session(speak=False)
    for start in range(0, 9000, 700):
        session.push_audio(SOUND[0][start : start + 700])
        while engine.step():
            pass
        state = session.clip
    assert 0 < state.size < engine.config.audio.num_embeddings(54)
    session.end_of_speech()
    (tokens,) = tokens_of(engine, session)
    whole = engines.Media(engine.processor.clip(SOUND, None), 0)
    expected = np.asarray(engine._embeddings(whole))[: state.size]
    assert state.size == engine.config.audio.num_embeddings(len(whole.source))
    np.testing.assert_allclose(np.asarray(state.rows)[: state.size], expected, atol=1e-5)


def test_a_new_turn_reads_only_what_is_new(engine, num_read):
    session = engine.session(speak=False, max_new_tokens=4)
    for text in ("My name is Ann.", "What is my name?"):
        num_read.clear()
        session.push_text(text)
        if len(text) == 15:
            session.push_image(PICTURE)
        session.end_of_speech()
        tokens_of(engine, session)
    second = session.events[-1].reply
    said = len(engine.tokenizer.encode(second.turn.text))
    assert said < sum(num_read) < said + 60 < len(session.prompt().tokens)
    first = session.events[[type(e) for e in session.events].index(Done)].reply
    fresh = make_engine().chat(
        "What is my name?", history=[first.turn], speak=False, max_new_tokens=4
    )
    assert (second.text, second.seen) == (fresh.text, fresh.seen)


def test_the_oldest_turns_are_forgotten_whole():
    engine = make_engine(max_tokens=900, max_new_tokens=4, num_rows=2)
    session, turns = engine.session(speak=False), []
    lengths = Processor(engine.config, engine.tokenizer)
    for i in range(8):
        session.push_text(f"{i}: " + "so it is " * 8)
        session.end_of_speech()
        tokens_of(engine, session)
        reply = session.events[-1].reply
        turns.append(reply.turn)
        kept = [lengths.prompt(turns[i].text, history=turns[n:i]) for n in range(i + 1)]
        assert reply.seen.num_text_tokens in [len(one.tokens) for one in kept]
        if reply.seen.num_text_tokens != len(kept[0].tokens):
            break
    left = [len(one.tokens) for one in kept].index(reply.seen.num_text_tokens)
    assert 0 < left <= i
    last = turns[-1]
    fresh = make_engine(max_tokens=900, max_new_tokens=4, num_rows=2)
    again = fresh.chat(last.text, history=turns[left:-1], speak=False)
    assert again.text == reply.text
    np.testing.assert_array_equal(engine._rows[0].keys, fresh._rows[0].keys)
    for name in ("k", "v"):
        ours, theirs = (getattr(one._text.cache, name) for one in (engine, fresh))
        read = np.s_[:, 0, : reply.seen.num_text_tokens]
        np.testing.assert_allclose(ours[read], theirs[read], atol=1e-5)


def test_a_long_conversation_takes_no_more_memory_or_work(num_read):
    engine = make_engine(max_tokens=980, max_new_tokens=3, num_rows=2)
    session, most = engine.session(speak=False), []
    for number in range(60):
        num_read.clear()
        session.push_text(f"This is turn {number:02}.")
        if number % 3 == 0:
            session.push_image(PICTURE)
        if number % 2:
            session.push_audio(SOUND[0])
        session.end_of_speech()
        while session.reply:
            engine.step()
        session.events.clear()
        most.append((len(session._history), len(jax.live_arrays()), sum(num_read)))
    early, late = (np.max(part, axis=0) for part in (most[:30], most[30:]))
    assert 1 < late[0] < 20
    assert (late <= 1.1 * early + 4).all()


def test_history_is_part_of_the_prompt(engine):
    first = engine.chat("My name is Ann.", max_new_tokens=4, speak=False)
    assert first.audio is None
    second = engine.chat("What is my name?", history=[first.turn], max_new_tokens=4, speak=False)
    alone = engine.chat("What is my name?", max_new_tokens=4, speak=False)
    extra = len(engine.tokenizer.encode("My name is Ann.")) + len(
        engine.tokenizer.encode(first.turn.reply)
    )
    assert second.seen.num_text_tokens > alone.seen.num_text_tokens + extra


def test_seed_decides_what_is_drawn(engine):
    asked = {"max_new_tokens": 12, "speak": False, "sampler": Sampler(temperature=1.0)}
    assert engine.chat("Hi", seed=1, **asked).text == engine.chat("Hi", seed=1, **asked).text
    assert engine.chat("Hi", seed=1, **asked).text != engine.chat("Hi", seed=2, **asked).text


def test_repetition_penalty_repeats_less(engine):
    (plain,) = tokens_of(engine, ask(engine, "Hello", max_new_tokens=40))
    fewer = ask(engine, "Hello", max_new_tokens=40, sampler=Sampler(penalty=5.0))
    assert len(set(tokens_of(engine, fewer)[0])) > len(set(plain))


def test_stop_tokens_end_the_reply(engine, monkeypatch):
    (tokens,) = tokens_of(engine, ask(engine, "Hello"))
    stop = next(t for t in tokens[1:] if t != tokens[0])
    monkeypatch.setattr(engine, "stop_ids", frozenset([stop]))
    monkeypatch.setattr(engine, "_stops", np.array([stop] * len(engine._stops), np.int32))
    assert tokens_of(engine, ask(engine, "Hello"))[0] == tokens[: tokens.index(stop) + 1]


def test_state_token_is_told_apart_from_the_text(engine):
    session = ask(engine, "Hello")
    ids = [engine.tokenizer.state_ids["noise"], *engine.tokenizer.encode("ok.")]
    for i, token in enumerate(ids):
        session.reply.push_token(token, i + 1 == len(ids))
    reply = session.reply.finished()
    assert (reply.state, reply.text, reply.turn.reply) == ("noise", "ok.", "☟ok.")
    session.cancel()
    engine.step()


def test_first_segment_is_spoken_before_the_text_ends(engine):
    session = ask(engine, "Hello", speak=True, max_new_tokens=400)
    while not session.reply.begun:
        engine.step()
    for token in engine.tokenizer.encode("Hello there. "):
        session.reply.push_token(token, False)
    while session.reply:
        engine.step()
    kinds = [type(event) for event in session.events]
    assert kinds.index(AudioChunk) < len(kinds) - 1 - kinds[::-1].index(TextDelta)


def test_gaps_in_what_is_heard(engine, monkeypatch):
    """Pieces of 1 s, handed out by a clock that the test sets."""
    clock = {"s": 100.0}
    monkeypatch.setattr(sessions.time, "perf_counter", lambda: clock["s"])
    session = ask(engine, "Hello", speak=True)
    reply, second = session.reply, np.zeros(engine.config.codec.sample_rate_hz, np.float32)
    reply.speaker.speaking = True
    assert reply.hungry(0.5)
    for clock["s"] in (102.0, 102.9, 104.25, 104.5):
        reply.push_sound(second)
        assert not reply.hungry(0.5)
    clock["s"] = 105.9
    assert reply.hungry(0.5)  # 0.35 s are left: the gap has put off the end
    assert reply.finished().gaps_s == (0.0, 0.25, 0.0)
    session.cancel()
    engine.step()


def test_a_turn_that_cannot_be_answered(engine):
    session = engine.session(speak=False)
    with pytest.raises(ValueError, match="nothing in it"):
        session.end_of_speech()
    with pytest.raises(ValueError, match="finite"):
        session.push_audio(np.full(400, np.nan))
    with pytest.raises(ValueError, match="s of sound in a turn"):
        session.push_audio(np.zeros(40 * 60 * 16000, np.float32))
    session.push_audio(np.zeros(200, np.float32))
    with pytest.raises(ValueError, match="too short to hear"):
        session.end_of_speech()
    session.push_audio(SOUND[0])
    session.end_of_speech()
    with pytest.raises(ValueError, match="being answered"):
        session.end_of_speech()
    tokens_of(engine, session)


def test_speaking_needs_a_voice(engine):
    mute = Engine(dataclasses.replace(engine.config, speech=None), engine.params, engine.tokenizer)
    with pytest.raises(ValueError, match="speak=False"):
        mute.chat("Hello")
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        engine.chat("Hello", max_new_tokens=0)
