"""What a stage reads, on all processes: tokenizer, batches, and where the data stands.

Goes in: a `TrainConfig`. Comes out: this process's rows of each batch, of one size on all
processes. Read next: `data/loader.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import re
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from vita_jax import checkpoint, codec_tokens, train_state
from vita_jax.batch import Batch
from vita_jax.config import TrainConfig
from vita_jax.data import synthetic
from vita_jax.data.collate import cut, sizes
from vita_jax.data.processor import Processor
from vita_jax.data.sources import open_source
from vita_jax.data.tokenizer import Tokenizer, load_bundled
from vita_jax.flops import model_flops

log = logging.getLogger(__name__)


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


def with_tokens(config: TrainConfig, workdir: Path) -> TrainConfig:
    """The stage with records of codec tokens in the place of speech, if it learns from these. They
    are made in `workdir`/tokens with the codec of `init_from`, once.

    Raises:
      FileNotFoundError, ValueError: as `codec_tokens.write`, or `init_from` has no codec.
    """
    if config.objective != "speech":
        return config

    def tokens(source):
        if source.startswith(synthetic.PREFIX) or "audio" not in open_source(source).media:
            return source
        folder = train_state.folder_of(config, "codec/codebooks/code")
        if folder is None:
            raise ValueError(
                f"{source}: speech without codec tokens, and init_from={config.init_from} has no "
                "codec to make them with; name one there, or use `vita data codec-tokens`"
            )
        target = Path(workdir, "tokens", re.sub(r"\W+", "_", source).strip("_"))
        if jax.process_index() == 0:
            log.info("codec tokens of %s go to %s", source, target)
            made = codec_tokens.write(folder, source, target, progress=True)
            log.info("%s: %d clips, %.4f h, %d left out", *(
                source, made["clips"], made["hours"], made["rejects"],
            ))  # fmt: skip
        of_all(0)  # the others wait
        return str(target)

    mixture = {tokens(source): weight for source, weight in config.data.mixture.items()}
    held_out = tuple(tokens(source) for source in config.data.held_out)
    data = dataclasses.replace(config.data, mixture=mixture, held_out=held_out)
    return dataclasses.replace(config, data=data)


def with_voice(config: TrainConfig) -> TrainConfig:
    """The stage with the codec speaking in the voice of what it learnt to say, that of the first
    source of the mixture; if that is not known, or it learnt something else, in the voice of the
    checkpoint that the codec comes from. Speech has codec tokens in its place already
    (`with_tokens`).
    """
    source, global_tokens = next(iter(config.data.mixture)), None
    if config.objective == "speech" and not source.startswith(synthetic.PREFIX):
        global_tokens = codec_tokens.voice(source)
    folder = train_state.folder_of(config, "codec/codebooks/code")
    if global_tokens is None and folder is not None:
        global_tokens = checkpoint.open_folder(folder)[0].codec.global_tokens
    if global_tokens is None:
        return config
    codec = dataclasses.replace(config.model.codec, global_tokens=global_tokens)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, codec=codec))


def load_captions(config: TrainConfig, processor: Processor):
    """The replies in `data.captions`: int32[C, L], what is a target of each, then -1; None without.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it holds something else than replies.
    """
    if config.data.captions is None:
        return None
    file = Path(config.data.captions)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; `vita data build` writes one for its data")
    try:
        texts = json.loads(file.read_text("utf-8"))
    except ValueError:
        texts = None
    if not texts or not isinstance(texts, list) or not all(isinstance(x, str) for x in texts):
        raise ValueError(f"{file}: expected a JSON list of replies")
    replies = []
    for text in texts:
        turns = [{"from": "human", "value": ""}, {"from": "gpt", "value": text}]
        example = processor.sample({"id": f"{file}: {text}", "conversations": turns})
        replies.append(example.tokens[example.loss_mask > 0])
    longest = max(map(len, replies))
    return np.stack([np.pad(x, (0, longest - len(x)), constant_values=-1) for x in replies])


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
    """What a batch goes through, as starts of parameter paths; the rest is not loaded.

    Raises:
      ValueError: pictures are to be matched with words, and there are none.
    """
    if config.objective == "ctc":
        return ("audio",)
    tables = ("llm/embedding", "llm/head", "llm/state_")  # which come together
    if config.objective == "align":
        return ("audio", *tables)
    if config.objective == "codec":
        return ("codec", *["discriminators"] * bool(config.discriminator_channels))
    if config.objective == "speech":
        return ("speech", "codec", "llm/embedding")
    if config.objective == "match":
        if batch.tiles is None:
            raise ValueError(
                f"data.mixture={config.data.mixture}: no pictures, which objective='match' is about"
            )
        return ("vision", *tables)
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
    flops = model_flops(
        config.model, config.objective, trained, batch, config.discriminator_channels
    )
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
