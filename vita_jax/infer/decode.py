"""Compiled steps of the two decoders, over the rows of the engine.

A row is a conversation (text) or a piece of text being spoken (speech); rows begin and end on their
own while the others go on. Every function is compiled once for each bucket of lengths; sampling
happens on the device, its settings are arrays. State goes in and comes out; it is donated, so
caches are updated in place. Read next: `engine.py`.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from vita_jax.batch import Batch
from vita_jax.config import VitaConfig
from vita_jax.infer.sampling import MAX_WINDOW, penalize, penalize_seen, sample
from vita_jax.models.layers import Cache
from vita_jax.models.llm import init_llm_cache
from vita_jax.models.speech import init_speech_cache
from vita_jax.models.vita import Vita


@flax.struct.dataclass
class TextState:
    """Conversations, one a row.

    Attributes:
      token: int32[B] drawn last.
      left: int32[B] tokens that may still be drawn; 0 once a stop token was, or nothing is written.
      cache: of the conversation up to, not with, `token`.
      seen: bool[B, V] tokens of the conversation, for the repetition penalty.
      key: keys [B] of the draws; each draw uses the one of its position.
      sampling: `Sampler.arrays()`, [B] each.
    """

    token: jax.Array
    left: jax.Array
    cache: Cache
    seen: jax.Array
    key: jax.Array
    sampling: dict


def in_place(tree):
    """The arrays where they always are on a mesh, or a program would be compiled again for each
    place that the compiler finds for them: caches spread by their heads, all else on every device.
    """

    def place(x):
        spread = ("layers", "batch", "seq", "kv_heads", "head_dim")
        return nn.with_logical_constraint(x, spread if x.ndim == 5 else (None,) * x.ndim)

    return jax.tree.map(place, tree)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), static_argnames="int8")
def init_text(
    config: VitaConfig, num_rows: int, num_slots: int, sampling, int8: bool = False
) -> TextState:
    """Empty rows of `num_slots` tokens each; `sampling` as `Sampler.arrays()`, `int8` as in
    `init_cache`.
    """
    state = TextState(
        token=jnp.zeros(num_rows, jnp.int32),
        left=jnp.zeros(num_rows, jnp.int32),
        cache=init_llm_cache(config.llm, num_rows, num_slots, int8),
        seen=jnp.zeros((num_rows, config.llm.vocab_size), bool),
        key=jax.random.split(jax.random.key(0), num_rows),
        sampling={name: jnp.broadcast_to(x, num_rows) for name, x in sampling.items()},
    )
    return in_place(state)


@functools.partial(jax.jit, static_argnums=0)
def embed_prompt(config: VitaConfig, params, batch: Batch):
    """dtype[B, T, D]: whole prompts as embeddings, pictures and sound included."""
    return Vita(config).apply({"params": params}, batch, method="embed")


@functools.partial(jax.jit, static_argnums=0)
def embed_text(config: VitaConfig, params, tokens):
    """dtype[1, T, D]: embeddings of int32[T] ids; where there are placeholders, of id 0."""
    out = Vita(config).apply({"params": params}, tokens[None], method=lambda m, t: m.llm.embed(t))
    return in_place(out)


@functools.partial(jax.jit, static_argnums=0)
def encode_tile(config: VitaConfig, params, tile):
    """dtype[P, D]: embeddings of float32[px, px, 3] normalised pixels."""
    out = Vita(config).apply({"params": params}, tile[None, None], method="encode_tiles")
    return in_place(out[0, 0])


@functools.partial(jax.jit, static_argnums=0)
def encode_clip(config: VitaConfig, params, frames, num_frames):
    """dtype[S, D]: embeddings of a whole clip, float32[A, M] of which int32[] frames are real."""
    real = jnp.arange(frames.shape[0]) < num_frames
    args = frames[None, None], real[None, None]
    out, _ = Vita(config).apply({"params": params}, *args, method="encode_audio")
    return in_place(out[0, 0])


@functools.partial(jax.jit, static_argnums=(0, 1))
def encode_piece(config: VitaConfig, final: bool, params, frames, state):
    """dtype[S, D]: the embeddings that float32[A, M], the next frames of a clip, complete, and the
    next `AudioState`. For models with a chunk mask; `Audio.stream` says which pieces it takes.
    """

    def read(model, frames, state):
        return model.audio.stream(frames, state, final)

    out, state = Vita(config).apply({"params": params}, frames[None], state, method=read)
    return in_place((out[0], state))


@functools.partial(jax.jit, static_argnums=0)
def audio_prompts(config: VitaConfig, params):
    """dtype[P, D]: the trained embeddings in front of every clip."""
    return Vita(config).apply({"params": params}, method=lambda m: m.audio.prompt_embeddings(1))[0]


@functools.partial(jax.jit, donate_argnums=0)
def splice(embeddings, rows, first, at, number):
    """dtype[1, T, D] `embeddings` with `number` of `rows` dtype[S, D], from the one with index
    `first`, written from position `at` on.
    """
    index = jnp.arange(embeddings.shape[1]) - at
    chosen = rows[jnp.clip(first + index, 0, len(rows) - 1)].astype(embeddings.dtype)
    inside = (index >= 0) & (index < number)
    return in_place(jnp.where(inside[None, :, None], chosen[None], embeddings))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def read(config: VitaConfig, num_seen: int, params, state: TextState, row, embeddings, start, num):
    """Reads the next part of a conversation into its row.

    Args:
      config: of the model.
      num_seen: slots of the row that are looked at, `start` + T or more.
      params: of the model.
      state: the rows.
      row: int32[] whose conversation it is.
      embeddings: dtype[1, T, D], right-padded.
      start: int32[] tokens that were read before and stay.
      num: int32[] embeddings that are real.

    Returns:
      the rows, and dtype[D] what the LLM makes of the last embedding.
    """
    whole, at = state.cache.replace(length=None), (0, row, 0, 0, 0)

    def of_row(x):
        return jax.lax.dynamic_slice(x, at, (x.shape[0], 1, num_seen, *x.shape[3:]))

    cache = jax.tree.map(of_row, whole).replace(length=jnp.full(1, start))
    t = embeddings.shape[1]
    positions = start + jnp.arange(t)[None]
    hidden, cache = _llm(config, params, embeddings, positions, cache.causal_mask(t), cache)
    cache = jax.tree.map(
        lambda x, new: jax.lax.dynamic_update_slice(x, new, at), whole, cache.replace(length=None)
    )
    length = state.cache.length.at[row].set(start + num)
    state = state.replace(cache=cache.replace(length=length))
    return in_place((state, hidden[0, num - 1]))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def begin_text(
    config: VitaConfig, params, state: TextState, row, hidden, tokens, key, left, sampling, stops
):
    """Draws the first token of a reply.

    Args:
      config: of the model.
      params: of the model.
      state: the rows.
      row: int32[] in which the whole prompt was read.
      hidden: dtype[D] what `read` gave last.
      tokens: int32[T] ids of the prompt, below 0 where there are none.
      key: PRNG key of the request.
      left: int32[] tokens that may be drawn.
      sampling: `Sampler.arrays()` of the request.
      stops: int32[n] ids that end a reply.

    Returns:
      the rows and int32[] the token.
    """
    seen = jnp.zeros((1, config.llm.vocab_size), bool)
    seen = seen.at[0, jnp.maximum(tokens, 0)].max(tokens >= 0)
    one = {name: x[None] for name, x in sampling.items()}
    token = _draw(
        config, params, hidden[None], state.cache.length[row][None], seen, key[None], one
    )[0]
    state = TextState(
        token=state.token.at[row].set(token),
        left=state.left.at[row].set(jnp.where((token == stops).any(), 0, left - 1)),
        cache=state.cache,
        seen=state.seen.at[row].set(seen[0].at[token].set(True)),
        key=state.key.at[row].set(key),
        sampling={name: x.at[row].set(sampling[name]) for name, x in state.sampling.items()},
    )
    return in_place((state, token))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def next_text(
    config: VitaConfig, num_seen: int, num_tokens: int, params, state: TextState, running, stops
):
    """Writes on, in the rows that are `running` and may still draw.

    Args:
      config: of the model.
      num_seen: slots of a row that are looked at.
      num_tokens: tokens to draw in this call.
      params: of the model.
      state: the rows.
      running: bool[B].
      stops: int32[n] ids that end a reply.

    Returns:
      the rows and int32[num_tokens, B], -1 where nothing was drawn.
    """

    def step(state, _):
        live = running & (state.left > 0)
        x = Vita(config).apply(
            {"params": params}, state.token[:, None], method=lambda m, t: m.llm.embed(t)
        )
        cache = state.cache
        mask = cache.causal_mask(1, num_seen)
        hidden, cache = _llm(config, params, x, cache.length[:, None], mask, cache)
        cache = cache.replace(length=state.cache.length + live)
        drawn = hidden[:, 0], cache.length, state.seen, state.key, state.sampling
        token = jnp.where(live, _draw(config, params, *drawn), state.token)
        left = jnp.where((token[:, None] == stops).any(axis=1), 0, state.left - 1)
        state = state.replace(
            token=token,
            left=jnp.where(live, left, state.left),
            cache=cache,
            seen=state.seen.at[jnp.arange(len(token)), token].max(live),
        )
        return state, jnp.where(live, token, -1)

    return in_place(jax.lax.scan(step, state, length=num_tokens))


def _llm(config, params, *args):
    return Vita(config).apply({"params": params}, *args, method=lambda m, *a: m.llm(*a))


def _draw(config, params, hidden, number, seen, key, sampling):
    """int32[B] tokens drawn from the logits of `hidden`; `number` int32[B] of each in its row."""
    logits = Vita(config).apply({"params": params}, hidden, method=lambda m, x: m.llm.logits(x))
    logits = penalize_seen(logits, seen, sampling["penalty"])
    return sample(jax.vmap(jax.random.fold_in)(key, number), logits, sampling)


@flax.struct.dataclass
class SpeechState:
    """Pieces of text being spoken, one a row.

    Attributes:
      code: int32[B] drawn last, `sos_id` before the first.
      recent: int32[B, R] the codes before the next draw, newest last, -1 where there is none yet.
      left: int32[B] codes that may still be drawn; 0 once EOS was, or nothing is spoken.
      cache: of the AR decoder up to, not with, `code`.
      key: keys [B] of the draws.
      sampling: `Sampler.arrays()`, [B] each.
    """

    code: jax.Array
    recent: jax.Array
    left: jax.Array
    cache: Cache
    key: jax.Array
    sampling: dict


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def init_speech(config: VitaConfig, num_rows: int, num_slots: int, sampling) -> SpeechState:
    """Silent rows of `num_slots`: 1 for BOS, `speech_frames_per_token` a token, 1 for SOS and 1 a
    code. `sampling` as `Sampler.arrays()`.
    """
    state = SpeechState(
        code=jnp.zeros(num_rows, jnp.int32),
        recent=jnp.full((num_rows, MAX_WINDOW), -1, jnp.int32),
        left=jnp.zeros(num_rows, jnp.int32),
        cache=init_speech_cache(config.speech, num_rows, num_slots),
        key=jax.random.split(jax.random.key(0), num_rows),
        sampling={name: jnp.broadcast_to(x, num_rows) for name, x in sampling.items()},
    )
    return in_place(state)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def begin_speech(
    config: VitaConfig, params, state: SpeechState, row, tokens, num, key, left, sampling
):
    """Reads a piece of text with the NAR decoder and prepares the AR decoder.

    Args:
      config: of the model.
      params: of the model.
      state: the rows.
      row: int32[] that speaks it.
      tokens: int32[T] text, right-padded.
      num: int32[] real tokens.
      key: PRNG key.
      left: int32[] codes that may be drawn.
      sampling: `Sampler.arrays()`.
    """
    n = config.speech_frames_per_token
    real = jnp.arange(tokens.shape[0] * n)[None] < num * n
    empty = init_speech_cache(config.speech, 1, state.cache.k.shape[2])

    def read(model, tokens):
        return model.speech.prefill(model.text_pieces(tokens), real, empty)

    one = Vita(config).apply({"params": params}, tokens[None], method=read)
    first = jnp.int32(config.speech.sos_id)
    state = SpeechState(
        code=state.code.at[row].set(first),
        recent=state.recent.at[row].set(jnp.full(MAX_WINDOW, -1).at[-1].set(first)),
        left=state.left.at[row].set(left),
        cache=Cache(
            k=state.cache.k.at[:, row].set(one.k[:, 0]),
            v=state.cache.v.at[:, row].set(one.v[:, 0]),
            length=state.cache.length.at[row].set(one.length[0]),
        ),
        key=state.key.at[row].set(key),
        sampling={name: x.at[row].set(sampling[name]) for name, x in state.sampling.items()},
    )
    return in_place(state)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def next_speech(config: VitaConfig, num_seen: int, num_codes: int, params, banned, state, running):
    """Draws the next codes, in the rows that are `running` and have not ended.

    Args:
      config: of the model.
      num_seen: slots of a row that are looked at.
      num_codes: codes to draw in this call.
      params: of the model.
      banned: bool[V] ids that are never drawn.
      state: the rows.
      running: bool[B].

    Returns:
      the rows and int32[num_codes, B]: `eos_id` where a piece ends, -1 where nothing was drawn.
    """
    eos_id = config.speech.eos_id

    def step(state, _):
        live = running & (state.left > 0)
        args = state.code, state.cache, num_seen
        logits, cache = Vita(config).apply(
            {"params": params}, *args, method=lambda m, *a: m.speech.step(*a)
        )
        cache = cache.replace(length=state.cache.length + live)
        penalty, window = state.sampling["penalty"], state.sampling["window"]
        logits = penalize(logits, state.recent, penalty, window)
        logits = jnp.where(banned, -jnp.inf, logits)
        keys = jax.vmap(jax.random.fold_in)(state.key, cache.length)
        code = jnp.where(live, sample(keys, logits, state.sampling), state.code)
        recent = jnp.concatenate([state.recent[:, 1:], code[:, None]], axis=1)
        state = state.replace(
            code=code,
            recent=jnp.where(live[:, None], recent, state.recent),
            left=jnp.where(live, jnp.where(code == eos_id, 0, state.left - 1), state.left),
            cache=cache,
        )
        return state, jnp.where(live, code, -1)

    return in_place(jax.lax.scan(step, state, length=num_codes))


@functools.partial(jax.jit, static_argnums=0)
def decode_codes(config: VitaConfig, params, codes, num_codes, global_tokens):
    """Waveform float32[B, W] of int32[B, S] codes, of which `num_codes` int32[B] are real, in the
    voices int32[B, G].
    """
    args = codes, global_tokens, num_codes
    return Vita(config).apply({"params": params}, *args, method=lambda m, *a: m.codec.decode(*a))


@functools.partial(jax.jit, static_argnums=0)
def hear_voice(config: VitaConfig, params, waveform):
    """int32[G] global tokens, the voice, of a clip float32[W]."""

    def read(model, waveform):
        return model.codec.global_tokens(model.codec.timbre(waveform))

    return Vita(config).apply({"params": params}, waveform[None], method=read)[0]
