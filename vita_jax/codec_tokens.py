"""Speech to codec tokens: what the speech decoders learn to say.

Goes in: a checkpoint with a codec, and speech with its words, of which silence at the ends is
left out. Comes out, in a folder:

    tokens.jsonl     a record a clip: id, text, codes, global_tokens, seconds, index in the source
    rejects.jsonl    clips that could not be used, and why
    manifest.json    counts, use of the codebooks, and of which codec; there once all is done

Read next: `data/utterance.py`, which makes samples of the records.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import json
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress

from vita_jax import checkpoint, codebooks
from vita_jax.data.audio import trim
from vita_jax.data.collate import bucket
from vita_jax.data.sources import MANIFEST, REJECTS, open_source
from vita_jax.data.utterance import SILENCE_S, read_clip, words
from vita_jax.models.codec import Codec

RECORDS = "tokens.jsonl"
PLAN = "plan.json"  # what records are being made of; gone once all are there


def write(
    folder: str | Path,
    source: str,
    target: str | Path,
    batch_size: int = 8,
    progress: bool = False,
) -> dict:
    """Encodes the clips of `source`. If stopped, the same call goes on.

    Args:
      folder: checkpoint whose codec is used.
      source: as `sources.open_source` takes it; samples with one clip and its words.
      target: folder to write.
      batch_size: clips that are encoded at a time.
      progress: whether to draw a bar.

    Returns:
      What `manifest.json` holds: numbers of `clips`, `tokens` and `rejects`, `hours`, the use of
      the `codebook` and of the `global_codebooks` (see `codebooks.report`), and the `plan`.

    Raises:
      FileNotFoundError: there is no such checkpoint or source.
      ValueError: the checkpoint has no codec, `target` was begun with another codec or source, or
        not one clip can be used.
    """
    folder, target, clips = Path(folder), Path(target), open_source(source)
    config, params = checkpoint.load(folder, parts=("codec",))
    if config.codec is None:
        raise ValueError(f"{folder}: has no codec; name a checkpoint with one")
    plan = {"source": source, "clips": len(clips), "codec": _checksum(folder / "codec.safetensors")}
    manifest = target / MANIFEST
    begun = json.loads(manifest.read_text())["plan"] if manifest.is_file() else _read(target / PLAN)
    if begun not in (None, plan):
        raise ValueError(f"{target}: begun with {begun}, now {plan}; name another folder")
    if manifest.is_file():
        return json.loads(manifest.read_text())
    target.mkdir(parents=True, exist_ok=True)
    (target / PLAN).write_text(json.dumps(plan))
    done = [_lines(target / name) for name in (RECORDS, REJECTS)]
    last = max((line["index"] for lines in done for line in lines), default=0)
    start = last // batch_size * batch_size  # of the batch that may have been cut off
    for name in (RECORDS, REJECTS):
        _lines(target / name, start)

    encode = jax.jit(functools.partial(Codec(config.codec).apply, method="encode"))
    console = Console(stderr=True)
    columns = Progress.get_default_columns()
    with (
        open(target / RECORDS, "a", encoding="utf-8") as records,
        open(target / REJECTS, "a", encoding="utf-8") as rejects,
        concurrent.futures.ThreadPoolExecutor(2) as pool,
        Progress(*columns, console=console, disable=not progress) as bar,
    ):
        task = bar.add_task(target.name, total=len(clips), completed=start)
        for first in range(start, len(clips), batch_size):
            indices = range(first, min(first + batch_size, len(clips)))
            read = functools.partial(_read_sample, clips, config.codec.sample_rate_hz)
            found = list(pool.map(read, indices))
            good = [row for row in found if "waveform" in row]
            rejects.writelines(json.dumps(row) + "\n" for row in found if "waveform" not in row)
            if good:
                _encode(encode, params["codec"], config.codec, good, batch_size)
            records.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in good)
            for file in (records, rejects):
                file.flush()
            bar.advance(task, len(indices))

    made, bad = (_lines(target / name) for name in (RECORDS, REJECTS))
    if not made:
        raise ValueError(f"{source}: no clip can be used; the first: {bad[0]['reason']}")
    size = config.codec.num_codes
    codes = np.bincount(np.concatenate([row["codes"] for row in made]), minlength=size)
    groups = np.array([row["global_tokens"] for row in made]).T
    counts = np.stack([np.bincount(group, minlength=size) for group in groups])
    summary = {
        "clips": len(made),
        "tokens": int(codes.sum()),
        "hours": round(sum(row["seconds"] for row in made) / 3600, 4),
        "rejects": len(bad),
        "codebook": codebooks.report(codes),
        "global_codebooks": codebooks.report(counts),
        "plan": plan,
    }
    manifest.write_text(json.dumps(summary, indent=1))
    (target / PLAN).unlink()
    return summary


def voice(source: str, most: int = 1000) -> tuple[int, ...] | None:
    """The global tokens that clips of a voice have most often, of the first `most` records; None
    for records without.
    """
    records, found = open_source(source), []
    for index in range(min(len(records), most)):
        with records.open(index) as record:
            found.append(record.get("global_tokens"))
    if None in found:
        return None
    return tuple(int(np.bincount(group).argmax()) for group in np.array(found).T)


def _read_sample(clips, sample_rate_hz, index):
    """A record to be, its clip as `waveform`; or with the `reason` why there is none."""
    try:
        with clips.open(index) as sample:
            waveform, text = read_clip(sample, sample_rate_hz), words(sample)
            waveform = trim(waveform, sample_rate_hz, SILENCE_S, SILENCE_S)
            name = sample.get("id", index)
        if not text:
            raise ValueError(f"sample {name}: no words to its clip")
    except (ValueError, OSError) as error:
        return {"index": index, "reason": str(error)}
    seconds = round(len(waveform) / sample_rate_hz, 3)
    return {"index": index, "id": name, "text": text, "seconds": seconds, "waveform": waveform}


def _encode(encode, params, config, rows, batch_size):
    """Puts `codes` and `global_tokens` in the place of each row's `waveform`; the last token of a
    clip may hear some silence behind it.
    """
    unit = config.samples_per_token
    lengths = [-(-len(row["waveform"]) // unit) for row in rows]
    waveforms = np.zeros((batch_size, bucket(max(lengths), 40) * unit), np.float32)
    num_samples = np.full(batch_size, unit, np.int32)
    for at, (row, length) in enumerate(zip(rows, lengths)):
        clip = row.pop("waveform")
        waveforms[at, : len(clip)] = clip
        num_samples[at] = length * unit
    codes, global_tokens, _ = encode({"params": params}, waveforms, num_samples)
    codes, global_tokens = np.asarray(codes), np.asarray(global_tokens)
    for at, (row, length) in enumerate(zip(rows, lengths)):
        row["codes"] = codes[at, :length].tolist()
        row["global_tokens"] = global_tokens[at].tolist()


def _read(file):
    return json.loads(file.read_text()) if file.is_file() else None


def _lines(file, end=None):
    """The objects in a file, a cut-off line left out; from `index` `end` on they go out of it."""
    if not file.is_file():
        return []
    lines = [line for line in file.read_text("utf-8").splitlines(True) if line.endswith("\n")]
    rows = [json.loads(line) for line in lines]
    if end is not None:
        kept = [line for line, row in zip(lines, rows) if row["index"] < end]
        file.write_text("".join(kept), "utf-8")
    return rows


def _checksum(file):
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:16]
