"""vita_jax/models/vision.py against the recorded vision tower, for every input of the recording."""

import dataclasses

import jax
import numpy as np
import pytest
from parity import assert_close, random_params, recorded_params, run, shapes_of

from vita_jax import tables
from vita_jax.config import VisionConfig, vita_tiny
from vita_jax.models.vision import Vision, pixel_shuffle, resize_positions

RULES = tables.below(tables.VISION, "vision_tower.vision_tower.", "") + tables.below(
    tables.PROJECTOR, "mm_projector.", ""
)


@pytest.fixture
def recording(golden):
    tensors, c = golden("internvit")
    config = VisionConfig(
        tile_px=c["image"], patch_px=c["patch"], embed_dim=c["dim"], num_layers=c["layers"],
        num_heads=c["heads"], mlp_dim=c["ff"], out_dim=c["llm"],
    )  # fmt: skip
    pixels = np.zeros((1, config.tile_px, config.tile_px, 3), np.float32)
    return tensors, config, recorded_params(tensors, RULES, shapes_of(Vision(config), pixels))


def cases(tensors):
    return [
        name.removeprefix("in.pixel_values_")
        for name in tensors
        if name.startswith("in.pixel_values_")
    ]


def channels_last(x):
    return x.transpose(0, 2, 3, 1)


@pytest.mark.golden
def test_every_recorded_stage(recording):
    tensors, config, params = recording
    model = Vision(config)
    for case in cases(tensors):
        pixels = channels_last(tensors[f"in.pixel_values_{case}"])
        for layer in range(config.num_layers + 1):
            if f"mid.{case}.hidden{layer}" in tensors:
                assert_close(
                    hidden(config, params, pixels, layer), tensors[f"mid.{case}.hidden{layer}"]
                )
        last = hidden(config, params, pixels, config.num_layers)
        assert_close(last, tensors[f"out.{case}.last_hidden_state"])
        if f"mid.{case}.selected" in tensors:
            assert_close(last[:, 1:], tensors[f"mid.{case}.selected"])
            assert_close(run(model, params, pixels, method="reduce"), tensors[f"out.{case}.tower"])
            assert_close(run(model, params, pixels), tensors[f"out.{case}.projected"])


def hidden(config, params, pixels, num_layers):
    """The state after `num_layers` blocks: the same encoder cut short."""
    model = Vision(dataclasses.replace(config, num_layers=max(num_layers, 1)))
    encoder = params["encoder"] | {
        "blocks": jax.tree.map(lambda p: p[:num_layers], params["encoder"]["blocks"])
    }
    if num_layers == 0:
        return run(model, params, pixels, method=lambda m, x: m.encoder.embed(x))
    return run(model, params | {"encoder": encoder}, pixels, method=lambda m, x: m.encoder(x))


@pytest.mark.golden
def test_position_table_resized(recording, golden):
    tensors, config, params = recording
    grid = golden("internvit")[1]["resize_to"] // config.patch_px
    resized = resize_positions(params["encoder"]["position_embedding"], (grid, grid))
    assert_close(resized[None], tensors["out.resized_position_embedding"])


@pytest.mark.golden
def test_pixel_shuffle_order(recording):
    tensors = recording[0]
    expected = tensors["out.shuffle_only"]
    np.testing.assert_array_equal(
        pixel_shuffle(tensors["in.shuffle_x"]).reshape(expected.shape), expected
    )


def test_one_embedding_a_placeholder():
    config = vita_tiny().vision
    pixels = np.zeros((2, config.tile_px, config.tile_px, 3), np.float32)
    params = random_params(Vision(config), pixels)
    out = run(Vision(config), params, pixels)
    assert out.shape == (2, config.embeddings_per_tile, config.out_dim)
