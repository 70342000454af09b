"""What a clip says, read off what it is embedded as: each embedding is the word that it is nearest
to, or none.

Goes in: an engine, a clip. Comes out: its words. Nothing but the audio encoder, the adapter and the
LLM's input table is used, in one pass; the LLM itself, asked to write down what it hears, takes a
pass for each token and may write what it expects to hear instead. Read next: `losses.word_logits`,
by which stage 2.1b drew the embeddings to words.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vita_jax.data.collate import bucket
from vita_jax.losses import ctc_read, word_logits
from vita_jax.models.vita import Vita


def transcribe(engine, audio) -> str:
    """The words of a clip. Arguments and errors as for `Engine.transcribe`."""
    if not engine.config.audio.aligned:
        raise ValueError(
            f"{engine.config.name}: what it hears is not embedded as words that could be read off; "
            'train stage 2.1b with objective="align", or ask it to write down what it hears'
        )
    banks = engine.processor.clip(audio, rng=None)
    padded = np.zeros((bucket(len(banks), 128), banks.shape[1]), np.float32)
    padded[: len(banks)] = banks
    units = np.asarray(_read(engine.config, engine.params, padded, np.int32(len(banks))))
    return engine.tokenizer.decode(units[units > 0] - 1).strip()


@functools.partial(jax.jit, static_argnums=0)
def _read(config, params, banks, num_frames):
    """int32[T]: token + 1 where a word is heard, then zeros; of float32[A, M] `banks`, of which
    `num_frames` are real.
    """
    variables, num_prompts = {"params": params}, config.audio.num_prompts
    mask = jnp.arange(len(banks)) < num_frames
    args = banks[None, None], mask[None, None]
    embeddings, counts = Vita(config).apply(variables, *args, method="encode_audio")
    logits = word_logits(embeddings[0, :, num_prompts:], params["llm"]["embedding"])
    return ctc_read(logits, counts[0] - num_prompts)[0]
