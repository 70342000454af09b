"""What a reply attends to: the attention of its tokens over the picture, the sound and the words.

Goes in: an engine and a turn that it has answered. Comes out: the weights themselves, by layer and
head, computed by the model's own parts, layer by layer. Read next: `models/layers.py`.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import numpy as np

from vita_jax.batch import AUDIO_TOKEN, IMAGE_TOKEN
from vita_jax.config import LlmConfig
from vita_jax.data.collate import collate
from vita_jax.data.processor import Turn
from vita_jax.infer.decode import embed_prompt
from vita_jax.models.attention import conversation_mask, probabilities
from vita_jax.models.layers import GatedBlock, RMSNorm, project


@dataclasses.dataclass(frozen=True)
class Attended:
    """Where the model looked when it wrote each token of a reply.

    Attributes:
      pieces: the tokens of the reply as text, the state token first if there is one; a part of a
        character is shown as U+FFFD.
      weights: float32[R, L, N, T] for each piece the attention of the position that wrote it, one
        before its own, over the T tokens of prompt and reply; it sums to 1, and is 0 over what
        comes later.
      tokens: int32[T] ids and placeholders (`batch.py`) of prompt and reply.
      tile_embeddings: embeddings of a tile.
      audio_prompts: of the embeddings of a clip, the first so many hold no sound.
    """

    pieces: tuple[str, ...]
    weights: np.ndarray
    tokens: np.ndarray
    tile_embeddings: int
    audio_prompts: int

    def picture(self) -> np.ndarray:
        """float32[R, g, g] attention over the last tile, in which the whole of the (last) picture
        is, row by row; the mean over layers and heads.

        Raises:
          ValueError: there was no picture.
        """
        over = self._over(IMAGE_TOKEN, "picture")[:, -self.tile_embeddings :]
        edge = round(self.tile_embeddings**0.5)
        return over.reshape(-1, edge, edge)

    def sound(self) -> np.ndarray:
        """float32[R, S] attention over the clip, 80 ms an embedding; the mean over layers and
        heads.

        Raises:
          ValueError: there was no sound.
        """
        return self._over(AUDIO_TOKEN, "sound")[:, self.audio_prompts :]

    def _over(self, placeholder, what):
        at = self.tokens == placeholder
        if not at.any():
            raise ValueError(f"the turn has no {what} to attend to; give it one")
        return self.weights[..., at].mean(axis=(1, 2))


def attend(engine, turn: Turn) -> Attended:
    """What an engine attends to in a turn, the reply of which is known.

    Args:
      engine: `infer.engine.Engine`.
      turn: `Reply.turn` of the first turn of a conversation, one picture and one clip at most.

    Raises:
      ValueError: the turn has no reply.
    """
    if not turn.reply:
        raise ValueError("turn: no reply in it; take the `turn` of a Reply that says something")
    example = engine.processor.prompt(turn.text, turn.images, turn.audio, turn.video)
    ids = engine.tokenizer.encode(turn.reply)
    tokens = np.concatenate([example.tokens, np.asarray(ids, np.int32)])
    mask = np.zeros(len(tokens), np.float32)
    batch = collate([dataclasses.replace(example, tokens=tokens, loss_mask=mask)])
    embeddings = embed_prompt(engine.config, engine.params, batch)
    blocks = engine.params["llm"]["blocks"]
    _, weights = walk(engine.config.llm, blocks, embeddings, batch.positions, batch.segment_ids)
    start = len(example.tokens) - 1  # the end of the prompt writes the first token
    weights = np.asarray(weights)[:, 0, :, start : start + len(ids), : len(tokens)]
    return Attended(
        pieces=tuple(engine.tokenizer.decode([i]) for i in ids),
        weights=np.moveaxis(weights, 2, 0),
        tokens=tokens,
        tile_embeddings=engine.config.vision.embeddings_per_tile,
        audio_prompts=engine.config.audio.num_prompts,
    )


@functools.partial(jax.jit, static_argnums=0)
def walk(config: LlmConfig, blocks, x, positions, segment_ids):
    """The blocks of an LLM one after the other, with their attention.

    Args:
      config: of the LLM.
      blocks: its parameters `llm/blocks`, layers in front.
      x: dtype[B, T, D] embeddings.
      positions: int32[B, T].
      segment_ids: int32[B, T] conversations of a row, 0 is padding.

    Returns:
      dtype[B, T, D] what the last block gives, and float32[L, B, N, T, T] attention.
    """
    mask = conversation_mask(segment_ids)

    def layer(x, params):
        normed = RMSNorm(config.norm_eps).apply({"params": params["attn_norm"]}, x)
        weights = _Weights(config).apply({"params": params["attn"]}, normed, positions, mask)
        (x, _), _ = GatedBlock(config).apply({"params": params}, (x, None), 0, positions, mask)
        return x, weights

    return jax.lax.scan(layer, x, blocks)


class _Weights(nn.Module):
    """float32[B, N, T, S] weights of a `GatedAttention`, whose parameters it takes."""

    config: LlmConfig

    @nn.compact
    def __call__(self, x, positions, mask):
        q, k, _ = project(self, x, positions)
        weights = probabilities(q, k, mask)
        return weights.reshape(x.shape[0], self.config.num_heads, *weights.shape[3:])
