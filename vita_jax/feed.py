"""What a stage reads, on all processes: tokenizer, batches, and where the data stands.

Goes in: a `TrainConfig`. Comes out: this process's rows of each batch, of one size on all
processes. Read next: `data/loader.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from vita_jax import train_state
from vita_jax.batch import Batch
from vita_jax.config import TrainConfig
from vita_jax.data import synthetic
from vita_jax.data.collate import cut, sizes
from vita_jax.data.processor import Processor
from vita_jax.data.tokenizer import Tokenizer, load_bundled
from vita_jax.flops import model_flops


def load_tokenizer(config: TrainConfig) -> Tokenizer:
    """That of the first folder of `init_from`; without one, that of the preset."""
    folders = train_state.init_folders(config)
    return Tokenizer.load(folders[0][1]) if folders else load_bundled(config.model.name)


def make_processor(config: TrainConfig, tokenizer: Tokenizer) -> Processor:
    """What makes arrays of the stage's samples."""
    return Processor(config.model, tokenizer, video_rate=config.data.video_rate)


def make_loaders(config: TrainConfig, tokenizer: Tokenizer, workdir: Path):
    """The stage's batches without end, and a function that goes through the held-out ones once, or
    None if there are none; this process's rows of them.

    Raises:
      FileNotFoundError: a source or `data.units` is not there.
      ValueError: synthetic and real sources are mixed, or units do not fit the head.
    """
    data = dataclasses.replace(config.data, units=train_state.units_file(config))
    processor = make_processor(config, tokenizer)
    share = {
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
        "objective": config.objective,
    }
    made_up = [source.startswith(synthetic.PREFIX) for source in (*data.mixture, *data.held_out)]
    if any(made_up) and not all(made_up):
        raise ValueError(
            f"data.mixture={data.mixture}, data.held_out={data.held_out}: {synthetic.PREFIX}... "
            "does not mix with other sources; data.held_out=[] does without validation"
        )
    if all(made_up):
        loader, one_pass = synthetic.Loader(data, processor, **share), synthetic.held_out
    else:
        from vita_jax.data import loader as real

        loader = real.Loader(data, processor, workdir / "rejects.jsonl", **share)
        one_pass = real.held_out
    if not data.held_out:
        return loader, None
    data = dataclasses.replace(data, mixture=dict.fromkeys(data.held_out, 1.0))
    return loader, functools.partial(one_pass, data, processor, **share)


def state_of(loader) -> dict:
    """The state of the loaders of all processes as one."""
    if jax.process_count() == 1 or isinstance(loader, synthetic.Loader):
        return loader.state()  # a synthetic one is the same everywhere
    from vita_jax.data.loader import merge_states

    text = np.frombuffer(json.dumps(loader.state()).encode(), np.uint8)
    length = multihost_utils.process_allgather(np.array(len(text))).max()
    padded = np.pad(text, (0, length - len(text)), constant_values=ord(" "))
    rows = multihost_utils.process_allgather(padded)
    return merge_states(json.loads(bytes(row)) for row in rows)


def used_parts(config: TrainConfig, batch: Batch) -> tuple[str, ...]:
    """The parts of the model that a batch goes through; the others are not loaded."""
    if config.objective == "ctc":
        return ("audio",)
    seen = ("vision",) * (batch.tiles is not None) + ("audio",) * (batch.audio is not None)
    return (*seen, "llm")


def work_of(config: TrainConfig, trained, batch: Batch) -> tuple[float, float]:
    """(tokens, FLOPs) of a step in all processes, which have as much to do as this one.

    Args:
      config: the stage.
      trained: paths of what trains.
      batch: this process's rows.
    """
    tokens = int((batch.segment_ids > 0).sum())
    flops = model_flops(config.model, config.objective, trained, batch)
    return tokens * jax.process_count(), flops * jax.process_count()


def same_size(batch: Batch) -> Batch:
    """This process's rows without the padding that no process needs."""
    used = sizes(batch)
    most = of_all([*used.values()]).max(axis=0)
    return cut(batch, dict(zip(used, map(int, most))))


def of_all(values):
    """int32[processes, ...]: the values of each process."""
    values = np.asarray(values, np.int32)
    return multihost_utils.process_allgather(values) if jax.process_count() > 1 else values[None]
