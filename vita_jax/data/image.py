"""Pictures: from a file to normalised tiles.

Goes in: a file, a PIL image or an array. Comes out: float32[I, px, px, 3], one entry a tile.
The order is `read_image`, then `tile_image` (a still picture) or `fit_frame` (a video frame), then
`normalize`. Read next: `processor.py`, which gives every tile its placeholders.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

MEAN = (0.485, 0.456, 0.406)  # of red, green and blue in [0, 1], over ImageNet
STD = (0.229, 0.224, 0.225)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # no format whose decoder runs programs
MAX_ASPECT = 200  # longer edge over shorter edge
MAX_PIXELS = 100_000_000


def read_image(source: str | Path | Image.Image | np.ndarray) -> Image.Image:
    """The picture as 8-bit RGB: upright, the first frame if it moves, transparent parts on white.

    Args:
      source: a file, a PIL image, or an array: uint8[H, W], uint8[H, W, 3], uint8[H, W, 4] or
        uint16[H, W].

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is empty, damaged or not a picture, the array is none of the above, or
        the picture is beyond 200:1 or 100 megapixels (both refused before anything is decoded).
    """
    if isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source), "picture")
    if isinstance(source, Image.Image):
        return _to_rgb(source, getattr(source, "filename", "") or "picture")
    path = find_file(source, "picture")
    with _open(path) as image:
        return _to_rgb(image, path)


def find_file(path: str | Path, what: str) -> Path:
    """`path`, if it is a file with something in it; `what` ("picture", ...) is for the error.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is empty or a folder.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such {what} file; check the path")
    if not path.is_file():
        raise ValueError(f"{path}: not a file; give the path of one {what} file")
    if not path.stat().st_size:
        raise ValueError(f"{path}: the {what} file is empty (0 bytes); copy or record it again")
    return path


def choose_grid(
    width: int, height: int, tile_px: int, max_tiles: int, min_tiles: int = 1
) -> tuple[int, int]:
    """The (columns, rows) whose shape is nearest to the picture's, of all with min to max tiles.

    Of grids equally near, the larger wins if the picture has pixels for more than half of it.

    Raises:
      ValueError: no grid has that many tiles.

    Source: VITA-1.5 release, dynamic preprocessing (that of InternVL 1.5, section 3.2).
    """
    if not 1 <= min_tiles <= max_tiles:
        raise ValueError(f"{min_tiles} to {max_tiles} tiles: expected 1 <= min_tiles <= max_tiles")
    sides = range(1, max_tiles + 1)
    grids = [(i, j) for i in sides for j in sides if min_tiles <= i * j <= max_tiles]
    best, best_distance = (1, 1), float("inf")
    for cols, rows in sorted(grids, key=math.prod):
        distance = abs(width / height - cols / rows)
        fills_half = width * height > 0.5 * tile_px**2 * cols * rows
        if distance < best_distance or (distance == best_distance and fills_half):
            best, best_distance = (cols, rows), distance
    return best


def tile_image(
    image: Image.Image, tile_px: int, max_tiles: int, min_tiles: int = 1
) -> list[Image.Image]:
    """Cuts an RGB picture into tiles, row by row; if several, a thumbnail of the whole follows.

    The picture is stretched to the grid, its aspect ratio not kept. Source: as `choose_grid`.
    """
    cols, rows = choose_grid(*image.size, tile_px, max_tiles, min_tiles)
    canvas = image.resize((cols * tile_px, rows * tile_px), Image.Resampling.BICUBIC)
    corners = [(col * tile_px, row * tile_px) for row in range(rows) for col in range(cols)]
    tiles = [canvas.crop((x, y, x + tile_px, y + tile_px)) for x, y in corners]
    if len(tiles) > 1:
        tiles.append(image.resize((tile_px, tile_px), Image.Resampling.BICUBIC))
    return tiles


def fit_frame(image: Image.Image, tile_px: int) -> Image.Image:
    """One tile from a whole RGB picture: short edge to the tile, then the centre.

    Source: VITA-1.5 release, its CLIP image processor; long edge and margins are rounded down.
    """
    short = min(image.size)
    width, height = (tile_px * edge // short for edge in image.size)
    left, top = (width - tile_px) // 2, (height - tile_px) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return image.crop((left, top, left + tile_px, top + tile_px))


def normalize(images: list[Image.Image]) -> np.ndarray:
    """RGB tiles, all of px by px, as float32[I, px, px, 3] of mean 0, deviation 1 over ImageNet."""
    width, height = images[0].size
    out = np.empty((len(images), height, width * 3), np.float32)
    # A whole line of pixels at a time: by threes the same sums take six times as long.
    mean, std = (np.tile(np.float32(values), width) for values in (MEAN, STD))
    for tile, image in zip(out, images):
        tile[...] = np.asarray(image).reshape(height, -1)
        tile /= 255
        tile -= mean
        tile /= std
    return out.reshape(-1, height, width, 3)


def _from_array(array):
    shape, dtype = array.shape, array.dtype
    grey = array.ndim == 2 and dtype in (np.uint8, np.uint16)
    colour = array.ndim == 3 and shape[2] in (3, 4) and dtype == np.uint8
    if not (grey or colour) or 0 in shape:
        allowed = "uint8[H, W], uint8[H, W, 3], uint8[H, W, 4] or uint16[H, W]"
        raise ValueError(f"picture {dtype}{list(shape)}: expected an array {allowed}")
    return Image.fromarray(array)


def _open(path):
    """The picture file with only its header read."""
    try:
        with warnings.catch_warnings():  # of sizes that our own limit allows
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError as error:
        limit = f"more than {MAX_PIXELS // 10**6} megapixels"
        raise ValueError(f"{path}: {limit} ({error}); make the picture smaller") from error
    except Image.UnidentifiedImageError as error:
        if size := _empty_png(path):
            raise ValueError(f"{path}: its PNG header claims {size}; export it again") from error
        raise ValueError(f"{path}: not a picture; expected {', '.join(FORMATS)}") from error
    except OSError as error:
        raise ValueError(f"{path}: damaged header ({error}); export it again") from error


def _empty_png(path):
    """What a PNG header of no width or height claims, which Pillow does not tell; else None."""
    with path.open("rb") as file:
        head = file.read(24)
    width, height = (int.from_bytes(head[at : at + 4], "big") for at in (16, 20))
    if head.startswith(b"\x89PNG") and len(head) == 24 and not width * height:
        return f"{width}x{height} pixels"
    return None


def _to_rgb(image, name):
    """Checks the size, decodes, turns upright and reduces to 8-bit RGB."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        limit = f"more than {MAX_PIXELS // 10**6} megapixels"
        raise ValueError(f"{name}: {width}x{height} pixels, {limit}; make the picture smaller")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"{name}: {width}x{height} pixels, beyond {MAX_ASPECT}:1; crop it")
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # decoders raise whatever a damaged file leads them to
        raise ValueError(f"{name}: damaged or cut short ({error}); export it again") from error
    if image.mode.startswith("I"):  # Pillow would cut 16-bit grey off at 255, not scale it
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"{name}: grey values beyond 16 bits; save it with 8 or 16 bits")
        image = Image.fromarray(np.round(grey / 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError(f"{name}: fractional grey values; save it with 8 or 16 bits")
    if image.has_transparency_data:
        # The release drops the alpha channel, showing whatever lies below; people see white there.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
