"""vita_jax/data/starter.py: the first data set, its splits, and that every sample can be used."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from vita_jax.cli import main
from vita_jax.config import DataConfig, vita_tiny
from vita_jax.data.loader import Loader
from vita_jax.data.processor import Processor
from vita_jax.data.shard import spoken
from vita_jax.data.sources import open_source
from vita_jax.data.starter import COLOURS, SHAPES, starter
from vita_jax.data.tokenizer import byte_tokenizer

CLIPS = Path(__file__).parent / "data" / "speech"
KINDS = ("text", "captions", "qa", "speech", "noise")
SIZES = {"captions": 12, "qa": 24, "noise": 4}
PROCESSOR = Processor(vita_tiny(), byte_tokenizer())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("starter") / "data"
    starter(CLIPS, folder, sizes=SIZES)
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def samples(folder):
    source = open_source(str(folder))
    for index in range(len(source)):
        with source.open(index) as sample:
            yield sample


def question(sample):
    return sample["conversations"][0]["value"]


def answer(sample):
    return sample["conversations"][1]["value"]


def test_every_sample_can_be_used(made):
    for folder in (made, made / "held_out"):
        for kind in KINDS:
            for sample in samples(folder / kind):
                example = PROCESSOR.sample(sample)
                assert example.loss_mask.sum() >= 2, sample  # the state token and the end
                assert (example.tiles is not None) == (kind in ("captions", "qa"))
                assert len(example.audio) == (kind in ("speech", "noise"))


def test_all_speech_is_long_enough_for_ctc(made):
    mixture = {str(made / "speech"): 1.0, str(made / "held_out" / "speech"): 0.2}
    data = DataConfig(
        mixture=mixture, batch_size=8, max_tokens=128, max_audio_frames=300, num_shards=8
    )
    loader = Loader(data, PROCESSOR, objective="ctc")
    while loader.epoch < 1:
        next(loader)
    assert loader.num_rejects == 0


def test_manifest_counts_what_is_there(made):
    manifest = json.loads((made / "manifest.json").read_text())
    numbers = {
        folder: len(lines(made / folder / "samples.jsonl")) for folder in manifest["samples"]
    }
    assert numbers == manifest["samples"]
    assert numbers["captions"] == 12 and numbers["held_out/captions"] == 3
    rows = lines(CLIPS / "manifest.jsonl")
    for folder, split in (("speech", "train"), ("held_out/speech", "held_out")):
        assert numbers[folder] == sum(row["split"] == split for row in rows) > 30
    assert "MIT" in str(manifest["sources"]) and str(CLIPS.parent) not in str(manifest)


def test_nothing_held_out_is_trained_on(made):
    held_out = made / "held_out"
    asked = {question(sample) for sample in samples(made / "text")}
    assert asked.isdisjoint(question(sample) for sample in samples(held_out / "text"))
    for kind in ("captions", "qa"):
        names = {path.read_bytes() for path in (made / kind).glob("*.png")}
        assert len(names) > 5
        assert names.isdisjoint(path.read_bytes() for path in (held_out / kind).glob("*.png"))
    train = {p.name for p in made.glob("[!h]*/audio/*.ogg")}
    clips = {p.name for p in held_out.glob("*/audio/*.ogg")}
    assert train and clips and train.isdisjoint(clips)
    voices = {row["file"].split("/")[-1]: row["voice"] for row in lines(CLIPS / "manifest.jsonl")}
    assert {voices[name] for name in train}.isdisjoint(voices[name] for name in clips)


def test_captions_say_what_the_picture_shows(made):
    """Against easy-vqa's other questions about the same picture."""
    import easy_vqa

    questions, answers, pictures = easy_vqa.get_train_questions()
    truth = {}
    for asked, told, picture in zip(questions, answers, pictures):
        truth.setdefault(picture, {})[asked] = told
    languages = set()
    for sample in samples(made / "captions"):
        told = truth[int(Path(sample["image"]).stem)]
        caption = answer(sample)
        colour = next(c for c in COLOURS if c in caption or COLOURS[c] in caption)
        shape = next(s for s in SHAPES if s in caption or SHAPES[s] in caption)
        languages.add(caption.isascii())
        for asked, said in told.items():
            if asked.startswith(("is there a ", "is a ", "does the image contain a ")):
                thing = asked.split(" a ")[1].split()[0].rstrip("?")
                assert (said == "yes") == (thing in (colour, shape)), (asked, caption)
    assert languages == {True, False}


def test_recordings_speak_the_question(made):
    rows = lines(CLIPS / "manifest.jsonl")
    text = {row["file"].split("/")[-1]: row["text"].lower() for row in rows}
    asked = [sample for sample in samples(made / "qa") if "recordings" in sample]
    assert len(asked) > len(list(samples(made / "qa"))) / 2
    for sample in asked:
        said = question(sample).removeprefix("<image>\n").lower()
        assert {text[Path(file).name] for file in sample["recordings"]} == {said}
    example = PROCESSOR.sample(spoken(asked[0], np.random.default_rng(0)))
    assert len(example.audio) == 1 and example.tiles is not None


def test_the_same_seed_writes_the_same_bytes(made, tmp_path):
    for seed in (0, 1):
        starter(CLIPS, tmp_path / str(seed), seed=seed, sizes=SIZES)

    def files(folder):
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}

    assert files(tmp_path / "0") == files(made)
    assert files(tmp_path / "1")["qa/samples.jsonl"] != files(made)["qa/samples.jsonl"]


def test_on_the_command_line(tmp_path, capsys):
    assert main(["data", "starter", str(CLIPS), str(tmp_path / "new")]) == 0
    assert "240 qa" in capsys.readouterr().out
    assert main(["data", "starter", str(CLIPS), str(tmp_path / "new")]) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"file": "a.ogg", "text": "x"}', "line 2: KeyError.*split"),
        ('{"file": "a.ogg", "text": "x", "split": "test"}', "'test'.*or held_out"),
        ("[", "line 2: .*expected an object"),
        (
            '{"file": "b/a.ogg", "text": "x", "split": "held_out"}',
            "line 2: a second a.ogg; files need different names",
        ),
        ("", "no clip of split held_out; mark"),
    ],
)
def test_what_is_no_folder_of_clips(tmp_path, line, message):
    good = '{"file": "a.ogg", "text": "x", "split": "train"}'
    (tmp_path / "manifest.jsonl").write_text(f"{good}\n{line}")
    with pytest.raises(ValueError, match=message):
        starter(tmp_path, tmp_path / "data")
    with pytest.raises(FileNotFoundError, match="no such file; give a folder of clips"):
        starter(tmp_path / "gone", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_clip_that_is_not_there(tmp_path):
    shutil.copy(CLIPS / "manifest.jsonl", tmp_path)
    with pytest.raises(FileNotFoundError, match="clips/"):
        starter(tmp_path, tmp_path / "data", sizes={})
    assert not (tmp_path / "data").exists()
