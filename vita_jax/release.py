"""Published PyTorch folders to our checkpoint folder, and back.

Goes in: the release's folder, or a folder with what training starts from (Qwen2.5, InternViT and
audio-encoder folders). Comes out: a checkpoint (`checkpoint.py`), written slice by slice, so that
memory holds one published tensor at a time. `provenance.json` notes the file and the dtype of each
tensor, which is what the way back needs.
Source: the VITA-1.5 release's checkpoint layout. Read next: `release_config.py`, `tables.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import pickle
import re
import shutil
from pathlib import Path

import jax
import numpy as np

from vita_jax import checkpoint, tables
from vita_jax import params as trees
from vita_jax.checkpoint import DTYPES, Entry, Writer
from vita_jax.config import VitaConfig
from vita_jax.data.tokenizer import Tokenizer
from vita_jax.models import vita
from vita_jax.release_config import VISION, Settings, read_config, read_json

_AUDIO = "model.audio_encoder."
# What is put before the names in a folder's files, so that they are unique. Of a tensor in two
# folders the first counts: the main weights were trained on from the parts they began with.
_PREFIXES = {
    "main": "",
    "vision": VISION,
    "audio": _AUDIO,
    "decoder": "decoder/",
    "codec": "codec/",
}
_MODEL_TYPES = {"vita-Qwen2": "main", "qwen2": "main", "intern_vit_6b": "vision"}
# Buffers that are computed anew, counters, and layers that the release stores but does not run.
_UNUSED = re.compile(r"rotary_emb.*inv_freq$|\.pe$|num_batches_tracked$|^decoder/layers_prefix\.")
_CMVN = "audio/encoder/cmvn/"
# What may be absent where training starts; it is drawn from a seed then.
_TRAINED_LATER = ("vision/projector/", "audio/encoder/", "audio/adapter/", "audio/prompts")
_WEIGHTS = {".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".onnx", ".gguf", ".h5", ".msgpack"}
_SMALL_BYTES = 32 * 2**20
_TORCH_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

_RESEARCH_ONLY = """\
Converted from the weights of VITA-1.5, which stay under their authors' terms: academic, research
and education purposes only, no commercial or production use, with the authors' notice kept. The
language model in them is derived from Qwen2.5 (Apache License 2.0). The licence that was published
with the weights rules.
"""
_AS_PUBLISHED = """\
Converted from published weights, each under the licence it was published with; provenance.json says
which file a tensor comes from, and which parameters are random numbers.
"""


@dataclasses.dataclass(frozen=True)
class Stored(Entry):
    """One tensor of a published folder.

    Attributes:
      file: path below the folder.
      keys: its name in the file, or the keys of the nested dicts that lead to it.
    """

    file: str
    keys: tuple[str, ...]


def convert(source, target, seed: int = 0) -> dict:
    """Converts a published folder; all of it is checked before anything is written.

    Tensors keep their dtype. If the layers of a parameter differ, it gets the one that holds all.

    Args:
      source: folder of the release, or with Qwen2.5, InternViT and audio-encoder folders in it.
      target: checkpoint folder to write; must not exist, or be empty.
      seed: draws what a folder of the second kind lacks: projector, adapter, audio encoder.

    Returns:
      The provenance as written; its `notes` are for people, and logged too.

    Raises:
      FileNotFoundError: a file that is needed is not there.
      ModuleNotFoundError: there is a .pt file but no PyTorch.
      ValueError: tensors that are missing, extra or misshapen (all of them are named), an option
        that is not supported, an unreadable file, a vocabulary too large, a target in use.
    """
    source = Path(source)
    folders, is_release = _find(source)
    tokenizer = Tokenizer.load(folders["main"])
    files = _Files(source)
    found, overridden = files.inventory(folders)
    config, notes = read_config(folders, found)
    checkpoint.check_vocabulary(tokenizer, config, source)
    boxed = trees.flatten(vita.boxed_shapes(config))
    slots = tables.assign(_rules(config), {path: box.value for path, box in boxed.items()})

    stored = {slot.path for slot in slots if slot.published in found}
    computed = {} if _CMVN + "mean" in stored else _read_cmvn(folders["audio"], config)
    drawn = [] if is_release else _absent(boxed, stored)
    slots = [slot for slot in slots if slot.path not in computed and slot.path not in drawn]
    wanted = {slot.published: slot.published_shape for slot in slots}
    set_aside = sorted(n for n in found if n not in wanted and _may_be_set_aside(n, found[n]))
    used = {name: tensor for name, tensor in found.items() if name not in set_aside}
    checkpoint.refuse(checkpoint.mismatches(used, wanted), source)

    dtypes = {path: [np.dtype(np.float32)] for path in (*computed, *drawn)}
    for slot in slots:
        dtypes.setdefault(slot.path, []).append(DTYPES[found[slot.published].dtype])
    tensors = {
        path: jax.ShapeDtypeStruct(box.value.shape, functools.reduce(_wider, dtypes[path]))
        for path, box in boxed.items()
    }

    def values():
        for slot in slots:
            yield slot.path, slot.layer, slot.ours(files.read(found[slot.published]))
        for path, value in computed.items():
            yield path, None, value
        for path in drawn:
            yield path, None, vita.draw(path, boxed[path], seed)

    if drawn:
        groups = sorted({"/".join(path.split("/")[:2]) for path in drawn})
        notes.append(f"not in {source}, drawn from seed {seed}: {', '.join(groups)}")
    if set_aside:
        notes.append(f"{len(set_aside)} tensors set aside; provenance.json lists them")
    provenance = {
        "made_by": "vita convert",
        "trained": True,
        "source": source.resolve().name,
        "notes": notes,
        "drawn": drawn,
        "computed": list(computed),
        "set_aside": set_aside,
        "overridden": overridden,
        "tensors": {name: dataclasses.asdict(found[name]) for name in wanted},
    }
    licence = _RESEARCH_ONLY if is_release else _AS_PUBLISHED
    small = _small_files(source, folders)
    checkpoint.write(target, config, tensors, values(), tokenizer, provenance, licence, small)
    for note in notes:
        logging.getLogger(__name__).warning("%s", note)
    return provenance


def to_torch(folder, target) -> None:
    """Writes a converted checkpoint back: each tensor to the file, and in the dtype, it came from.

    Byte-equal to what was read, unless the parameters have been trained or quantized since. Those
    that came from no file (`drawn` and `computed` in the provenance) are left out.

    Args:
      folder: checkpoint made by `convert`.
      target: folder to write; must not exist, or be empty.

    Raises:
      FileNotFoundError, ValueError: as `checkpoint.open_folder`; a checkpoint of another origin; a
        target in use.
      ModuleNotFoundError: a .pt file has to be written and there is no PyTorch.
    """
    folder = Path(folder)
    config, parts = checkpoint.open_folder(folder)
    origins = read_json(folder / "provenance.json").get("tensors")
    if not origins:
        raise ValueError(f"{folder}: not made by `vita convert`, so it has no layout to go back to")
    by_file = {}
    for slot in tables.assign(_rules(config), trees.flatten(vita.param_shapes(config))):
        if slot.published in origins:
            origin = Stored(**origins[slot.published])
            by_file.setdefault(origin.file, []).append((slot, origin))

    def published(slot, origin):
        part, name = slot.path.split("/", 1)
        ours = checkpoint.read(parts[part], name, slot.layer)
        return slot.theirs(ours).astype(DTYPES[origin.dtype], copy=False)

    with checkpoint.new_folder(target) as new:
        shutil.copytree(folder / "source", new, dirs_exist_ok=True)
        for file, pairs in by_file.items():
            if not file.endswith(".safetensors"):
                _save_torch(new / file, ((o.keys, published(slot, o)) for slot, o in pairs))
                continue
            shapes = {o.keys[0]: jax.ShapeDtypeStruct(o.shape, DTYPES[o.dtype]) for _, o in pairs}
            writer = Writer(new / file, shapes, {"format": "pt"})
            with checkpoint.progress(file, writer.num_bytes) as advance:
                for slot, origin in pairs:
                    advance(writer.fill(origin.keys[0], published(slot, origin)))
        for index in new.rglob("*.safetensors.index.json"):
            _cut_index(index, {origin.keys[0] for pairs in by_file.values() for _, origin in pairs})


def _rules(config: VitaConfig):
    """The tables of all parts, under unique published names and full parameter paths."""
    audio = tables.AUDIO_ENCODER + tables.AUDIO_ADAPTER
    if config.audio.num_prompts:
        audio += tables.AUDIO_PROMPTS
    rules = tables.below(tables.LLM, "", "llm/")
    rules += tables.below(tables.VISION, VISION, "vision/")
    rules += tables.below(tables.PROJECTOR, "model.mm_projector.", "vision/")
    rules += tables.below(audio, _AUDIO, "audio/")
    if config.speech is not None:
        rules += tables.below(tables.SPEECH, _PREFIXES["decoder"], "speech/")
    if config.codec is not None:
        rules += tables.below(tables.codec_rules(config.codec), _PREFIXES["codec"], "codec/")
    return rules


def _absent(paths, stored) -> list[str]:
    """The parameters that are trained later and of whose group no tensor is stored."""
    groups = [
        [path for path in paths if path.startswith(prefix) and not path.startswith(_CMVN)]
        for prefix in _TRAINED_LATER
    ]
    return [path for group in groups if not stored & set(group) for path in group]


def _may_be_set_aside(name: str, tensor: Stored) -> bool:
    """Whether a tensor that the model does not have is no reason to stop.

    The audio encoder's file may hold what it was trained with: CTC, another LLM, task embeddings.
    """
    in_audio_file = name.startswith(_AUDIO) and tensor.file.endswith(".pt")
    return in_audio_file or tensor.dtype == "no tensor" or bool(_UNUSED.search(name))


def _wider(a, b):
    """The dtype that holds all values of both."""
    return a if a == b else np.dtype(np.float32)


def _find(source: Path):
    """{part: its folder}, told by the settings files, and whether the folder is the release's."""
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such folder")
    folders, model_types = {}, {}
    for folder in (source, *sorted(source.glob("*/")), *sorted(source.glob("*/*/"))):
        kind = None
        if (folder / "train.yaml").is_file():
            kind = "audio"
        elif (folder / "model.json").is_file() and folder.name in ("decoder", "codec"):
            kind = folder.name
        elif (folder / "config.json").is_file():
            settings = Settings(read_json(folder / "config.json"), f"{folder / 'config.json'}: ")
            model_types[folder] = str(settings.get("model_type", None))
            kind = _MODEL_TYPES.get(model_types[folder])
        if kind in folders:
            raise ValueError(f"{folders[kind]} and {folder} hold the same part; leave one of them")
        if kind:
            folders[kind] = folder
    if "main" not in folders:
        raise ValueError(
            f"{source}: no config.json whose model_type is vita-Qwen2 or qwen2, in it or below "
            f"(found: {', '.join(model_types.values()) or 'none'})"
        )
    if "audio" not in folders:
        raise ValueError(f"{source}: no train.yaml of the audio encoder in it or below")
    return folders, model_types[folders["main"]] == "vita-Qwen2"


def _small_files(source, folders):
    """(path below `source`, file) of what stands beside the weights."""
    for folder in folders.values():
        for file in sorted(folder.iterdir()):
            if file.is_file() and file.suffix not in _WEIGHTS:
                if file.stat().st_size < _SMALL_BYTES:
                    yield file.relative_to(source), file


class _Files:
    """The weight files of a published folder. The .pt file that was used last stays open."""

    def __init__(self, source: Path):
        self._source = source
        self._open = None, None

    def inventory(self, folders):
        """{unique name: Stored} of all files, values unread, and {file: names overridden}."""
        found, overridden = {}, {}
        for kind in (kind for kind in _PREFIXES if kind in folders):
            list_file = self._safetensors if kind in ("main", "vision") else self._torch_file
            for tensor in list_file(folders[kind]):
                keys = tensor.keys
                if len(keys) > 1 and keys[0] == "model":  # a state dict, or one beside other things
                    keys = keys[1:]
                name = _PREFIXES[kind] + ".".join(keys)
                if name in found:
                    overridden.setdefault(tensor.file, []).append(name)
                else:
                    found[name] = tensor
        return found, overridden

    def read(self, tensor: Stored) -> np.ndarray:
        """The values of a tensor, in its dtype."""
        if tensor.file.endswith(".safetensors"):
            return checkpoint.read(self._source / tensor.file, tensor.keys[0])
        value = functools.reduce(lambda node, key: node[key], tensor.keys, self._load(tensor.file))
        if tensor.dtype == "BF16":  # NumPy's is not PyTorch's; float32 holds both exactly
            return value.detach().float().numpy().astype(DTYPES["BF16"])
        return value.detach().numpy()

    def _safetensors(self, folder):
        names = set()
        for index in folder.glob("*.safetensors.index.json"):
            names |= set(Settings(read_json(index), f"{index}: ").get("weight_map").values())
        for file in sorted(folder / name for name in names) or sorted(folder.glob("*.safetensors")):
            name = str(file.relative_to(self._source))
            for key, entry in checkpoint.header(file).items():
                yield Stored(entry.shape, entry.dtype, name, (key,))

    def _torch_file(self, folder):
        if (folder / "final.pt").is_file():
            name = str((folder / "final.pt").relative_to(self._source))
            for keys, value in _leaves(self._load(name)):
                dtype = str(getattr(value, "dtype", "no tensor")).removeprefix("torch.")
                shape = tuple(getattr(value, "shape", ()))
                yield Stored(shape, _TORCH_DTYPES.get(dtype, dtype), name, keys)

    def _load(self, name):
        if self._open[0] != name:
            self._open = name, _load_torch(self._source / name)
        return self._open[1]


def _torch(file):
    try:
        import torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{file}: .pt files need PyTorch; pip install 'vita_jax[convert]'"
        ) from None
    return torch


def _load_torch(file) -> dict:
    """The dict in a .pt file. Its tensors stay on disk until they are used, and no code is run."""
    torch = _torch(file)
    try:
        tree = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{file}: refused; it holds more than tensors and plain values and could run code when "
            "it is read. Save its state dict alone"
        ) from None
    except (RuntimeError, EOFError, ValueError) as error:
        raise ValueError(
            f"{file}: not a whole file of torch.save, PyTorch 1.6 or later "
            f"({str(error).splitlines()[0]}); copy it again"
        ) from None
    if not isinstance(tree, dict):
        raise ValueError(f"{file}: expected a state dict, found {type(tree).__name__}")
    return tree


def _leaves(tree: dict, above=()):
    """(keys, value) of nested dicts."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*above, str(key)))
        else:
            yield (*above, str(key)), value


def _save_torch(file: Path, leaves) -> None:
    """Writes (keys, array) pairs as nested dicts of tensors."""
    torch, tree = _torch(file), {}
    for keys, value in leaves:
        node = functools.reduce(lambda node, key: node.setdefault(key, {}), keys[:-1], tree)
        exact = torch.from_numpy(np.array(value, np.float32, order="C"))
        node[keys[-1]] = exact.to(getattr(torch, value.dtype.name))
    torch.save(tree, file)


def _cut_index(file: Path, written) -> None:
    """Takes tensors that were not written out of an index of shards."""
    index = read_json(file)
    kept = {name: shard for name, shard in index["weight_map"].items() if name in written}
    if kept != index["weight_map"]:
        file.write_text(json.dumps({**index, "weight_map": kept}, indent=2), encoding="utf-8")


def _read_cmvn(folder: Path, config: VitaConfig) -> dict[str, np.ndarray]:
    """Mean and inverse deviation, float32[M], from the file `global_cmvn`; nothing without it.

    The file holds sums, sums of squares and their count, as JSON or as Kaldi's text matrix.
    """
    file = folder / "global_cmvn"
    if not file.is_file():
        return {}
    try:
        text = file.read_text(encoding="utf-8").strip()
        if text.startswith("{"):
            stats = json.loads(text)
            sums, squares, count = stats["mean_stat"], stats["var_stat"], stats["frame_num"]
        else:
            rows = [float(word) for word in text.strip("[]").split()]
            half = len(rows) // 2
            sums, count, squares = rows[: half - 1], rows[half - 1], rows[half:-1]
        mean = np.array(sums, np.float64) / count
        variance = np.array(squares, np.float64) / count - mean**2
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{file}: not JSON and not Kaldi's text ({error})") from None
    if mean.shape != (config.audio.num_mel_bins,):
        raise ValueError(
            f"{file}: holds {mean.size} mel bins, train.yaml says {config.audio.num_mel_bins}"
        )
    istd = np.maximum(variance, 1e-20) ** -0.5
    return {_CMVN + "mean": mean.astype(np.float32), _CMVN + "istd": istd.astype(np.float32)}
