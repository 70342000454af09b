import hashlib
import json
import struct
import zlib
from importlib import resources

import numpy as np
import pytest
from PIL import Image

from vita_jax.data.image import (
    MEAN,
    STD,
    choose_grid,
    fit_frame,
    normalize,
    read_image,
    tile_image,
)

SIZE = (36, 24)


@pytest.fixture(scope="module")
def recording(golden_dir):
    return json.loads((golden_dir / "image_preprocessing.json").read_text())


@pytest.fixture(scope="module")
def formula_image(recording):
    """The recorded small picture, made again from its formula."""
    case = recording["small_image"]
    y, x = np.mgrid[: case["height"], : case["width"]]
    channels = [3 * x + 2 * y, x * y + 17, 5 * x + 200 - 3 * y]
    pixels = np.stack([channel % 256 for channel in channels], -1).astype(np.uint8)
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == case["sha256_of_rgb_bytes"]
    return read_image(pixels)


def block_means(pixels):
    """[rows, cols, C] means over a 4x4 grid of blocks."""
    rows = [np.array_split(row, 4, axis=1) for row in np.array_split(pixels, 4, axis=0)]
    return np.array([[block.mean((0, 1), dtype=np.float64) for block in row] for row in rows])


def noise(mode="RGB", size=SIZE):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def png(width, height, depth=8, colour=2, rows=b""):
    """A PNG file that says whatever it is told to."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.golden
def test_grids_equal_the_recording(recording):
    lists = {name: cases for name, cases in recording.items() if name.startswith("grids_tile")}
    assert lists
    for name, cases in lists.items():
        tile_px = int(name.removeprefix("grids_tile"))
        for case in cases:
            for limits in set(case) - {"width", "height"}:
                low, high = (int(part[3:]) for part in limits.split("_"))
                expected = case[limits]
                grid = choose_grid(case["width"], case["height"], tile_px, high, low)
                assert grid == (expected["cols"], expected["rows"]), (case, limits)
                num_tiles = grid[0] * grid[1] + (grid != (1, 1))
                assert num_tiles == expected["tiles_with_thumbnail"]


@pytest.mark.golden
def test_tiles_equal_the_recording(recording, formula_image):
    case = recording["small_image"]
    tiles = tile_image(formula_image, case["tile_size"], case["max"], case["min"])
    assert len(tiles) == case["num_tiles"]
    assert np.asarray(tiles[0])[0].tolist() == case["first_tile_first_row_rgb"]
    hashes = [hashlib.sha256(np.asarray(tile).tobytes()).hexdigest() for tile in tiles]
    assert hashes == case["tiles_sha256"]
    means = [block_means(np.asarray(tile)) for tile in tiles]
    np.testing.assert_allclose(means, case["tiles_block_means_4x4_rgb"], atol=1e-4)
    means = [block_means(tile).transpose(2, 0, 1) for tile in normalize(tiles)]
    np.testing.assert_allclose(means, case["pixel_values_block_means_4x4_chw"], atol=2e-5)


@pytest.mark.golden
def test_whole_picture_equals_the_recording(recording, formula_image):
    case = recording["small_image"]
    (pixels,) = normalize([fit_frame(formula_image, case["tile_size"])])
    expected = case["whole_image_pixel_values_block_means"]
    np.testing.assert_allclose(block_means(pixels).transpose(2, 0, 1), expected, atol=2e-5)


@pytest.mark.golden
def test_mean_and_deviation_equal_the_recording(recording):
    assert list(MEAN) == recording["image_mean"]
    assert list(STD) == recording["image_std"]


def test_grid_needs_tiles():
    with pytest.raises(ValueError, match="3 to 2 tiles"):
        choose_grid(10, 10, 448, max_tiles=2, min_tiles=3)


def test_tiles_are_the_picture_row_by_row():
    image = noise(size=(30, 20))
    tiles = [np.asarray(tile) for tile in tile_image(image, tile_px=10, max_tiles=6)]
    pixels = np.asarray(image)
    expected = [pixels[y : y + 10, x : x + 10] for y in (0, 10) for x in (0, 10, 20)]
    np.testing.assert_array_equal(tiles[:-1], expected)
    np.testing.assert_array_equal(tiles[-1], np.asarray(image.resize((10, 10))))


@pytest.mark.parametrize("size, long_edge", [((100, 67), 41), ((67, 100), 41), ((7, 7), 28)])
def test_fit_frame_cuts_the_centre_out_of_the_rounded_size(size, long_edge):
    image = noise(size=size)
    across = (long_edge, 28) if size[0] > size[1] else (28, long_edge)
    margin = (long_edge - 28) // 2
    left, top = (margin, 0) if size[0] > size[1] else (0, margin)
    expected = np.asarray(image.resize(across))[top : top + 28, left : left + 28]
    np.testing.assert_array_equal(np.asarray(fit_frame(image, 28)), expected)


def test_normalize_is_the_plain_formula_bit_for_bit():
    values = np.arange(256, dtype=np.uint8)
    tiles = [np.stack([np.roll(values, i * j).reshape(16, 16) for i in (1, 3, 5)], -1)
             for j in range(2)]  # fmt: skip
    mean, std = np.float32((0.485, 0.456, 0.406)), np.float32((0.229, 0.224, 0.225))
    expected = (np.stack(tiles).astype(np.float32) / 255 - mean) / std
    out = normalize([Image.fromarray(tile) for tile in tiles])
    assert out.dtype == np.float32 and out.tobytes() == expected.tobytes()


def test_normalize():
    tiles = normalize([Image.new("RGB", (4, 4), "black"), Image.new("RGB", (4, 4), (0, 255, 51))])
    assert tiles.dtype == np.float32
    assert tiles.shape == (2, 4, 4, 3)
    np.testing.assert_allclose(tiles[0, 3, 3], -np.divide(MEAN, STD), rtol=1e-6)
    expected = np.divide(np.subtract((0, 1, 0.2), MEAN), STD)
    np.testing.assert_allclose(tiles[1, 0, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("ending", ["png", "webp", "bmp", "tiff"])
def test_reads_lossless_files_exactly(tmp_path, ending):
    image = noise()
    path = tmp_path / f"picture.{ending}"
    image.save(path, **({"lossless": True} if ending == "webp" else {}))
    for source in (path, str(path), Image.open(path)):
        read = read_image(source)
        assert read.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(read), np.asarray(image))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_reads_jpeg(tmp_path, mode):
    image = Image.linear_gradient("L").resize((64, 64)).convert(mode)
    image.save(tmp_path / "picture.jpg", quality=95)
    read = np.asarray(read_image(tmp_path / "picture.jpg")).astype(int)
    assert np.abs(read - np.asarray(image.convert("RGB"))).max() < 8


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_reads_other_modes(tmp_path, mode):
    image = noise(mode)
    image.save(tmp_path / "picture.png")
    read = np.asarray(read_image(tmp_path / "picture.png"))
    np.testing.assert_array_equal(read, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
def test_reads_the_first_of_several_frames(tmp_path, ending):
    path = tmp_path / f"moving.{ending}"
    frames = [Image.new("RGB", SIZE, colour) for colour in ("red", "lime", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    read = np.asarray(read_image(path)).astype(int)
    assert np.abs(read - (255, 0, 0)).max() <= 4


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tiff"])
def test_turns_upright(tmp_path, ending):
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise: the left side comes on top
    image.save(tmp_path / f"turned.{ending}", exif=exif)
    read = read_image(tmp_path / f"turned.{ending}")
    assert read.size == (20, 40)
    assert read.getpixel((10, 5)) > (240, 240, 240)
    assert read.getpixel((10, 35)) < (15, 15, 15)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "GIF", "key"])
def test_shows_transparency_on_white(tmp_path, mode):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    path = tmp_path / "see_through.png"
    if mode in ("RGBA", "LA"):
        image.convert(mode).save(path)
    elif mode == "key":  # one colour of an RGB file counts as transparent
        Image.fromarray(np.uint8([[[0, 0, 0], [9, 9, 9]]])).save(path, transparency=(9, 9, 9))
    else:
        palette = Image.new("P", (2, 1))
        palette.putpalette([0, 0, 0, 9, 9, 9])
        palette.putpixel((1, 0), 1)
        path = path.with_suffix(".gif") if mode == "GIF" else path
        palette.save(path, transparency=1)
    assert np.asarray(read_image(path)).tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_half_transparent_is_half_white():
    read = read_image(np.uint8([[[0, 0, 0, 51]]]))
    assert np.asarray(read).tolist() == [[[204, 204, 204]]]


def test_scales_16_bits_to_8(tmp_path):
    grey = np.array([[0, 257, 12850, 65535]], np.uint16)
    expected = [[[0] * 3, [1] * 3, [50] * 3, [255] * 3]]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    rows = b"\0" + np.repeat(grey[0], 3).astype(">u2").tobytes()
    (tmp_path / "colour.png").write_bytes(png(4, 1, depth=16, rows=rows))
    for source in (grey, tmp_path / "grey.png", tmp_path / "colour.png"):
        assert np.asarray(read_image(source)).tolist() == expected


def test_reads_arrays():
    pixels = np.asarray(noise())
    np.testing.assert_array_equal(np.asarray(read_image(pixels)), pixels)
    grey = np.asarray(read_image(pixels[:, :, 0]))
    np.testing.assert_array_equal(grey, np.repeat(pixels[:, :, :1], 3, axis=2))


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4, 3)), np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4), np.uint8)]
)
def test_refuses_other_arrays(array):
    with pytest.raises(ValueError, match=r"picture .*expected an array uint8\[H, W\]"):
        read_image(array)


@pytest.mark.parametrize("mode, value", [("F", 0.5), ("I", 70000), ("I", -1)])
def test_refuses_greys_without_a_scale(tmp_path, mode, value):
    Image.new(mode, (2, 2), value).save(tmp_path / "grey.tiff")
    with pytest.raises(ValueError, match="grey.tiff: .*8 or 16 bits"):
        read_image(tmp_path / "grey.tiff")


def test_refuses_missing_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.png: no such picture"):
        read_image(tmp_path / "nothing.png")
    with pytest.raises(ValueError, match="not a file"):
        read_image(tmp_path)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", r"bad.png: the picture file is empty \(0 bytes\)"),
        (b"Once upon a time there was a text file.\n" * 9, "bad.png: not a picture"),
        (png(0, 0), "bad.png: its PNG header claims 0x0 pixels"),
        (png(12, 0), "bad.png: its PNG header claims 12x0 pixels"),
        (png(2010, 10), "bad.png: 2010x10 pixels, beyond 200:1"),
        (png(10, 2010), "bad.png: 10x2010 pixels, beyond 200:1"),
        (png(10001, 10000), "bad.png: 10001x10000 pixels, more than 100 megapixels"),
        (png(60000, 60000), "bad.png: more than 100 megapixels .*3600000000 pixels"),
        (png(9, 9), "bad.png: damaged or cut short"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_refuses_bad_files(tmp_path, data, message):
    (tmp_path / "bad.png").write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        read_image(tmp_path / "bad.png")
    assert "\n" not in str(error.value)


def test_accepts_the_limits(tmp_path):
    assert read_image(np.zeros((1, 200), np.uint8)).size == (200, 1)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "gif"])
def test_refuses_what_is_cut_short(tmp_path, ending):
    noise(size=(120, 80)).save(tmp_path / f"whole.{ending}")
    data = (tmp_path / f"whole.{ending}").read_bytes()
    path = tmp_path / f"cut.{ending}"
    for part in (12, 30, len(data) // 2, len(data) * 9 // 10):
        path.write_bytes(data[:part])
        with pytest.raises(ValueError, match=f"cut.{ending}: "):
            read_image(path)


def test_refuses_a_cut_picture_that_somebody_else_opened(tmp_path):
    noise().save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-200])
    with Image.open(tmp_path / "cut.png") as image:
        with pytest.raises(ValueError, match="cut.png: damaged or cut short"):
            read_image(image)


def test_sample_picture():
    path = resources.files("vita_jax") / "samples" / "picture.jpg"
    assert len(path.read_bytes()) <= 200_000
    assert len(tile_image(read_image(path), 448, 12)) == 7
