"""Where raw samples come from: JSON over folders of files, folders of speech, TensorFlow Datasets.

Goes in: a name out of `DataConfig.mixture`. Comes out: a source of samples in the release's format,
read one at a time by index, whose files are ready to be read. Read next: `processor.py`, which
makes arrays of a sample, then `shard.py`.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import re
import tempfile
import typing
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

if typing.TYPE_CHECKING:
    from vita_jax.data.drawn import DrawnSource
    from vita_jax.data.splice import SplicedSource

MEDIA = ("image", "video", "audio", "recordings")  # keys of a sample that name files
SOUNDS = ("audio", "recordings")  # those that lie in the folder `audio`
SAMPLE_FILES = (".json", ".jsonl")
SET_FOLDERS = "folders.json"  # beside the samples, if pictures of some sets lie elsewhere
RECORDS = ("sample", "files")  # features of a record that `build.py` wrote: JSON, and its files
MANIFEST = "manifest.json"  # beside such records, and codec tokens
REJECTS = "rejects.jsonl"  # beside codec tokens: clips that could not be used
CLIPS = "manifest.jsonl"  # of a folder of speech
CONCEPTS = "concepts.json"  # of a folder of drawings
SPLICED = "#spliced"  # behind one with speech, too: clips that are put together
SOUND_FILES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a")
VERSION = "1.0.0"  # folder that they are in
MEMORY = Path("/dev/shm")  # a folder in memory, where there is one

# Which feature of a data set of any other make is what; the first that is there counts.
FEATURES = {
    "image": ("image",),
    "audio": ("audio", "speech"),
    "question": ("question", "instruction", "prompt"),
    "answer": ("answer", "caption", "text", "transcript", "label"),
}


def open_source(name: str) -> JsonSource | TfdsSource | SpeechSource | DrawnSource | SplicedSource:
    """The source of this name.

    Args:
      name: a file of samples (a JSON list, or JSON lines), a folder with such files, a folder that
        `vita data records` or `vita data codec-tokens` wrote, a folder of speech (`SpeechSource`)
        or `tfds:NAME`, both with an optional `#SPLIT` (else train), or a folder of drawings with
        `#KIND` (`drawn.DrawnSource`), or with `#spliced` (`splice.SplicedSource`).

    Raises:
      FileNotFoundError: there is no such file, folder or data set.
      ValueError: it holds no samples, or none in a format that we know.
    """
    if name.startswith("tfds:") or _data_set(name):
        return TfdsSource(name)
    if name.endswith(SPLICED):
        from vita_jax.data.splice import SplicedSource

        return SplicedSource(name)
    folder = Path(name.partition("#")[0])
    if (folder / CONCEPTS).is_file():
        from vita_jax.data.drawn import DrawnSource

        return DrawnSource(name)
    if (folder / CLIPS).is_file() or not any(folder.glob("*.json*")) and _sounds(folder):
        return SpeechSource(name)
    return JsonSource(name)


class JsonSource:
    """Samples in the release's format: objects in a JSON list or one on each line.

    The keys of a sample are those that `Processor.sample` takes and, ours, `recordings`: a list of
    sounds that each speak the first question (see `shard.spoken`). Pictures and videos lie in the
    folder of the file, or where a `folders.json` beside it says for their `set`; sounds lie in the
    folder's `audio`. Of JSON lines only the offsets are kept in memory.

    Attributes:
      name: as given to `open_source`.
      media: which of `MEDIA` any of its samples has.

    Source: the release's data loader.
    """

    def __init__(self, name: str):
        path = Path(name)
        if not path.exists():
            raise FileNotFoundError(f"{name}: no such file or folder of samples; check the path")
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        files = [f for f in files if f.suffix in SAMPLE_FILES]
        files = [f for f in files if f.name not in (SET_FOLDERS, MANIFEST, REJECTS)]
        self.name = name
        self._tables = [_Lines(f) if f.suffix == ".jsonl" else _List(f) for f in files]
        self._ends = np.cumsum([len(table) for table in self._tables])
        if not self._tables or not len(self):
            raise ValueError(f"{name}: no samples; expected a .json list or .jsonl, or a folder")
        self.media = frozenset().union(*(table.media for table in self._tables))

    def __reduce__(self):  # worker processes open it anew
        return JsonSource, (self.name,)

    def __len__(self):
        return int(self._ends[-1])

    @contextlib.contextmanager
    def open(self, index: int):
        """The sample, its files as absolute paths.

        Raises:
          ValueError: it is not an object, or its files are not named by texts.
        """
        number = bisect.bisect_right(self._ends, index)
        table = self._tables[number]
        sample = table[index - int(self._ends[number]) + len(table)]

        def place(kind, position, file):
            if kind in SOUNDS:
                return str(table.root / "audio" / file)
            sets = sample.get("set")
            name = sets[min(position, len(sets) - 1)] if isinstance(sets, list) and sets else sets
            home = table.folders.get(name, ".") if isinstance(name, str) else "."
            return str(table.root / home / file)

        yield with_files(sample, place)


class SpeechSource:
    """A folder of speech: sound files with what they say, as a sample each.

    Either a `manifest.jsonl` in the folder, an object a line: `file` in the folder, `text` that it
    says and, perhaps, its `split` and `voice`; `FOLDER#SPLIT` takes one split ("train"),
    `FOLDER#SPLIT:VOICE,VOICE` these voices of it. Or any sound files, each with its words in a text
    file of the same name (`a.wav`, `a.txt`), or without.

    Attributes:
      name: as given to `open_source`.
      media: "audio".
    """

    media = frozenset(["audio"])

    def __init__(self, name: str):
        self.name = name
        folder, _, part = name.partition("#")
        split, _, voices = part.partition(":")
        self._folder, self._clips = Path(folder).absolute(), []
        if (self._folder / CLIPS).is_file():
            for line in _Lines(self._folder / CLIPS):
                if not isinstance(line.get("file"), str):
                    raise ValueError(f"{folder}/{CLIPS}: {line}; expected an object with `file`")
                heard = not voices or line.get("voice") in voices.split(",")
                if heard and line.get("split", "train") == (split or "train"):
                    self._clips.append((line["file"], line.get("text", "")))
        else:
            files = _sounds(self._folder)
            self._clips = [(str(file.relative_to(self._folder)), None) for file in files]
        if not self._clips:
            raise ValueError(
                f"{name}: no speech in it; expected {CLIPS}, or files {', '.join(SOUND_FILES)}"
            )

    def __reduce__(self):
        return SpeechSource, (self.name,)

    def __len__(self):
        return len(self._clips)

    @contextlib.contextmanager
    def open(self, index: int):
        """The sample: a clip, and its words as the reply.

        Raises:
          OSError: the text file cannot be read.
        """
        file, text = self._clips[index]
        words = (self._folder / file).with_suffix(".txt")
        if text is None:
            text = words.read_text("utf-8").strip() if words.is_file() else ""
        turns = [{"from": "human", "value": "<audio>"}, {"from": "gpt", "value": text}]
        yield {"id": file, "audio": str(self._folder / file), "conversations": turns}


class TfdsSource:
    """Samples of a TensorFlow data set stored as ArrayRecord, read without TensorFlow.

    Either records that `vita data records` wrote, or any data set with an answer (`FEATURES` lists
    the names), perhaps asked about a picture (a file's bytes or an array), a sound (a file's bytes
    or samples at 16 kHz) or in words.

    Attributes:
      name: as given to `open_source`.
      media: which of `MEDIA` any of its samples has.
    """

    def __init__(self, name: str):
        import tensorflow_datasets as tfds

        self.name = name
        given, _, split = name.removeprefix("tfds:").partition("#")
        try:
            folder = _data_set(given)
            builder = tfds.builder_from_directory(folder) if folder else tfds.builder(given)
            self._rows = builder.as_data_source(split or "train")
        except (tfds.core.DatasetNotFoundError, FileNotFoundError) as error:
            reason = str(error).strip().splitlines()[0]
            raise FileNotFoundError(
                f"{name}: no such data set ({reason}); give a folder that holds one, or set "
                "TFDS_DATA_DIR to where data sets are"
            ) from None
        except (ValueError, NotImplementedError, ImportError) as error:  # Audio needs TensorFlow
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"{name}: cannot be read as ArrayRecord ({reason}); give the name of a data set "
                "stored so, or its folder"
            ) from None
        if not len(self._rows):
            raise ValueError(f"{name}: no samples")
        self._features = features = builder.info.features
        self._columns = {}
        if set(features) == set(RECORDS):
            manifest = json.loads(Path(builder.data_dir, MANIFEST).read_text())
            self.media = frozenset(kind for kind in MEDIA if manifest[kind])
            return
        for role, names in FEATURES.items():
            found = [column for column in names if column in features]
            self._columns.update({role: found[0]} if found else {})
        if "answer" not in self._columns:
            raise ValueError(
                f"{name}: features {', '.join(features)}; expected one of "
                f"{', '.join(FEATURES['answer'])} to learn"
            )
        self.media = frozenset(self._columns) & frozenset(MEDIA)

    def __reduce__(self):
        return TfdsSource, (self.name,)

    def __len__(self):
        return len(self._rows)

    @contextlib.contextmanager
    def open(self, index: int):
        """The sample; files that come as bytes lie in a folder in memory meanwhile.

        Raises:
          ValueError: it is not an object, or its files are not named by texts.
        """
        row = self._rows[index]
        place = MEMORY if MEMORY.is_dir() else None
        with tempfile.TemporaryDirectory(prefix="vita-", dir=place) as folder:
            try:
                yield self._converse(row, folder) if self._columns else _unpack(row, folder)
            except (ValueError, OSError) as error:
                raise ValueError(str(error).replace(folder + "/", "")) from error

    def _converse(self, row, folder):
        """A sample of one question and answer from the features of a row."""
        sample, text = {}, ""
        for kind, mark in (("image", "<image>\n"), ("audio", "<audio>")):
            if kind not in self._columns:
                continue
            value = row[self._columns[kind]]
            if isinstance(value, bytes):
                path = Path(folder, kind)
                path.write_bytes(value)
                sample[kind] = str(path)
            elif kind == "image":
                sample[kind] = value[..., 0] if value.shape[-1] == 1 else value
            else:
                is_float = np.asarray(value).dtype.kind == "f"
                sample[kind] = (np.asarray(value, None if is_float else np.int16), 16000)
            text += mark
        if "question" in self._columns:
            text += self._text(row, "question")
        answer = self._text(row, "answer")
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
        return sample | {"conversations": turns}

    def _text(self, row, role):
        """A feature as text, that of a class label its name, the first if there are several."""
        column = self._columns[role]
        value, feature = row[column], self._features[column]
        if hasattr(feature, "int2str"):
            return feature.int2str(value)
        while isinstance(value, (list, np.ndarray)):
            value = value[0] if len(value) else ""
        return value.decode() if isinstance(value, bytes) else str(value)


def _sounds(folder):
    """The sound files in a folder and those below it."""
    return sorted(f for f in folder.rglob("*") if f.suffix.lower() in SOUND_FILES)


def _data_set(name):
    """The folder of a data set that is given by its folder, with or without version; else None."""
    folders = (Path(name), Path(name, VERSION))
    return next((str(f) for f in folders if (f / "dataset_info.json").is_file()), None)


def with_files(sample: Mapping, place: Callable[[str, int, str], str]) -> dict:
    """The sample with every file replaced by `place(kind, index, file)`.

    Args:
      sample: in the release's format, its files named by texts.
      place: gets the key (one of `MEDIA`), the file's index among those, and its name.

    Raises:
      ValueError: the sample is not an object, or a file is not named by a text.
    """
    if not isinstance(sample, Mapping):
        raise ValueError(f"a sample is {str(sample)[:40]!r}; expected an object")
    out = dict(sample)
    for kind in MEDIA:
        value = sample.get(kind)
        if value is None:
            continue
        files = value if isinstance(value, list) else [value]
        several = {"video": files is not value, "recordings": files is value}
        if not (all(isinstance(file, str) for file in files) and several.get(kind, True)):
            raise ValueError(f"sample {sample.get('id', 'without id')}: {kind}={value!r}")
        placed = [place(kind, index, file) for index, file in enumerate(files)]
        out[kind] = placed if files is value else placed[0]
    return out


def _unpack(row, folder):
    """A sample out of a record, its files in `folder`."""
    for name, data in zip(row["files"]["name"], row["files"]["data"]):
        Path(folder, name.decode()).write_bytes(data)
    return with_files(json.loads(row["sample"]), lambda kind, index, file: str(Path(folder, file)))


class _Table:
    """Samples of one file, the folder they are in, and the folders of their sets."""

    def __init__(self, path):
        self.path, self.root = path, path.absolute().parent
        folders = self.root / SET_FOLDERS
        self.folders = json.loads(folders.read_text("utf-8")) if folders.is_file() else {}


class _List(_Table):
    """A JSON list."""

    def __init__(self, path):
        super().__init__(path)
        try:
            self._samples = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error}); expected a list of samples") from None
        if not isinstance(self._samples, list):
            raise ValueError(f"{path}: a JSON object; expected a list of samples")
        samples = [sample for sample in self._samples if isinstance(sample, dict)]
        self.media = {kind for kind in MEDIA if any(sample.get(kind) for sample in samples)}

    def __len__(self):
        return len(self._samples)

    def __getitem__(self, index):
        return self._samples[index]


class _Lines(_Table):
    """JSON lines: where each starts."""

    def __init__(self, path):
        super().__init__(path)
        starts, at, self.media = [], 0, set()
        key = re.compile(rb'"(image|video|audio|recordings)"\s*:\s*["\[]')
        with path.open("rb") as file:
            for line in file:
                if line.strip():
                    starts.append(at)
                    self.media.update(kind.decode() for kind in key.findall(line))
                at += len(line)
        self._starts = np.array(starts, np.int64)

    def __len__(self):
        return len(self._starts)

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError(index)
        with self.path.open("rb") as file:
            file.seek(int(self._starts[index]))
            line = file.readline()
        try:
            return json.loads(line)
        except ValueError as error:
            raise ValueError(f"{self.path}, line {index + 1}: not JSON ({error})") from None
