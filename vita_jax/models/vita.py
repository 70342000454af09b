"""Vita: the parts joined. Pictures and sound become embeddings that are written over their
placeholders.

Goes in: a `Batch`. Comes out: logits of the text. The voice (`speech`, `codec`) hangs on the same
parameter tree. Read next: `vision.py` for a picture, `audio.py` for an utterance, then `llm.py`.
"""

from __future__ import annotations

import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vita_jax import params as trees
from vita_jax.batch import AUDIO_TOKEN, IMAGE_TOKEN, Batch
from vita_jax.config import VitaConfig
from vita_jax.models.attention import Segments
from vita_jax.models.audio import Audio
from vita_jax.models.codec import Codec
from vita_jax.models.layers import ACTIVATIONS
from vita_jax.models.llm import Llm
from vita_jax.models.speech import Speech
from vita_jax.models.vision import Vision


class Vita(nn.Module):
    """See, hear, read; answer in text. Source: VITA-1.5 paper (arXiv 2501.01957), section 3.1."""

    config: VitaConfig

    def setup(self):
        c = self.config
        self.vision = Vision(c.vision)
        self.audio = Audio(c.audio)
        self.llm = Llm(c.llm)
        if c.speech is not None:
            self.speech = Speech(c.speech)
        if c.codec is not None:
            self.codec = Codec(c.codec)

    def __call__(self, batch: Batch):
        """Logits float32[B, T, V] of the token after each position."""
        return self.logits(self.hidden_states(batch))

    def hidden_states(self, batch: Batch):
        """dtype[B, T, D] after the LLM's final norm."""
        mask = Segments(batch.segment_ids)
        return self.llm(self.embed(batch), batch.positions, mask)[0]

    def logits(self, hidden):
        """float32[..., V] from dtype[..., D]."""
        return self.llm.logits(hidden)

    def state_logits(self, hidden):
        """float32[..., 3] from dtype[..., D], of a model with `llm.num_states`."""
        return self.llm.state_logits(hidden)

    def embed(self, batch: Batch):
        """dtype[B, T, D]: text embeddings, those of tiles and clips written over their
        placeholders.
        """
        tiles = None if batch.tiles is None else self.encode_tiles(batch.tiles)
        if batch.audio is None:
            return merge_embeddings(self.llm.embed(batch.tokens), batch.tokens, tiles, None, None)
        clips, counts = self.encode_audio(batch.audio, batch.audio_mask)
        return merge_embeddings(self.llm.embed(batch.tokens), batch.tokens, tiles, clips, counts)

    def encode_tiles(self, tiles):
        """dtype[B, I, P, D] from pixels float32[B, I, px, px, 3]."""
        x = self.vision(tiles.reshape(-1, *tiles.shape[2:]))
        return x.reshape(*tiles.shape[:2], *x.shape[1:])

    def encode_audio(self, audio, audio_mask):
        """dtype[B, U, S, D] embeddings of clips and int32[B, U] how many of S are real.

        Args:
          audio: float32[B, U, A, M].
          audio_mask: bool[B, U, A].
        """
        num_frames = audio_mask.sum(axis=-1)
        x = self.audio(audio.reshape(-1, *audio.shape[2:]), num_frames.reshape(-1))
        counts = jnp.where(num_frames > 0, self.config.audio.num_embeddings(num_frames), 0)
        return x.reshape(*audio.shape[:2], *x.shape[1:]), counts

    def unit_logits(self, audio, audio_mask):
        """float32[B * U, T, num_units] CTC logits of clips and int32[B * U] frames that are real.

        Arguments as for `encode_audio`.
        """
        num_frames = audio_mask.reshape(-1, audio_mask.shape[-1]).sum(axis=-1)
        logits = self.audio.unit_logits(audio.reshape(-1, *audio.shape[2:]), num_frames)
        return logits, jnp.maximum(self.config.audio.encoder_frames(num_frames), 0)

    def text_pieces(self, tokens):
        """dtype[B, T * n, D] embeddings of int32[B, T] text, each cut into n pieces: what the
        speech decoders read. Of the LLM, only the input table need be among the parameters.
        """
        table = self.variables["params"]["llm"]["embedding"]
        rows = nn.with_logical_constraint(table[tokens].astype(self.config.llm.dtype), ACTIVATIONS)
        return rows.reshape(tokens.shape[0], -1, self.config.speech.embed_dim)

    def spoken_states(self, batch: Batch):
        """dtype[B, T, D] of the speech decoders, for a batch with `text`."""
        pieces = self.text_pieces(batch.text)
        ids = jnp.repeat(batch.text_segment_ids, self.config.speech_frames_per_token, axis=1)
        return self.speech(pieces, ids, batch.tokens, batch.positions, batch.segment_ids)

    def spoken_logits(self, hidden):
        """float32[..., V] of codec tokens and special ids, from dtype[..., D]."""
        return self.speech.logits(hidden)

    def touch(self):
        """Calls every part once on the smallest input: what `init_params` initialises."""
        c = self.config
        tokens = jnp.zeros((1, 1), jnp.int32)
        pixels = jnp.zeros((1, 1, c.vision.tile_px, c.vision.tile_px, 3))
        frames, mask = jnp.zeros((1, 1, 7, c.audio.num_mel_bins)), jnp.ones((1, 1, 7), bool)
        self(Batch(tokens, tokens, tokens + 1, tokens, pixels, mask[..., 0], frames, mask))
        if c.speech is not None:
            pieces = jnp.zeros((1, 1, c.speech.embed_dim))
            self.speech.logits(self.speech(pieces, tokens + 1, tokens, tokens, tokens + 1))
        if c.codec is not None:
            codes, timbre, _ = self.codec.encode(jnp.zeros((1, 2 * c.codec.samples_per_token)))
            self.codec.decode(codes, timbre, None)


def merge_embeddings(text, tokens, tiles, clips, clip_counts):
    """Writes the embeddings of tiles and clips over their placeholders, in order.

    Args:
      text: dtype[B, T, D].
      tokens: int32[B, T] with IMAGE_TOKEN and AUDIO_TOKEN once for each embedding.
      tiles: dtype[B, I, P, D] or None.
      clips: dtype[B, U, S, D] or None.
      clip_counts: int32[B, U] embeddings of each clip that are real, or None.

    Returns:
      dtype[B, T, D]. Source: the release's splice (specification of its multimodal prompt), by
      index instead of by list.
    """
    if tiles is not None:
        at = tokens == IMAGE_TOKEN
        rows = tiles.reshape(tiles.shape[0], -1, tiles.shape[-1]).astype(text.dtype)
        index = jnp.minimum(jnp.cumsum(at, axis=1) - 1, rows.shape[1] - 1)
        text = jnp.where(at[..., None], jnp.take_along_axis(rows, index[..., None], axis=1), text)
    if clips is not None:
        at = tokens == AUDIO_TOKEN
        index = jnp.cumsum(at, axis=1) - 1  # among all real embeddings of the row
        ends = jnp.cumsum(clip_counts, axis=1)
        clip = jnp.minimum((index[..., None] >= ends[:, None]).sum(axis=-1), clips.shape[1] - 1)
        start = jnp.take_along_axis(ends - clip_counts, clip, axis=1)
        rows = clips.reshape(clips.shape[0], -1, clips.shape[-1]).astype(text.dtype)
        index = jnp.clip(clip * clips.shape[2] + index - start, 0, rows.shape[1] - 1)
        text = jnp.where(at[..., None], jnp.take_along_axis(rows, index[..., None], axis=1), text)
    return text


def boxed_shapes(config: VitaConfig):
    """Shape of every parameter, boxed with its axis names; nothing is computed."""
    return jax.eval_shape(lambda: Vita(config).init(jax.random.key(0), method="touch")["params"])


def param_shapes(config: VitaConfig):
    """Shape of every parameter as a nested dict of ShapeDtypeStruct."""
    return nn.unbox(boxed_shapes(config))


def init_params(config: VitaConfig, seed: int):
    """Random parameters, float32 in NumPy, as a nested dict; the same seed gives the same numbers
    anywhere.
    """
    boxed = trees.flatten(boxed_shapes(config))
    return trees.unflatten({path: draw(path, box, seed) for path, box in boxed.items()})


def draw(path: str, box, seed: int) -> np.ndarray:
    """float32 start of one parameter; `box` is its entry of `boxed_shapes`. Each path has its own
    random stream.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(path.encode())]))
    if not box.std:
        return np.full(box.value.shape, box.mean, np.float32)
    values = rng.standard_normal(box.value.shape, np.float32)
    values *= np.float32(box.std)
    values += np.float32(box.mean)
    return values
