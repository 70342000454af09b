"""Compiled steps of the two decoders: prompt -> first token -> next token, and text -> codec
tokens.

Every function is compiled once for each bucket of lengths; sampling happens on the device, its
settings are arrays. State goes in and comes out; it is donated, so the cache is updated in place.
Read next: `engine.py`.
"""

from __future__ import annotations

import functools

import flax.struct
import jax
import jax.numpy as jnp

from vita_jax.batch import Batch
from vita_jax.config import VitaConfig
from vita_jax.infer.sampling import penalize, penalize_seen, sample
from vita_jax.models.layers import Cache
from vita_jax.models.llm import init_llm_cache
from vita_jax.models.speech import init_speech_cache
from vita_jax.models.vita import Vita


@flax.struct.dataclass
class TextState:
    """A reply being written.

    Attributes:
      token: int32[B] the token drawn last.
      cache: of the conversation up to, not with, that token.
      seen: bool[B, V] tokens of the conversation, for the repetition penalty.
      key: PRNG key of the next draw.
    """

    token: jax.Array
    cache: Cache
    seen: jax.Array
    key: jax.Array


@functools.partial(jax.jit, static_argnums=0)
def embed_prompt(config: VitaConfig, params, batch: Batch):
    """dtype[B, T, D]: the prompt as embeddings, pictures and sound included."""
    return Vita(config).apply({"params": params}, batch, method="embed")


@functools.partial(jax.jit, static_argnums=(0, 1))
def start_text(
    config: VitaConfig, num_slots: int, params, embeddings, tokens, length, key, sampling
) -> TextState:
    """Reads the prompt and draws the first token of the reply.

    Args:
      config: of the model.
      num_slots: tokens the cache has room for, prompt and reply together.
      params: of the model.
      embeddings: dtype[B, T, D], right-padded.
      tokens: int32[B, T] ids and placeholders of the prompt, right-padded with 0.
      length: int32[B] real tokens.
      key: PRNG key.
      sampling: `Sampler.arrays()`.
    """
    b, t = tokens.shape
    cache = init_llm_cache(config.llm, b, num_slots)
    positions = jnp.broadcast_to(jnp.arange(t), (b, t))
    hidden, cache = _llm(config, params, embeddings, positions, cache.causal_mask(t), cache)
    last = jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)[:, 0]
    counted = (tokens >= 0) & (jnp.arange(t) < length[:, None])
    seen = (
        jnp.zeros((b, config.llm.vocab_size), bool)
        .at[jnp.arange(b)[:, None], jnp.maximum(tokens, 0)]
        .max(counted)
    )
    return _draw(config, params, last, cache.replace(length=length), seen, key, sampling)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def next_text(config: VitaConfig, params, state: TextState, sampling) -> TextState:
    """Takes the last token into the conversation and draws the next."""
    x = Vita(config).apply(
        {"params": params}, state.token[:, None], method=lambda m, t: m.llm.embed(t)
    )
    cache = state.cache
    hidden, cache = _llm(config, params, x, cache.length[:, None], cache.causal_mask(1), cache)
    return _draw(config, params, hidden[:, 0], cache, state.seen, state.key, sampling)


def _llm(config, params, *args):
    return Vita(config).apply({"params": params}, *args, method=lambda m, *a: m.llm(*a))


def _draw(config, params, hidden, cache, seen, key, sampling):
    """The state with a token drawn from the logits of `hidden`."""
    logits = Vita(config).apply({"params": params}, hidden, method=lambda m, x: m.llm.logits(x))
    key, use = jax.random.split(key)
    logits = penalize_seen(logits, seen, sampling["penalty"])
    token = sample(use, logits, sampling["temperature"], sampling["top_k"], sampling["top_p"])
    seen = seen.at[jnp.arange(token.shape[0]), token].set(True)
    return TextState(token=token, cache=cache, seen=seen, key=key)


@flax.struct.dataclass
class SpeechState:
    """A piece of text being spoken.

    Attributes:
      code: int32[B] the code drawn last, `sos_id` before the first.
      recent: int32[B, R] the codes before the next draw, newest last, -1 where there is none yet.
      done: bool[B] True once EOS was drawn; codes after it mean nothing.
      cache: of the AR decoder up to, not with, `code`.
      key: PRNG key of the next draw.
    """

    code: jax.Array
    recent: jax.Array
    done: jax.Array
    cache: Cache
    key: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def start_speech(
    config: VitaConfig, num_slots: int, num_recent: int, params, tokens, length, key
) -> SpeechState:
    """Reads a piece of text with the NAR decoder and prepares the AR decoder.

    Args:
      config: of the model.
      num_slots: cache slots: 1 for BOS, `speech_frames_per_token` a token, 1 for SOS and 1 a code.
      num_recent: codes the repetition penalty looks back at.
      params: of the model.
      tokens: int32[B, T] text, right-padded.
      length: int32[B] real tokens.
      key: PRNG key.
    """
    b, t = tokens.shape
    n = config.speech_frames_per_token
    real = jnp.arange(t * n) < length[:, None] * n

    def read(model, tokens):
        pieces = model.text_pieces(tokens)
        return model.speech.prefill(pieces, real, init_speech_cache(config.speech, b, num_slots))

    cache = Vita(config).apply({"params": params}, tokens, method=read)
    code = jnp.full(b, config.speech.sos_id, jnp.int32)
    recent = jnp.full((b, num_recent), -1, jnp.int32).at[:, -1].set(code)
    return SpeechState(code=code, recent=recent, done=jnp.zeros(b, bool), cache=cache, key=key)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def next_speech(config: VitaConfig, num_codes: int, params, banned, state: SpeechState, sampling):
    """Draws the next `num_codes` codes.

    Args:
      config: of the model.
      num_codes: codes to draw in this call.
      params: of the model.
      banned: bool[V] ids that are never drawn.
      state: where the speech stands.
      sampling: `Sampler.arrays()`.

    Returns:
      int32[B, num_codes], `eos_id` from where the speech ends, and the next state.
    """
    c = config.speech

    def step(state, _):
        logits, cache = Vita(config).apply(
            {"params": params}, state.code, state.cache, method=lambda m, *a: m.speech.step(*a)
        )
        logits = penalize(logits, state.recent, sampling["penalty"])
        key, use = jax.random.split(state.key)
        logits = jnp.where(banned, -jnp.inf, logits)
        code = sample(use, logits, sampling["temperature"], sampling["top_k"], sampling["top_p"])
        code = jnp.where(state.done, c.eos_id, code)
        recent = jnp.concatenate([state.recent[:, 1:], code[:, None]], axis=1)
        return SpeechState(
            code=code, recent=recent, done=code == c.eos_id, cache=cache, key=key
        ), code

    state, codes = jax.lax.scan(step, state, length=num_codes)
    return codes.T, state


@functools.partial(jax.jit, static_argnums=0)
def decode_codes(config: VitaConfig, params, codes, num_codes, global_tokens):
    """Waveform float32[B, W] of int32[B, S] codes, of which `num_codes` int32[B] are real, in the
    voice of int32[G] global tokens.
    """
    timbre = jnp.broadcast_to(global_tokens, (codes.shape[0], config.codec.num_global_tokens))
    return Vita(config).apply(
        {"params": params}, codes, timbre, num_codes, method=lambda m, *a: m.codec.decode(*a)
    )


@functools.partial(jax.jit, static_argnums=0)
def hear_voice(config: VitaConfig, params, waveform):
    """int32[G] global tokens, the voice, of a clip float32[W]."""

    def read(model, waveform):
        return model.codec.global_tokens(model.codec.timbre(waveform))

    return Vita(config).apply({"params": params}, waveform[None], method=read)[0]
