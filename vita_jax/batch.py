"""Every array that enters the model, with its shape. The loader makes it, training and inference
read it.

Axis letters, the same everywhere: B batch; T, S query and key position; D embed_dim; N, K query and
kv heads; H head_dim; F mlp_dim; V vocabulary; L layers; I tiles and U utterances of a row; P
embeddings per tile; A, M audio frames and mel bins; X text ids for the voice; Q codebooks; W, C
waveform samples and channels.
"""

from __future__ import annotations

import typing

import flax.struct

if typing.TYPE_CHECKING:
    import jax

# Placeholder ids, never looked up in the embedding table; the values are the release's.
IMAGE_TOKEN = -200
AUDIO_TOKEN = -500
TEXT_TOKEN = -300  # ours: a piece of a text embedding, in what the speech decoder reads


@flax.struct.dataclass
class Batch:
    """One batch. A modality absent from the whole batch is None; absent from a row, it is masked.

    Placeholders are already repeated: one IMAGE_TOKEN for each embedding of each tile, one
    AUDIO_TOKEN for each embedding of each clip. Tiles and clips fill their row from the front, in
    the order of the placeholders.

    Attributes:
      tokens: int32[B, T] text ids and placeholder ids; padding is 0.
      positions: int32[B, T] index of each token in its conversation.
      segment_ids: int32[B, T] 1, 2, ... for the conversations packed in a row, 0 is padding.
      loss_mask: float32[B, T] 1 where the token is a target.
      tiles: float32[B, I, px, px, 3] normalised pixels, or None.
      tile_mask: bool[B, I] True where a tile is real, or None.
      audio: float32[B, U, A, M] log-mel filter banks, 10 ms a frame, before CMVN, or None.
      audio_mask: bool[B, U, A] True where a frame is real, or None.
      text: int32[B, X] the words that are spoken, where `tokens` are what the speech decoder reads:
        of each utterance BOS, a TEXT_TOKEN for each piece of a text embedding, SOS, codec tokens,
        EOS. Else None.
      text_segment_ids: int32[B, X] the utterance of each, as in `segment_ids`, or None.
      waveform: float32[B, 2, W] two pieces of a clip, 24 kHz, the first with a token for each codec
        token that it makes (their ids are not known yet: 0), or None.
    """

    tokens: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    loss_mask: jax.Array
    tiles: jax.Array | None = None
    tile_mask: jax.Array | None = None
    audio: jax.Array | None = None
    audio_mask: jax.Array | None = None
    text: jax.Array | None = None
    text_segment_ids: jax.Array | None = None
    waveform: jax.Array | None = None
