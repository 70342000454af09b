"""What a stage makes small: next tokens, or what clips say.

Goes in: parameters and a `Batch`. Comes out: the sum of the loss over targets and the counts that
metrics are made of; sums, so that pieces of a batch, and batches, add up. Read next: `losses.py`.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp

from vita_jax import params as trees
from vita_jax.batch import Batch
from vita_jax.config import TrainConfig
from vita_jax.losses import (
    ctc_loss,
    ctc_read,
    ctc_targets,
    edit_distance,
    next_token_loss,
    next_token_targets,
    of_conversations,
    state_loss,
)
from vita_jax.models.vita import Vita


def make_loss(config: TrainConfig):
    """The objective.

    Returns:
      function of (parameters that train, frozen ones, Batch) to the sum of the loss over targets
      and sums of what goes with it, float32[] each: `targets`, those of them that are `wrong`,
      `replies` (clips, if by CTC), and those that are `exact`. For next tokens it may be given
      what `state_targets` makes of the batch, too.
    """
    loss = {"next_token": read_loss, "ctc": hear_loss}[config.objective]
    model = Vita(config.model.with_dtype(config.dtype, config.remat))
    return functools.partial(loss, config, model)


def means(nats, sums) -> dict:
    """The metrics: `loss` (nats a target), `error` (wrong ones a target), `exact` (share of replies
    that are right as a whole) and `targets`; of a state head, whose loss is in `loss`, its part of
    that as `state_loss`, and `state_error` (share of replies).
    """
    number = jnp.maximum(sums["targets"], 1)
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
    apply = functools.partial(model.apply, {"params": trees.merge(params, frozen)})
    targets, weights = next_token_targets(batch.tokens, batch.segment_ids, batch.loss_mask)
    hidden = apply(batch, method="hidden_states")
    logits_of = functools.partial(apply, method="logits")
    nats, right = next_token_loss(hidden, logits_of, targets, config.loss_chunk)
    wrong = weights * ~right
    replies, flawed = (of_conversations(x > 0, batch.segment_ids) for x in (weights, wrong))
    total = (nats * weights).sum()
    sums = {
        "targets": weights.sum(),
        "wrong": wrong.sum(),
        "replies": replies.sum(),
        "exact": (replies & ~flawed).sum(),
    }
    if states is not None:
        state_nats, right, number = state_loss(apply(hidden, method="state_logits"), states)
        total += state_nats
        sums |= {"state_nats": state_nats, "state_right": right, "state_replies": number}
    return total, sums


def hear_loss(config: TrainConfig, model: Vita, params, frozen, batch: Batch):
    """What each clip says, by CTC; wrong units are those that an edit adds, drops or replaces.
    Returns as `make_loss` says.
    """
    params = trees.merge(params, frozen)
    logits, num_frames = model.apply(
        {"params": params}, batch.audio, batch.audio_mask, method="unit_logits"
    )
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
