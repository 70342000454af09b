"""Batches without end, from any number of processes: rows of many shards, and where each stands.

Goes in: a `DataConfig`. Comes out: `Batch` after `Batch`, rows of one shape, in an order that the
seed alone decides. Read next: `shard.py`, where a row comes from.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from vita_jax.batch import Batch
from vita_jax.config import OBJECTIVES, DataConfig
from vita_jax.data.processor import Processor
from vita_jax.data.shard import Reader, Shard, one_pass
from vita_jax.data.sources import open_source

log = logging.getLogger(__name__)

MIN_SEEN = 100  # samples after which a share of bad ones means something


class Loader:
    """The batches of one process, and where it stands among them.

    The stream of samples is cut into `num_shards` shards, each mixed, shuffled and packed by
    itself, and every row of every batch comes from a shard that depends on nothing but the row and
    the batch's number. Process p of n makes the p-th of n parts of each batch, out of the p-th of
    n parts of the shards: put one behind the other, the parts are the same batch for any n. (With
    shards p::n the rows of a batch would change places whenever n does.)
    """

    def __init__(
        self,
        data: DataConfig,
        processor: Processor,
        rejects_path: str | Path | None = None,
        process_index: int = 0,
        process_count: int = 1,
        objective: str = "next_token",
    ):
        """Opens the sources; nothing is read before the first batch.

        Args:
          data: what to read. Its `max_tokens` and `video_rate` count, not the processor's.
          processor: of the model that reads the batches.
          rejects_path: JSON lines of the samples that were left out and why; None writes none. Of
            several processes each writes a file with its number before the suffix.
          process_index: of this process.
          process_count: a divisor of both `data.batch_size` and `data.num_shards`.
          objective: "next_token"; "ctc" or "align": `tokens` are then the words of replies alone
            (no template, no state token, no end), all of them targets, and segment 1, 2, ... is
            what the row's first, second, ... clip says. With `data.units` they are ids of these,
            else of the tokenizer, each Han character by itself.
            "codec": rows are two pieces of a clip; "speech": words and codec tokens (see
            `utterance.py`).

        Raises:
          FileNotFoundError: a source is not there.
          ValueError: a source has no samples in a known format, or a number is out of range.
        """
        _check(data, process_index, process_count, objective)
        sources = [open_source(name) for name in data.mixture]
        self._reader = Reader(data, processor, sources, objective)
        part, num_rows = data.num_shards // process_count, data.batch_size // process_count
        self._rows = range(process_index * num_rows, (process_index + 1) * num_rows)
        mine = range(process_index * part, (process_index + 1) * part)
        self._shards = {shard: _fresh(len(sources)) for shard in mine}
        self._samples = sum(self._reader.size(k, s) for s in mine for k in range(len(sources)))
        self._rejects_path = None if rejects_path is None else Path(rejects_path)
        if self._rejects_path and process_count > 1:
            suffix = f".{process_index}{self._rejects_path.suffix}"
            self._rejects_path = self._rejects_path.with_suffix(suffix)
        self._step, self._streams = 0, None

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        """This process's rows of the next batch, NumPy arrays.

        Raises:
          ValueError: more than `max_reject_share` of the samples were bad (of the first 100, if
            fewer were seen); the last reason is given.
        """
        shards = [self._reader.shard_of_row(self._step, row) for row in self._rows]
        rows = [self._next_row(shard) for shard in shards]
        self._step += 1
        return self._reader.batch(rows)

    @property
    def epoch(self) -> int:
        """How often as many samples were drawn as there are; sources of less weight lag behind."""
        return self._num_seen // self._samples

    @property
    def num_rejects(self) -> int:
        """Bad samples so far, those of this process."""
        return sum(shard["rejects"] for shard in self._shards.values())

    @property
    def _num_seen(self):
        return sum(sum(shard["counts"]) for shard in self._shards.values())

    def state(self) -> dict:
        """Where the loader stands after the last batch, as JSON values."""
        shards = {str(shard): dict(state) for shard, state in self._shards.items()}
        return {"data": self._reader.identity(), "step": self._step, "shards": shards}

    def restore(self, state: dict) -> None:
        """Goes on where `state` was taken, by any number of processes (see `merge_states`).

        Raises:
          ValueError: the state is of other data or settings (one is named), or lacks a shard.
        """
        state, ours = json.loads(json.dumps(state)), self._reader.identity()
        for key, value in ours.items():
            if value != (theirs := state["data"].get(key)):
                raise ValueError(
                    f"the data's {key} was {theirs} when the state was saved and is {value} now; "
                    "set it back, or start another run"
                )
        missing = [shard for shard in self._shards if str(shard) not in state["shards"]]
        if missing:
            raise ValueError(
                f"the state has no shard {missing[0]}; merge those of all processes that saved one"
            )
        self.close()
        self._step = state["step"]
        self._shards = {shard: state["shards"][str(shard)] for shard in self._shards}
        self._forget_rejects()

    def close(self) -> None:
        """Ends the worker processes; the next batch starts them again."""
        if self._reader.data.num_workers:
            for stream in (self._streams or {}).values():
                stream.close()
        self._streams = None

    def _next_row(self, shard):
        """The next row of a shard; keeps count of the shard."""
        self._streams = self._streams or self._start()
        while True:
            made = next(self._streams[self._worker(shard)])
            self._shards[shard] = made["state"]
            if made["rejects"]:
                self._report(made["rejects"])
            if made["row"]:
                return made["row"]

    def _worker(self, shard):
        """Which worker makes the rows of a shard: neighbours in a batch are made by different
        ones.
        """
        return (shard + self._reader.group_of(shard)) % max(self._reader.data.num_workers, 1)

    def _start(self):
        """The stream of rows of each worker that has any, by its number."""
        owned = {}
        for shard, state in self._shards.items():
            owned.setdefault(self._worker(shard), {})[shard] = state
        rows = {w: _Rows(self._reader, mine, self._rows, self._step) for w, mine in owned.items()}
        if not self._reader.data.num_workers:
            return {worker: iter(stream) for worker, stream in rows.items()}
        ahead = 1 + 2 * len(self._rows) // len(rows)
        return {worker: _in_process(stream, ahead) for worker, stream in rows.items()}

    def _report(self, rejects):
        """Writes bad samples down, and stops if they are too many."""
        if self._rejects_path:
            with self._rejects_path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in rejects)
        share = self._reader.data.max_reject_share
        if self.num_rejects > share * max(self._num_seen, MIN_SEEN):
            where = f"; all are in {self._rejects_path}" if self._rejects_path else ""
            raise ValueError(
                f"{self.num_rejects} of {self._num_seen} samples are bad, more than "
                f"data.max_reject_share={share}; the last: {rejects[-1]['reason']}{where}"
            )

    def _forget_rejects(self):
        """Takes those out of the file that will come again."""
        if not (self._rejects_path and self._rejects_path.is_file()):
            return
        lines = self._rejects_path.read_text("utf-8").splitlines(keepends=True)
        kept = []
        for line in lines:
            reject = json.loads(line) if line.endswith("\n") else {}  # else: killed while writing
            state = self._shards.get(reject.get("shard"))
            if reject and (state is None or reject["draw"] < sum(state["counts"])):
                kept.append(line)
        self._rejects_path.write_text("".join(kept), "utf-8")


def held_out(
    data: DataConfig,
    processor: Processor,
    process_index: int = 0,
    process_count: int = 1,
    objective: str = "next_token",
) -> Iterator[Batch]:
    """One pass over all samples of the mixture's sources, each once whatever its weight, in the
    order of the files; the same every time, nothing augmented.

    Row r of the batches takes samples r, r + B, r + 2 B, ... and packs them as in training; a row
    that has run out is all padding. Bad samples are left out, and one line in the log says so.

    Args:
      data: what to read, as for `Loader`; shapes are as there. Workers are not used.
      processor, process_index, process_count, objective: as for `Loader`.

    Returns:
      iterator over this process's rows of each batch. It ends when these have run out, perhaps
      before that of another process, but not before the first batch.

    Raises:
      As `Loader`.
    """
    data = dataclasses.replace(data, augment_audio=False, noises=None)
    _check(data, process_index, process_count, objective)
    reader = Reader(data, processor, [open_source(name) for name in data.mixture], objective)
    part = data.batch_size // process_count
    return _batches(reader, range(process_index * part, (process_index + 1) * part))


def _batches(reader, mine):
    """The batches of `held_out`."""
    rejects, empty = [], reader.row([])
    streams = [one_pass(reader, row, reader.data.batch_size, rejects) for row in mine]
    rows = [next(stream, empty) for stream in streams]
    while True:
        yield reader.batch(rows)
        rows = [next(stream, empty) for stream in streams]
        if all(row is empty for row in rows):
            break
    if rejects:
        log.warning("%d held-out samples left out; the first: %s", len(rejects), rejects[0])


def merge_states(states) -> dict:
    """One state out of those of all processes at the same step, for `Loader.restore` on any
    number of processes.

    Raises:
      ValueError: the states are of different steps.
    """
    states = list(states)
    if len({state["step"] for state in states}) != 1:
        steps = sorted({state["step"] for state in states})
        raise ValueError(f"loader states of steps {steps}; give those of one step")
    shards = {shard: value for state in states for shard, value in state["shards"].items()}
    return states[0] | {"shards": shards}


def end_with_parent(*_) -> None:
    """Lets this worker process die as soon as its parent does, which may have been killed outright
    and then tells nobody. Both Grain and `concurrent.futures` would wait for it for ever.
    """

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Rows:
    """The rows of some shards in the order in which batches take them. Grain sees a sequence, and
    reads it from the first to the last.
    """

    def __init__(self, reader, states, rows, step):
        self.reader, self.states, self.rows, self.step = reader, states, rows, step
        self.num_read = 0

    def __len__(self):
        return sys.maxsize

    def __getitem__(self, index):
        if not self.num_read:  # here, in the worker
            self.shards = {s: Shard(self.reader, s, state) for s, state in self.states.items()}
            self.order = self._order()
            self.shard = next(self.order)
        assert index == self.num_read, "rows can only be read one after another"
        self.num_read += 1
        made = self.shards[self.shard].next()
        if made["row"]:
            self.shard = next(self.order)
        return made

    def _order(self):
        for step in itertools.count(self.step):
            shards = (self.reader.shard_of_row(step, row) for row in self.rows)
            yield from (shard for shard in shards if shard in self.states)


def _in_process(rows, buffer_size):
    """The iterator of `rows` in a Grain worker process that is up to `buffer_size` ahead."""
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # by absl's `app.run`, which we do without
        flags.FLAGS.mark_as_parsed()
    one_by_one = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    dataset = grain.MapDataset.source(rows).to_iter_dataset(one_by_one)
    options = grain.MultiprocessingOptions(num_workers=1, per_worker_buffer_size=buffer_size)
    return iter(dataset.mp_prefetch(options, worker_init_fn=end_with_parent))


def _check(data, process_index, process_count, objective):
    """Refuses settings that no batch can be made with."""
    if not data.mixture or not all(0 < weight < math.inf for weight in data.mixture.values()):
        raise ValueError(f"data.mixture={data.mixture}: expected sources with positive weights")
    for name in ("batch_size", "max_tokens", "max_tiles", "max_clips", "max_audio_frames",
                 "num_shards"):  # fmt: skip
        if (value := getattr(data, name)) < 1:
            raise ValueError(f"data.{name}={value}: expected at least 1")
    if data.num_workers < 0 or not 0 <= data.max_reject_share < 1:
        raise ValueError(
            f"data.num_workers={data.num_workers}, data.max_reject_share={data.max_reject_share}: "
            "expected 0 or more workers, and a share from 0 to less than 1"
        )
    if not 0 <= data.spoken_share <= 1 or data.noises and not data.augment_audio:
        raise ValueError(
            f"data.spoken_share={data.spoken_share}, data.noises={data.noises}: expected a share "
            "from 0 to 1, and noises only with data.augment_audio=true"
        )
    if data.batch_size % process_count or data.num_shards % process_count:
        raise ValueError(
            f"{process_count} processes: data.batch_size={data.batch_size} and data.num_shards="
            f"{data.num_shards} must be multiples of that"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process {process_index} of {process_count}: expected a number below it")
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective!r}: expected one of {', '.join(OBJECTIVES)}")


def _fresh(num_sources):
    return {"counts": [0] * num_sources, "rejects": 0}
