"""vita_jax/data/collate.py: padding put on and taken off."""

import functools
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from vita_jax import objectives
from vita_jax.config import load_config, vita_tiny
from vita_jax.data import synthetic
from vita_jax.data.collate import bucket, collate, cut, sizes
from vita_jax.data.processor import Processor
from vita_jax.data.tokenizer import byte_tokenizer
from vita_jax.models.vita import Vita, init_params

ROOT = pathlib.Path(objectives.__file__).parents[1]
TINY = Processor(vita_tiny(), byte_tokenizer())
SQUARE = Image.new("RGB", (28, 28), "red")  # one tile
WIDE = Image.new("RGB", (56, 28), "blue")  # two tiles and a thumbnail


def sound(seconds):
    return np.sin(np.arange(int(16000 * seconds)) / 9).astype(np.float32), 16000


def test_bucket():
    assert [bucket(n) for n in range(1, 14)] == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]
    assert [bucket(n, 128) for n in (1, 128, 129, 257, 385, 769)] == [128, 128, 256, 384, 512, 1024]


def test_collate():
    turns = [{"from": "human", "value": "<audio><audio>"}, {"from": "gpt", "value": "A"}]
    examples = [
        TINY.prompt("Hi"),
        TINY.prompt("Hi", images=[WIDE, SQUARE], audio=sound(1)),
        TINY.sample({"audio": [sound(2), sound(0.5)], "conversations": turns}),
    ]
    batch = collate(examples)
    assert batch.tiles.shape == (3, 4, 28, 28, 3) and batch.tile_mask.sum(1).tolist() == [0, 4, 0]
    assert batch.audio.shape == (3, 2, 256, 80)
    assert batch.audio_mask.sum(2).tolist() == [[0, 0], [98, 0], [198, 48]]
    np.testing.assert_array_equal(batch.tiles[1], examples[1].tiles)
    np.testing.assert_array_equal(batch.audio[2, 1, :48], examples[2].audio[1])
    assert (batch.audio[~batch.audio_mask] == 0).all()
    assert (batch.tiles[~batch.tile_mask] == 0).all()
    length = bucket(max(len(e.tokens) for e in examples), 128)
    for row, example in enumerate(examples):
        n = len(example.tokens)
        assert batch.tokens[row].tolist() == example.tokens.tolist() + [0] * (length - n)
        assert batch.positions[row].tolist() == [*range(n)] + [0] * (length - n)
        assert batch.segment_ids[row].tolist() == [1] * n + [0] * (length - n)
        assert batch.loss_mask[row].sum() == example.loss_mask.sum()
    for name, dtype in (
        ("tokens", np.int32), ("positions", np.int32), ("segment_ids", np.int32),
        ("loss_mask", np.float32), ("tiles", np.float32), ("tile_mask", bool),
        ("audio", np.float32), ("audio_mask", bool),
    ):  # fmt: skip
        assert getattr(batch, name).dtype == dtype, name


def test_collate_to_given_sizes():
    examples = [TINY.prompt("Hi", images=[SQUARE])]
    batch = collate(examples, num_tokens=1000, num_tiles=5)
    assert batch.tokens.shape == (1, 1000) and batch.tiles.shape[1] == 5
    assert batch.audio is None and batch.audio_mask is None
    assert collate([TINY.prompt("Hi")]).tiles is None
    with pytest.raises(ValueError, match="an example has 1 tiles, the batch takes 0"):
        collate(examples, num_tiles=0)
    with pytest.raises(ValueError, match="tokens, the batch takes 10"):
        collate(examples, num_tokens=10)


def test_cut():
    examples = [TINY.prompt("Hi"), TINY.prompt("Hi", images=[WIDE], audio=sound(1))]
    length = max(len(example.tokens) for example in examples)
    batch = collate(examples, 4096, 12, 8, 3000)
    used = sizes(batch)
    assert used == {"tokens": length, "tiles": 3, "clips": 1, "frames": 98}
    least = cut(batch, used)
    assert least.tokens.shape == (2, 1024) and least.tiles.shape == (2, 3, 28, 28, 3)
    assert least.audio.shape == (2, 2, 375, 80)
    for name, value in vars(least).items():
        whole = getattr(batch, name)
        if value is whole is None:
            continue
        inside = tuple(slice(n) for n in value.shape)
        np.testing.assert_array_equal(whole[inside], value)
        assert np.count_nonzero(whole) == np.count_nonzero(value), name  # only padding went
    # Another process has more.
    more = cut(batch, {"tokens": 1025, "tiles": 7, "clips": 5, "frames": 376})
    assert more.tokens.shape == (2, 2048) and more.tile_mask.shape == (2, 12)
    assert more.audio_mask.shape == (2, 8, 750)
    full = cut(batch, {"tokens": 2049, "tiles": 7, "clips": 5, "frames": 1501})
    assert jax.tree.map(np.shape, full) == jax.tree.map(np.shape, batch)
    silent = collate(examples[:1], 1000)
    silent = cut(silent, sizes(silent))
    assert silent.tiles is None and silent.audio is None and silent.tokens.shape == (1, 500)


def test_cut_tokens_are_multiples_of_128_if_the_limit_is():
    batch = collate([TINY.prompt("Hi")], 640)
    assert [cut(batch, {"tokens": n}).tokens.shape[1] for n in (1, 256, 257, 385)] == [
        256, 256, 384, 640
    ]  # fmt: skip


def test_cut_empty_and_small():
    batch = collate([TINY.prompt("Hi", images=[SQUARE], audio=sound(0.1))], 768, 1, 1, 16)
    empty = jax.tree.map(np.zeros_like, batch)
    assert set(sizes(empty).values()) == {0}
    least = cut(empty, sizes(empty))
    assert least.tokens.shape == (1, 256) and least.tiles.shape[1] == 1
    assert least.audio.shape[1:3] == (1, 8)  # a half; a quarter would be no encoder frame


@pytest.mark.parametrize(
    "stage, loss",
    [
        ("stage2_2_audio_sft", objectives.read_loss),
        ("stage2_1a_speech_encoder", objectives.hear_loss),
    ],
)
def test_loss_and_gradients_do_not_depend_on_the_cut(stage, loss):
    large = ("data.max_tokens=1536", "data.max_tiles=4", "data.max_clips=4", "data.batch_size=4")
    words = (*large, "data.max_audio_frames=400")
    config = load_config(ROOT / "configs" / f"{stage}.py", words, tiny=True)
    processor = Processor(config.model, byte_tokenizer(), 1536)
    batch = next(synthetic.Loader(config.data, processor, objective=config.objective))
    less = cut(batch, sizes(batch))
    assert less.tokens.shape[1] in (384, 768)
    assert (batch.audio.shape[1:3], less.audio.shape[1:3]) == ((4, 400), (1, 100))
    params = init_params(config.model, 0)
    loss = functools.partial(loss, config, Vita(config.model))
    value = jax.jit(jax.value_and_grad(lambda params, batch: loss(params, {}, batch)[0]))
    (whole, grads), (small, same) = value(params, batch), value(params, less)
    assert abs(whole - small) < 1e-6 * abs(whole)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(same)):
        # Sums of other lengths are added in another order.
        np.testing.assert_allclose(a, b, atol=5e-6 * max(np.abs(a).max(), 1), rtol=0)
    nothing, _ = value(params, jax.tree.map(np.zeros_like, less))  # a row that has run out
    assert nothing == 0
