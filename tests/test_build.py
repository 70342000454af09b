"""vita_jax/data/build.py: records of samples, read back; stopped builds; bad samples."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
from PIL import Image

from vita_jax.cli import main
from vita_jax.config import DataConfig, vita_tiny
from vita_jax.data.build import records
from vita_jax.data.loader import Loader
from vita_jax.data.processor import Processor
from vita_jax.data.sources import open_source
from vita_jax.data.tokenizer import byte_tokenizer

PROCESSOR = Processor(vita_tiny(), byte_tokenizer())


@pytest.fixture
def folder(tmp_path):
    """Twelve samples over pictures and sounds."""
    root = tmp_path / "samples"
    (root / "audio").mkdir(parents=True)
    rng = np.random.default_rng(0)
    samples = []
    for i in range(12):
        Image.fromarray(rng.integers(0, 255, (28, 28, 3), np.uint8)).save(root / f"{i}.jpg")
        soundfile.write(root / "audio" / f"{i}.flac", 0.1 * rng.standard_normal(9000), 9000)
        files = [{}, {"image": f"{i}.jpg"}, {"image": [f"{i}.jpg"] * 2, "audio": [f"{i}.flac"]}]
        text = ["Hi", "<image>\nHi", "<image><image>\n<audio>"][i % 3]
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": f"你好 {i}"}]
        if i % 3 == 0:
            files[0] = {"recordings": [f"{i}.flac"]}
        samples.append({"id": i, "set": "any", "conversations": turns, **files[i % 3]})
    (root / "samples.json").write_text(json.dumps(samples))
    return root


def settings(name):
    return DataConfig(
        mixture={str(name): 1.0},
        batch_size=2,
        max_tokens=1800,
        max_audio_frames=128,
        num_shards=2,
        spoken_share=0.5,
    )


def test_batches_from_records_equal_those_from_files(folder, tmp_path):
    manifest = records(folder, tmp_path / "my_set", num_shards=3, num_processes=2)
    assert manifest.pop("bytes") > 10_000
    assert manifest == {
        "samples": 12, "image": 12, "video": 0, "audio": 4, "recordings": 4, "hours": 0.0022,
        "rejects": 0,
    }  # fmt: skip
    files = sorted(path.name for path in (tmp_path / "my_set" / "1.0.0").iterdir())
    assert files == [
        "dataset_info.json", "features.json", "manifest.json",
        *(f"my_set-train.array_record-0000{i}-of-00003" for i in range(3)), "rejects.jsonl",
    ]  # fmt: skip
    expected = Loader(settings(folder), PROCESSOR)
    for name in (f"tfds:{tmp_path / 'my_set' / '1.0.0'}", tmp_path / "my_set"):
        loader = Loader(settings(name), PROCESSOR)
        expected.restore(Loader(settings(folder), PROCESSOR).state())
        for _ in range(5):
            batch, other = next(loader), next(expected)
            for field, a in vars(batch).items():
                b = getattr(other, field)
                assert (a is b is None) or a.dtype == b.dtype and a.tobytes() == b.tobytes(), field


def test_by_name_and_without_tensorflow(folder, tmp_path):
    records(folder, tmp_path / "named", num_shards=1, num_processes=1)
    code = (
        "import sys; from vita_jax.data.sources import open_source\n"
        "source = open_source('tfds:named')\n"
        "with source.open(11) as sample: print(len(source), sample['id'], sorted(source.media))\n"
        "assert 'tensorflow' not in sys.modules"
    )
    environment = {"TFDS_DATA_DIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert run.stdout.strip() == "12 11 ['audio', 'image', 'recordings']", run.stderr


def test_a_stopped_build_goes_on(folder, tmp_path, monkeypatch):
    from vita_jax.data import build

    whole = records(folder, tmp_path / "whole" / "my_set", num_shards=4, num_processes=1)
    target = tmp_path / "my_set" / "1.0.0"
    monkeypatch.setattr(build, "_finish", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception, match="killed"):
        records(folder, tmp_path / "my_set", num_shards=4, num_processes=1)
    monkeypatch.undo()
    names = [f"my_set-train.array_record-0000{i}-of-00004" for i in range(4)]
    # As if it had been killed within shards 2 and 3: one not begun, one begun.
    for name in names[2:]:
        (target / (name + ".json")).unlink()
    (target / names[3]).rename(target / (names[3] + ".part"))
    kept = (target / names[0]).stat().st_mtime_ns
    with pytest.raises(ValueError, match="begun with .*'shards': 4.* go on as begun"):
        records(folder, tmp_path / "my_set", num_shards=3, num_processes=1)
    manifest = records(folder, tmp_path / "my_set", num_shards=4, num_processes=1)
    del manifest["bytes"], whole["bytes"]  # the order of fields in a record is left open
    assert manifest == whole and manifest["samples"] == 12
    assert (target / names[0]).stat().st_mtime_ns == kept
    source = open_source(str(target))
    for index in range(12):
        with source.open(index) as sample:
            assert sample["id"] == index
    assert not [path for path in target.iterdir() if path.suffix in (".part", ".json")
                and path.name.startswith("my_set")]  # fmt: skip
    with pytest.raises(ValueError, match="there already"):
        records(folder, tmp_path / "my_set")


def test_a_killed_build_goes_on(folder, tmp_path):
    samples = json.loads((folder / "samples.json").read_text())
    (folder / "samples.json").write_text(json.dumps(samples * 50))
    target = tmp_path / "my_set" / "1.0.0"
    command = [sys.executable, "-m", "vita_jax", "data", "records", str(folder)]
    command += [str(tmp_path / "my_set"), "--shards", "60", "--processes", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    build = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while not (reports := list(target.glob("my_set*.json"))):
        assert build.poll() is None
        time.sleep(0.01)
    build.kill()
    build.wait()
    assert not (target / "dataset_info.json").exists() and len(reports) < 60
    kept = {path: path.with_suffix("").stat().st_mtime_ns for path in reports}
    assert main(command[3:]) == 0
    assert all(path.with_suffix("").stat().st_mtime_ns == at for path, at in kept.items())
    source = open_source(str(target))
    assert len(source) == 600
    for index in range(600):
        with source.open(index) as sample:
            assert sample["id"] == index % 12


def test_bad_samples_are_named_in_rejects(folder, tmp_path, capsys):
    (folder / "4.jpg").write_bytes((folder / "4.jpg").read_bytes()[:300])
    (folder / "audio" / "8.flac").unlink()
    assert main(["data", "records", str(folder), str(tmp_path / "my_set"), "--shards", "2"]) == 0
    assert "10 samples" in capsys.readouterr().out
    made = tmp_path / "my_set" / "1.0.0"
    rejects = [json.loads(line) for line in (made / "rejects.jsonl").read_text().splitlines()]
    assert [reject["index"] for reject in rejects] == [4, 8]
    assert "4.jpg" in rejects[0]["reason"] and "8.flac: no such sound" in rejects[1]["reason"]
    assert json.loads((made / "manifest.json").read_text())["rejects"] == 2
    source = open_source(str(tmp_path / "my_set"))
    with source.open(9) as sample:
        assert len(source) == 10 and sample["id"] == 11


def test_nothing_to_build(folder, tmp_path, capsys):
    assert main(["data", "records", str(tmp_path / "gone"), str(tmp_path / "my_set")]) == 2
    assert "gone: no such file or folder" in capsys.readouterr().err
    with pytest.raises(ValueError, match="lower-case letters"):
        records(folder, tmp_path / "My-Set")
    with pytest.raises(ValueError, match="13 shards: expected 1 to 12"):
        records(folder, tmp_path / "my_set", num_shards=13)
    for i in range(12):
        (folder / f"{i}.jpg").unlink(missing_ok=True)
    samples = json.loads((folder / "samples.json").read_text())
    (folder / "samples.json").write_text(json.dumps([samples[1], samples[2]]))
    with pytest.raises(ValueError, match="not one good sample; the first: .*1.jpg: no such"):
        records(folder, tmp_path / "my_set", num_processes=1)
