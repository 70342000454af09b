"""What number formats cost: how far the LLM's next-token distributions are from those in float32.

Goes in: a checkpoint, which reads recorded questions about pictures, or a preset with random
weights, which reads made-up words. Comes out: a report, with a row for each format. What a format
changes of the replies themselves is measured by `vita eval nano`. Read next: `quantize.py`.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from vita_jax import bench, checkpoint
from vita_jax import config as configs
from vita_jax import params as trees
from vita_jax.bench_chat import QUESTIONS
from vita_jax.bench_programs import Work, embeddings, in_8_bits, model_of
from vita_jax.data.collate import collate
from vita_jax.data.processor import Processor
from vita_jax.data.tokenizer import Tokenizer
from vita_jax.infer.decode import embed_prompt
from vita_jax.models.llm import init_llm_cache
from vita_jax.models.vita import Vita

FORMATS = {  # dtype, and whether weights and cache are of 8 bits
    "bfloat16": ("bfloat16", False, False),
    "weights int8": ("float32", True, False),
    "cache int8": ("float32", False, True),
    "bfloat16, weights int8": ("bfloat16", True, False),
    "bfloat16, weights and cache int8": ("bfloat16", True, True),
}


def formats(work: Work, questions=QUESTIONS) -> dict:
    """Reads the same in each format, with a cache, and compares what may come next.

    Args:
      work: the model; of a preset, `num_tokens` made-up words are read. `dtype` and `int8` do not
        count.
      questions: that a checkpoint reads.

    Returns:
      a report: `rows`, objects with format, kl (of the float32 distribution from the format's, in
      nats, mean over all positions), worst (the largest of them) and same (share of positions with
      the same likeliest token); n, positions; model and machine.

    Raises:
      FileNotFoundError, ValueError: a model that cannot be used.
    """
    work = dataclasses.replace(work, dtype="float32", int8=False)
    preset = work.model in configs.PRESETS
    config, params = model_of(work, ("llm",) if preset else checkpoint.PARTS)
    if preset:
        given = [embeddings(config, params, work.num_tokens)]
    else:
        processor = Processor(config, Tokenizer.load(work.model))
        given = [_read(config, params, processor, question) for question in questions]
    params = {"llm": params["llm"]}
    exact = [_log_probabilities(config, False, params, x) for x in given]
    rows = []
    for name, (dtype, int8, int8_cache) in FORMATS.items():
        held = _cast(in_8_bits(config, params) if int8 else params, dtype)
        run = functools.partial(_log_probabilities, config.with_dtype(dtype), int8_cache, held)
        found = [_compare(p, run(x)) for p, x in zip(exact, given)]
        kl, same = (np.concatenate(part) for part in zip(*found))
        row = {"kl": kl.mean(), "worst": kl.max(), "same": same.mean()}
        rows.append({"format": name} | {key: float(x) for key, x in row.items()})
    about = {"model": work.model, "machine": bench.machine()}
    return {"what": "formats", "rows": rows, "n": len(kl)} | about


def table(report: dict) -> Table:
    """The report, to be printed."""
    shown = Table(
        title=f"{report['model']}: beside float32, {report['n']} positions",
        caption="nats: KL divergence of the distribution of the next token",
    )
    for name in ("format", "nats, mean", "nats, most", "same likeliest token"):
        shown.add_column(name, justify="left" if name == "format" else "right")
    for row in report["rows"]:
        shown.add_row(
            row["format"], f"{row['kl']:.2g}", f"{row['worst']:.2g}", f"{row['same']:.1%}"
        )
    return shown


def _read(config, params, processor, question):
    """dtype[1, T, D]: the prompt with a question, as embeddings."""
    images = () if question.image is None else (question.image,)
    example = processor.prompt(None, images, question.audio)
    return embed_prompt(config, params, collate([example]))[:, : len(example.tokens)]


def _cast(params, dtype):
    """The parameters in `dtype`, but for those of 8 bits and their scales."""
    flat = trees.flatten(params)
    kept = {p for p, x in flat.items() if x.dtype == jnp.int8 or p.endswith(checkpoint.SCALE)}
    return trees.unflatten({p: x if p in kept else x.astype(dtype) for p, x in flat.items()})


@functools.partial(jax.jit, static_argnums=(0, 1))
def _log_probabilities(config, int8_cache, params, given):
    """float32[T, V] of what follows each of the embeddings [1, T, D]."""

    def read(model, x):
        cache = init_llm_cache(config.llm, 1, x.shape[1], int8_cache)
        positions, mask = jnp.arange(x.shape[1])[None], cache.causal_mask(x.shape[1])
        hidden, _ = model.llm(x.astype(config.llm.dtype), positions, mask, cache)
        return jax.nn.log_softmax(model.llm.logits(hidden)[0])

    return Vita(config).apply({"params": params}, given, method=read)


def _compare(exact, other):
    """KL divergence in nats, and whether the likeliest token is the same, at each position."""
    kl = (jnp.exp(exact) * (exact - other)).sum(axis=-1)
    same = exact.argmax(axis=-1) == other.argmax(axis=-1)
    return np.asarray(kl), np.asarray(same)
