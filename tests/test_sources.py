"""vita_jax/data/sources.py: samples from JSON files and folders, and from TensorFlow Datasets."""

import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from vita_jax.config import vita_tiny
from vita_jax.data.processor import Processor
from vita_jax.data.sources import open_source, with_files
from vita_jax.data.tokenizer import byte_tokenizer

PROCESSOR = Processor(vita_tiny(), byte_tokenizer())


def talk(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def samples_of(source):
    out = []
    for index in range(len(source)):
        with source.open(index) as sample:
            out.append(sample)
    return out


def write(path, samples):
    lines = path.suffix == ".jsonl"
    text = "\n\n".join(map(json.dumps, samples)) if lines else json.dumps(samples)
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_files_of_a_sample(tmp_path, name):
    samples = [
        {"id": 0, "conversations": talk("Q", "A")},
        {"image": "a.png", "set": "far", "audio": "q.wav"},
        {"image": ["a.png", "b.png"], "set": ["near", "far"], "audio": ["q.wav", "/r.wav"]},
        {"video": "v.mp4", "set": "far"},
        {"image": None, "conversations": talk('"audio": "x"', "你好")},
    ]
    path = write(tmp_path / name, samples)
    (tmp_path / "folders.json").write_text('{"far": "else/where"}')
    source = open_source(path)
    assert len(source) == 5 and source.media == {"image", "video", "audio"}
    far = tmp_path / "else/where"
    text, spoken, several, film, empty = samples_of(source)
    assert text == samples[0] and empty == samples[4]
    assert spoken["image"] == str(far / "a.png") and spoken["set"] == "far"
    assert spoken["audio"] == str(tmp_path / "audio/q.wav")
    assert several["image"] == [str(tmp_path / "a.png"), str(far / "b.png")]
    assert several["audio"] == [str(tmp_path / "audio/q.wav"), "/r.wav"]
    assert film["video"] == str(far / "v.mp4")
    assert samples_of(pickle.loads(pickle.dumps(source))) == samples_of(source)


def test_folder_of_sample_files(tmp_path):
    for name, ids in (("b.json", [3, 4]), ("a.jsonl", [0, 1, 2]), ("c.jsonl", []), ("d.json", [5])):
        write(tmp_path / name, [{"id": i, "conversations": talk("Q", "A")} for i in ids])
    (tmp_path / "notes.txt").write_text("not samples")
    source = open_source(str(tmp_path))
    assert [sample["id"] for sample in samples_of(source)] == [0, 1, 2, 3, 4, 5]
    assert source.media == frozenset()


def test_media_are_found_by_key_alone(tmp_path):
    samples = [{"from": "audio", "conversations": talk('{"image": "x"}', '"video":')}]
    for name in ("a.json", "a.jsonl"):
        assert open_source(write(tmp_path / name, samples)).media == frozenset()
    assert open_source(write(tmp_path / "b.jsonl", [{"image": ["x"]}])).media == {"image"}


def test_what_is_no_source(tmp_path):
    write(tmp_path / "empty.json", [])
    (tmp_path / "object.json").write_text("{}")
    (tmp_path / "broken.json").write_text("[1,")
    for name, error, message in (
        ("gone", FileNotFoundError, "no such file or folder of samples"),
        ("empty.json", ValueError, "no samples; expected"),
        ("object.json", ValueError, "a JSON object; expected a list"),
        ("broken.json", ValueError, "broken.json: not JSON"),
    ):
        with pytest.raises(error, match=message):
            open_source(str(tmp_path / name))
    for name, error, message in (
        ("tfds:no_such_set", FileNotFoundError, "no such data set .*TFDS_DATA_DIR"),
        (f"tfds:{tmp_path}/no_such_set", ValueError, "or its folder"),
    ):
        with pytest.raises(error, match=message) as caught:
            open_source(name)
        assert "\n" not in str(caught.value)


def test_samples_that_are_none(tmp_path):
    source = open_source(
        write(
            tmp_path / "a.json", [7, {"image": [1]}, {"id": 2, "video": ["v"]}, {"recordings": "r"}]
        )
    )
    for index, message in enumerate(
        ("a sample is '7'", r"image=\[1\]", r"sample 2: video=\['v'\]")
    ):
        with pytest.raises(ValueError, match=message), source.open(index):
            pass


def test_with_files():
    seen = []
    sample = {"audio": ["a", "b"], "recordings": ["d"], "image": "c", "conversations": []}
    out = with_files(sample, lambda *place: seen.append(place) or f"{place[1]}{place[2]}")
    assert out == {"audio": ["0a", "1b"], "recordings": ["0d"], "image": "0c", "conversations": []}
    assert seen == [("image", 0, "c"), ("audio", 0, "a"), ("audio", 1, "b"), ("recordings", 0, "d")]
    assert sample["audio"] == ["a", "b"]


# TensorFlow Datasets


def build(folder, features, rows, name):
    """A data set of these rows, made by TensorFlow Datasets itself; returns its folder."""
    import tensorflow_datasets as tfds

    made = tfds.features.FeaturesDict(features)

    class Built(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("2.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=made)

        def _split_generators(self, _):
            return {"train": self._generate_examples(), "test": self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate(rows)

    Built.name = name
    builder = Built(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare()
    return str(builder.data_path)


def png(pixels):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


@pytest.mark.parametrize("kind", ["Image", "Tensor"])
def test_questions_about_pictures(tmp_path, kind):
    import tensorflow_datasets as tfds

    f = tfds.features
    pixels = np.random.default_rng(0).integers(0, 255, (28, 28, 3), np.uint8)
    features = {
        "image": f.Image() if kind == "Image" else f.Tensor(shape=(), dtype=np.object_),
        "question": f.Text(),
        "answer": f.Sequence(f.Text()),
        "id": f.Scalar(np.int32),
    }
    (tmp_path / "cat.png").write_bytes(png(pixels))
    image = str(tmp_path / "cat.png") if kind == "Image" else png(pixels)
    row = {"image": image, "question": "What?", "answer": ["A cat.", "Cat"], "id": 3}
    folder = build(tmp_path, features, [row] * 2, "vqa")
    for name in (f"tfds:{folder}", f"tfds:{folder}#test", folder):
        source = open_source(name)
        assert len(source) == 2 and source.media == {"image"}
        with source.open(1) as sample:
            made = PROCESSOR.sample(sample)
    turns = talk("<image>\nWhat?", "A cat.")
    expected = PROCESSOR.sample({"image": pixels, "conversations": turns})
    np.testing.assert_array_equal(made.tokens, expected.tokens)
    np.testing.assert_array_equal(made.tiles, expected.tiles)
    with pytest.raises(ValueError, match="cannot be read"):
        open_source(f"tfds:{folder}#validation")


def test_labels_of_arrays(tmp_path):
    import tensorflow_datasets as tfds

    f = tfds.features
    features = {
        "image": f.Tensor(shape=(28, 28, 1), dtype=np.uint8),
        "label": f.ClassLabel(names=["cat", "dog"]),
    }
    pixels = np.arange(28 * 28, dtype=np.uint8).reshape(28, 28, 1)
    source = open_source(build(tmp_path, features, [{"image": pixels, "label": 1}], "pets"))
    with source.open(0) as sample:
        assert sample["conversations"] == talk("<image>\n", "dog")
        assert PROCESSOR.sample(sample).tiles.shape == (1, 28, 28, 3)


def test_transcribed_speech(tmp_path):
    import tensorflow_datasets as tfds

    f = tfds.features
    features = {"speech": f.Tensor(shape=(None,), dtype=np.int16), "text": f.Text()}
    sound = np.random.default_rng(0).integers(-900, 900, 16000).astype(np.int16)
    source = open_source(build(tmp_path, features, [{"speech": sound, "text": "你好"}], "asr"))
    assert source.media == {"audio"}
    with source.open(0) as sample:
        made = PROCESSOR.sample(sample)
    turns = talk("<audio>", "你好")
    expected = PROCESSOR.sample({"audio": (sound, 16000), "conversations": turns})
    np.testing.assert_array_equal(made.tokens, expected.tokens)
    np.testing.assert_array_equal(made.audio[0], expected.audio[0])


def test_a_data_set_without_an_answer(tmp_path):
    import tensorflow_datasets as tfds

    features = {"image": tfds.features.Tensor(shape=(), dtype=np.object_)}
    folder = build(tmp_path, features, [{"image": b"x"}], "mute")
    with pytest.raises(ValueError, match="features image; expected one of answer, caption, text"):
        open_source(folder)
