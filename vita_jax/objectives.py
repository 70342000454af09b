"""What a stage makes small: next tokens, which words go with which picture, what clips say in units
or in the LLM's tokens, codec tokens, or what a codec loses.

Goes in: parameters and a `Batch`. Comes out: the sum of the loss over targets and the counts that
metrics are made of; sums, so that pieces of a batch, and batches, add up. Read next: `losses.py`,
`codec_losses.py`.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from vita_jax import codebooks, lora
from vita_jax import params as trees
from vita_jax.batch import IMAGE_TOKEN, Batch
from vita_jax.codec_losses import discriminator_losses, generator_losses
from vita_jax.config import TrainConfig
from vita_jax.losses import (
    ctc_loss,
    ctc_read,
    ctc_targets,
    edit_distance,
    match_pairs,
    next_token_loss,
    next_token_targets,
    of_conversations,
    state_loss,
    word_logits,
)
from vita_jax.models.discriminators import Discriminators
from vita_jax.models.vita import Vita


def make_loss(config: TrainConfig, training: bool = True, captions=None):
    """The objective.

    Args:
      config: the stage.
      captions: for "match" only: as `feed.load_captions` returns.
      training: for "codec" only: with discriminators, statistics of the batch, and what `settle`
        takes; else by the fixed statistics.

    Returns:
      function of (parameters that train, frozen ones, Batch) to the sum of the loss over targets
      and sums of what goes with it, float32[] each: `targets`, those of them that are `wrong`,
      `replies` (clips, if by CTC; utterances, if spoken), and those that are `exact`; of a codec,
      each of its losses instead. For next tokens it may be given what `state_targets` makes of the
      batch, too.
    """
    model = Vita(config.model.with_dtype(config.dtype, config.remat))
    if config.objective == "codec":
        return functools.partial(code_loss, config, model, training)
    if config.objective == "match":
        return functools.partial(match_loss, config, model, captions)
    loss = {
        "next_token": read_loss,
        "ctc": hear_loss,
        "align": align_loss,
        "speech": speak_loss,
    }[config.objective]
    return functools.partial(loss, config, model)


def means(nats, sums) -> dict:
    """The metrics: `loss` (nats a target), `error` (wrong ones a target), `exact` (share of replies
    that are right as a whole) and `targets`; of a state head, whose loss is in `loss`, its part of
    that as `state_loss`, and `state_error` (share of replies). Of a codec, `targets` are segments
    and `loss` is the distance of log-mel spectrograms; beside it are all its losses.
    """
    number = jnp.maximum(sums["targets"], 1)
    if "mel" in sums:
        parts = {name: sums[name] / number for name in sums if name not in ("targets", "settle")}
        return {"loss": parts["mel"], "total": nats / number, **parts, "targets": sums["targets"]}
    of_states = {}
    if "state_nats" in sums:
        of_states = {
            "state_loss": sums["state_nats"] / number,
            "state_error": 1 - sums["state_right"] / jnp.maximum(sums["state_replies"], 1),
        }
    return of_states | {
        "loss": nats / number,
        "error": sums["wrong"] / number,
        "exact": sums["exact"] / jnp.maximum(sums["replies"], 1),
        "targets": sums["targets"],
    }


def read_loss(config: TrainConfig, model: Vita, params, frozen, batch: Batch, states=None):
    """The next token of each conversation; with `states` (see `state_targets`) also what each reply
    answers. A reply is exact if each of its tokens was the likeliest one: then it is what greedy
    decoding gives. Returns as `make_loss` says.
    """
    apply = functools.partial(model.apply, lora.variables(config, params, frozen))
    hidden = apply(batch, method="hidden_states")
    logits_of = functools.partial(apply, method="logits")
    total, sums = _next_tokens(config, hidden, logits_of, batch)
    if states is not None:
        state_nats, right, number = state_loss(apply(hidden, method="state_logits"), states)
        total += state_nats
        sums |= {"state_nats": state_nats, "state_right": right, "state_replies": number}
    return total, sums


def match_loss(config: TrainConfig, model: Vita, captions, params, frozen, batch: Batch):
    """Which words go with which picture, among all in the batch and all `captions`: the mean
    direction of what a conversation's pictures are embedded as is drawn to the mean embedding of
    its targets, and from those of others. Where a conversation has four replies, each is about a
    quarter of the picture, as they are read. Only directions count, as the LLM's norms leave no
    more of a picture. The LLM itself is not run: of it, only the input table is needed.

    Captions are int32[C, L], tokens of a reply, then -1, or None. Targets are conversations with
    pictures, or quarters. Returns as `make_loss` says. Source: arXiv 2103.00020 (CLIP), with the
    table in the place of a text tower.
    """
    variables = lora.variables(config, params, frozen)
    embeddings = model.apply(variables, batch, method="embed").astype(jnp.float32)
    ids, is_image, is_target = batch.segment_ids, batch.tokens == IMAGE_TOKEN, batch.loss_mask > 0
    size = config.model.vision.embeddings_per_tile
    tile, place = jnp.divmod(jnp.cumsum(is_image, axis=1) - 1, size)
    shown = is_image[:, None] & (tile[:, None] == jnp.arange(batch.tiles.shape[1])[:, None])
    of_tiles = jnp.where(shown, ids[:, None], 0).max(axis=-1)[..., None]  # [B, I, 1] conversation
    members = ids[:, None] == of_tiles

    edge = math.isqrt(size)
    quarter = place // edge * 2 // edge * 2 + place % edge * 2 // edge
    starts = is_target & ~jnp.roll(is_target, 1, axis=1)
    before = (starts[:, None] & (ids[:, None] < of_tiles)).sum(axis=-1, keepdims=True)
    reply = jnp.cumsum(starts, axis=1)[:, None] - before - 1  # [B, I, T] of the conversation
    parts = jnp.arange(4)[:, None]
    is_split = (members & starts[:, None]).sum(axis=-1)[..., None, None] == 4

    def mean(values, of_part, chosen):
        chosen = (members & chosen[:, None])[:, :, None] & jnp.where(is_split, of_part, parts == 0)
        number = chosen.sum(axis=-1, keepdims=True)
        total = jnp.einsum("BIPT,BTD->BIPD", chosen.astype(jnp.float32), values)
        return (total / jnp.maximum(number, 1)).reshape(-1, total.shape[-1]), number[..., 0] > 0

    lengths = jnp.sqrt((embeddings * embeddings).sum(axis=-1, keepdims=True) + 1e-9)
    pictures, _ = mean(embeddings / lengths, quarter[:, None, None] == parts, is_image)
    words, told = mean(embeddings, reply[:, :, None] == parts, is_target)
    first = jnp.diff(of_tiles, axis=1, prepend=0) > 0  # of its conversation's tiles
    real = (first & told).ravel()
    others = words[:0]
    if captions is not None:
        table, said = variables["params"]["llm"]["embedding"], (captions >= 0)[..., None]
        others = (table[captions].astype(jnp.float32) * said).sum(axis=1) / said.sum(axis=1)
    nats, right = match_pairs(pictures, words, real, others)
    return nats.sum(), {
        "targets": real.sum(),
        "wrong": (real & ~right).sum(),
        "replies": real.sum(),
        "exact": right.sum(),
    }


def speak_loss(config: TrainConfig, model: Vita, params, frozen, batch: Batch):
    """The next codec token of each utterance, and its end. Source: the release's speech decoder
    (its loss is the sum). Returns as `make_loss` says.
    """
    apply = functools.partial(model.apply, lora.variables(config, params, frozen))
    hidden = apply(batch, method="spoken_states")
    logits_of = functools.partial(apply, method="spoken_logits")
    return _next_tokens(config, hidden, logits_of, batch)


def _next_tokens(config, hidden, logits_of, batch):
    """The loss of the next token, summed over targets, and its counts."""
    targets, weights = next_token_targets(batch.tokens, batch.segment_ids, batch.loss_mask)
    nats, right = next_token_loss(hidden, logits_of, targets, weights, config.loss_chunk)
    wrong = weights * ~right
    replies, flawed = (of_conversations(x > 0, batch.segment_ids) for x in (weights, wrong))
    return (nats * weights).sum(), {
        "targets": weights.sum(),
        "wrong": wrong.sum(),
        "replies": replies.sum(),
        "exact": (replies & ~flawed).sum(),
    }


def hear_loss(config: TrainConfig, model: Vita, params, frozen, batch: Batch):
    """What each clip says, by CTC; wrong units are those that an edit adds, drops or replaces.
    Returns as `make_loss` says.
    """
    variables = lora.variables(config, params, frozen)
    found = model.apply(variables, batch.audio, batch.audio_mask, method="unit_logits")
    return _transcribed(batch, *found)


def align_loss(config: TrainConfig, model: Vita, params, frozen, batch: Batch):
    """What each clip says in the LLM's tokens, by CTC: each embedding of a clip is drawn to the row
    of a token in the input table, or away from all rows, so that the LLM hears words as it reads
    them. The LLM itself is not run: of it, only that table is needed. Prompts have no part in it.

    Wrong tokens are those that an edit adds, drops or replaces. Returns as `make_loss` says. Ours.
    """
    variables = lora.variables(config, params, frozen)
    clips, counts = model.apply(variables, batch.audio, batch.audio_mask, method="encode_audio")
    num_prompts = config.model.audio.num_prompts
    clips = clips.reshape(-1, *clips.shape[2:])[:, num_prompts:]
    logits = word_logits(clips, variables["params"]["llm"]["embedding"])
    return _transcribed(batch, logits, jnp.maximum(counts.ravel() - num_prompts, 0))


def _transcribed(batch, logits, num_frames):
    """The CTC loss of all clips, and its counts."""
    labels, num_labels = ctc_targets(
        batch.tokens, batch.positions, batch.segment_ids, batch.audio.shape[1], logits.shape[1]
    )
    real = num_labels > 0
    nats = jnp.where(real, ctc_loss(logits, num_frames, labels, num_labels), 0)
    wrong = jnp.where(real, edit_distance(ctc_read(logits, num_frames), labels), 0)
    return nats.sum(), {
        "targets": num_labels.sum(),
        "wrong": wrong.sum(),
        "replies": real.sum(),
        "exact": (real & (wrong == 0)).sum(),
    }


def code_loss(config: TrainConfig, model: Vita, training: bool, params, frozen, batch: Batch):
    """What the codec loses of pieces of clips, and what its discriminators make of the difference.

    Both networks learn from one pass: the gradient of the codec's part stops at the discriminators'
    weights, that of the discriminators' part at the waveform. Returns as `make_loss` says.
    """
    tree = trees.merge(params, frozen)
    judges = tree.pop("discriminators", None)
    real, other = batch.waveform[:, 0], batch.waveform[:, 1]

    def hear(model, real, other):
        codes, global_tokens, latents = model.codec.encode(real)
        fake = model.codec.decoder(latents.quantized, latents.quantized_timbre)
        return fake, codes, global_tokens, latents, model.codec.timbre(other)

    # The statistics of the batch in the place of the fixed ones.
    mutable = ["batch_stats"] if training and _has_statistics(params) else []
    (fake, codes, global_tokens, latents, other_timbre), news = model.apply(
        {"params": tree}, real, other, method=hear, mutable=mutable
    )

    def judge(judges, x):
        return Discriminators(config.discriminator_channels).apply({"params": judges}, x)

    judged = [(), ()]
    if training and judges is not None:
        judged = [judge(jax.lax.stop_gradient(judges), x) for x in (real, fake)]
    parts = generator_losses(
        real, fake, *judged, latents.loss, latents.timbre, other_timbre,
        config.model.codec.sample_rate_hz,
    )  # fmt: skip
    if training and judges is not None:
        made = jax.lax.stop_gradient(fake)
        parts |= discriminator_losses(judge(judges, real), judge(judges, made))
    is_real = (batch.segment_ids > 0).any(axis=1)  # a row of held-out samples may be empty
    sums = {name: jnp.where(is_real, loss, 0).sum() for name, loss in parts.items()}
    total = sum(sums.values())
    sums["targets"] = is_real.sum(dtype=jnp.float32)
    if training:
        groups = latents.timbre.reshape(*global_tokens.shape, -1)
        sums["settle"] = jax.lax.stop_gradient(
            {
                "statistics": news.get("batch_stats", {}),
                "code": (codes.reshape(-1), latents.encoded.reshape(codes.size, -1)),
                "global": (global_tokens.T, groups.swapaxes(0, 1)),
            }
        )
    return total, sums


def settle(config: TrainConfig, params, use, found, step):
    """What a step of the codec changes without a gradient: running statistics, and codewords that
    are out of use.

    Args:
      config: the stage.
      params: what trains.
      use: running use of the codewords that train, by codebook (see `codebooks.reseed`).
      found: `settle` of the sums of `code_loss`.
      step: int32[] of the run; draws follow from it and the seed.

    Returns:
      params and use as they are now, and metrics: `perplexity`, `global_perplexity`.
    """
    flat, use, metrics = trees.flatten(params), dict(use), {}
    news = trees.flatten(found["statistics"])
    flat |= {path: value for path, value in news.items() if path in flat}
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    keys = jax.random.split(key, 1 + config.model.codec.num_global_tokens)
    for name, reseed, key, label in (
        ("code", codebooks.reseed, keys[0], "perplexity"),
        ("global", jax.vmap(codebooks.reseed), keys[1:], "global_perplexity"),
    ):
        if name not in use:
            continue
        path = f"codec/codebooks/{name}"
        flat[path], use[name], counts = reseed(flat[path], use[name], *found[name], key)
        metrics[label] = codebooks.perplexity(counts).mean()
    return trees.unflatten(flat), use, metrics


def _has_statistics(params):
    """Whether a batch norm trains."""
    return any(path.endswith("running_mean") for path in trees.flatten(params))
