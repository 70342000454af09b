"""Data sets made once, read many times: a folder of samples as sharded ArrayRecord.

Goes in: samples over folders of files. Comes out: a TensorFlow data set that is read without
TensorFlow, each record a sample with the bytes of its files. Read next: `sources.py`, which reads
it. (Not a `GeneratorBasedBuilder`: that writes in one process, and from the start after a stop.)
"""

from __future__ import annotations

import concurrent.futures
import functools
import json
import multiprocessing
import os
import re
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from vita_jax.data.audio import SAMPLE_RATE_HZ, read_audio
from vita_jax.data.image import read_image
from vita_jax.data.loader import end_with_parent
from vita_jax.data.sources import MANIFEST, MEDIA, RECORDS, VERSION, JsonSource, with_files
from vita_jax.data.video import read_video

PLAN = "plan.json"  # what a build that is not over yet is making


def records(
    source: str,
    target: str | Path,
    num_shards: int | None = None,
    num_processes: int | None = None,
    progress: bool = False,
) -> dict:
    """Writes the samples of `source` as a data set in `target`/1.0.0, several shards at a time.

    A build that was stopped goes on where it was when it is started again: whole shards stay. Every
    picture, sound and video is decoded once; samples with one that cannot be are left out and named
    in `rejects.jsonl`.

    Args:
      source: a file or folder as `sources.JsonSource` reads it.
      target: folder of the data set; its name is the data set's, lower-case letters, digits and _.
      num_shards: files to write; None for one for each 1,000 samples.
      num_processes: how many work at a time; None for one a core.
      progress: whether to draw a bar.

    Returns:
      What `manifest.json` holds: numbers of `samples`, of files of each kind (`image`, `video`,
      `audio`, `recordings`) and of `rejects`, `hours` of sound and `bytes` of records.

    Raises:
      FileNotFoundError: there is no such source.
      ValueError: the name is no name for a data set, the data set is there already or was begun
        with other settings, or there is not one good sample.
    """
    samples, target = JsonSource(str(source)), Path(target)
    name, folder = target.absolute().name, target / VERSION
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"{target}: a data set's name is lower-case letters, digits and _")
    if (folder / "dataset_info.json").exists():
        raise ValueError(f"{folder}: the data set is there already; remove it or name another")
    num_shards = num_shards or -(-len(samples) // 1000)
    if not 1 <= num_shards <= len(samples):
        raise ValueError(f"{num_shards} shards: expected 1 to {len(samples)}, one a sample")
    folder.mkdir(parents=True, exist_ok=True)
    plan = {"source": str(Path(source).absolute()), "samples": len(samples), "shards": num_shards}
    if (folder / PLAN).exists() and (begun := json.loads((folder / PLAN).read_text())) != plan:
        raise ValueError(f"{folder}: begun with {begun}, now {plan}; go on as begun or remove it")
    (folder / PLAN).write_text(json.dumps(plan))

    write = functools.partial(_write_shard, samples, folder, name, num_shards)
    with concurrent.futures.ProcessPoolExecutor(
        num_processes or os.cpu_count(),
        multiprocessing.get_context("spawn"),
        initializer=end_with_parent,
    ) as pool:
        made = pool.map(write, range(num_shards))
        console = Console(stderr=True)
        made = track(made, "shards", num_shards, console=console, disable=not progress)
        shards = list(made)
    return _finish(folder, name, shards)


def _write_shard(samples, folder, name, num_shards, shard):
    """Writes one file of records, if it is not there, and returns its counts and rejects."""
    path = folder / _file_name(name, shard, num_shards)
    report = path.with_name(path.name + ".json")
    if report.exists():
        return json.loads(report.read_text("utf-8"))
    from array_record.python.array_record_module import ArrayRecordWriter

    features = _features()
    serialize = _serializer(features)
    made = {"samples": 0, **dict.fromkeys(MEDIA, 0), "seconds": 0.0, "rejects": []}
    part = path.with_name(path.name + ".part")
    writer = ArrayRecordWriter(str(part), "group_size:1")
    # Neighbours stay neighbours, so that records come in the order of the samples.
    for index in range(
        shard * len(samples) // num_shards, (shard + 1) * len(samples) // num_shards
    ):
        try:
            with samples.open(index) as sample:
                record, numbers = _pack(sample)
        except (ValueError, OSError) as error:
            made["rejects"].append({"index": index, "reason": str(error)})
            continue
        writer.write(serialize(features.encode_example(record)))
        made["samples"] += 1
        for key, number in numbers.items():
            made[key] += number
    writer.close()
    made["bytes"] = part.stat().st_size
    part.replace(path)
    part.write_text(json.dumps(made, ensure_ascii=False), "utf-8")
    part.replace(report)  # last: a shard with a report is whole
    return made


def _pack(sample):
    """A record of a sample, and how many files of each kind and seconds of sound it has."""
    files, numbers = [], dict.fromkeys((*MEDIA, "seconds"), 0)

    def pack(kind, index, path):
        if kind == "image":
            read_image(path)
        elif kind == "video":
            read_video(path)
        else:
            numbers["seconds"] += len(read_audio(path)) / SAMPLE_RATE_HZ
        numbers[kind] += 1
        files.append({"name": f"{len(files)}-{Path(path).name}", "data": Path(path).read_bytes()})
        return files[-1]["name"]

    text = json.dumps(with_files(sample, pack), ensure_ascii=False)
    return {"sample": text, "files": files}, numbers


def _finish(folder, name, shards):
    """Writes what makes a data set of the shards, and removes what was for going on."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.naming import ShardedFileTemplate

    rejects = [reject for shard in shards for reject in shard["rejects"]]
    total = {key: sum(shard[key] for shard in shards) for key in ("samples", *MEDIA, "bytes")}
    if not total["samples"]:
        raise ValueError(f"{folder}: not one good sample; the first: {rejects[0]['reason']}")
    manifest = {
        **total,
        "hours": round(sum(shard["seconds"] for shard in shards) / 3600, 4),
        "rejects": len(rejects),
    }
    lines = [json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects]
    (folder / "rejects.jsonl").write_text("".join(lines), "utf-8")
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    template = ShardedFileTemplate(
        data_dir=folder, dataset_name=name, split="train", filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo(
        name="train",
        shard_lengths=[shard["samples"] for shard in shards],
        num_bytes=manifest["bytes"],
        filename_template=template,
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=_features(),
        split_infos=[split],
        version=VERSION,
        check_data=False,  # by TensorFlow
    )
    for shard in range(len(shards)):
        (folder / (_file_name(name, shard, len(shards)) + ".json")).unlink()
    (folder / PLAN).unlink()
    return manifest


def _file_name(name, shard, num_shards):
    """As TensorFlow Datasets names them."""
    return f"{name}-train.array_record-{shard:05d}-of-{num_shards:05d}"


def _features():
    """Of a record: the sample as JSON, and the files that it names."""
    import tensorflow_datasets as tfds

    file = {
        "name": tfds.features.Text(),
        "data": tfds.features.Tensor(shape=(), dtype=np.object_),
    }
    sample, files = RECORDS
    return tfds.features.FeaturesDict(
        {sample: tfds.features.Text(), files: tfds.features.Sequence(file)}
    )


def _serializer(features):
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    return ExampleSerializer(features.get_serialized_info()).serialize_example
