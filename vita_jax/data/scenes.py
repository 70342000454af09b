"""Pictures made of drawings: one thing, several at places, so many of them, or a thing that moves.

Goes in: uint8[N, N, 4] drawings with transparent ground (`concepts.py` has them) and a random
generator. Comes out: RGB pictures, the same for the same generator. Drawings of another style than
those given are prepared for by `restyle`. Read next: `image.py`, which makes tiles of pictures.
"""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

COLOURS = {
    "red": (220, 40, 40), "blue": (40, 90, 225), "green": (50, 165, 65), "yellow": (250, 215, 50),
    "black": (35, 35, 38), "brown": (130, 80, 45), "gray": (135, 135, 138), "teal": (0, 135, 135),
    "white": (246, 246, 246), "orange": (250, 140, 30),
}  # fmt: skip
PLACES = {
    "left": (0.2, 0.5), "right": (0.8, 0.5), "top": (0.5, 0.2), "bottom": (0.5, 0.8),
    "middle": (0.5, 0.5),
}  # fmt: skip
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SHAPE_COLOURS = {  # easy-vqa's
    "black": (0, 0, 0), "blue": (0, 0, 255), "brown": (165, 42, 42), "gray": (128, 128, 128),
    "green": (0, 255, 0), "red": (255, 0, 0), "teal": (0, 128, 128), "yellow": (255, 255, 0),
}  # fmt: skip
SHAPES = ("circle", "rectangle", "triangle")
MOST = 6  # things in a picture
RESTYLED = 0.2  # of all drawings, where they may be

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def single(
    rng: np.random.Generator,
    drawing: np.ndarray,
    px: int = 112,
    flip: bool = True,
    restyled: bool = True,
) -> Image.Image:
    """One drawing, large, perhaps cut by up to a fifth at an edge, in changed colours.

    Args:
      rng: decides everything.
      drawing: uint8[N, N, 4], best about as large as the picture.
      px: edge of the picture.
      flip: whether left and right may change sides, which a text or a left arrow would not bear.
      restyled: whether colours may change much, and the style (`restyle`).

    Returns:
      RGB picture of px by px.
    """
    ground = _ground_for(rng, [drawing], px)
    thing = _vary(rng, drawing, ground, flip, restyled)
    box = rng.uniform(0.45, 1.0)
    beyond = rng.uniform(0, 0.2) * box if rng.random() < 0.3 else 0.0
    angle = rng.uniform(-180, 180) if rng.random() < 0.1 else rng.uniform(-20, 20)
    inside = max(0.0, (1 - box) / 2 + beyond)
    centre = 0.5 + rng.uniform(-inside, inside, 2)
    stretch, shear = np.exp(rng.normal(0, 0.08)), rng.normal(0, 0.08)
    _put(ground, thing, centre, box, angle, stretch, shear)
    return _degrade(rng, [ground])[0]


def plain(rng: np.random.Generator, drawing: np.ndarray, px: int = 112) -> Image.Image:
    """One drawing as it is, large, on one colour, mostly white: the easiest picture of it.

    Args:
      rng, drawing, px: as in `single`.
    """
    colour = (255,) * 3 if rng.random() < 0.7 else tuple(map(int, rng.integers(0, 256, 3)))
    ground, box = Image.new("RGB", (px, px), colour), rng.uniform(0.7, 1.0)
    centre = 0.5 + rng.uniform(-1, 1, 2) * (1 - box) / 2
    _put(ground, Image.fromarray(drawing), centre, box)
    return ground


def mosaic(
    rng: np.random.Generator, drawings: list[np.ndarray], px: int = 112, restyled: bool = True
) -> Image.Image:
    """Four drawings, one in each quarter of the picture, in the order in which they are read.

    Args:
      rng, px, restyled: as in `single`.
      drawings: four of uint8[N, N, 4].
    """
    ground = _ground_for(rng, drawings, px, plain=0.7)
    for number, drawing in enumerate(drawings):
        box = rng.uniform(0.36, 0.52)
        centre = np.array([number % 2, number // 2]) / 2 + 0.25
        centre += rng.uniform(-1, 1, 2) * max(0.02, (0.5 - box) / 2)
        thing = _vary(rng, drawing, ground, True, restyled)
        _put(ground, thing, centre, box, rng.uniform(-20, 20))
    return _degrade(rng, [ground])[0]


def arrange(
    rng: np.random.Generator,
    drawings: list[np.ndarray],
    places: list[str],
    px: int = 112,
    restyled: bool = True,
) -> Image.Image:
    """Drawings at places, none touching another.

    Args:
      rng: decides everything else.
      drawings: uint8[N, N, 4] each.
      places: of `PLACES`, one for each drawing, all different.
      px: edge of the picture.
      restyled: as in `single`; not where colours are asked for.

    Raises:
      ValueError: a place is unknown or taken twice, or their number is not that of the drawings.
    """
    if len(drawings) != len(places) or len(set(places)) < len(places) or not places:
        raise ValueError(f"{len(drawings)} drawings at {places}: expected a place for each")
    if unknown := set(places) - PLACES.keys():
        raise ValueError(f"place {min(unknown)!r}: expected one of {', '.join(PLACES)}")
    centres = np.array([PLACES[place] for place in places])
    most = min(0.44, 0.95 * _nearest(centres))
    ground = _ground_for(rng, drawings, px, plain=0.7)
    for drawing, centre in zip(drawings, centres):
        box = most * rng.uniform(0.7, 1.0)
        centre = centre + rng.uniform(-1, 1, 2) * min((most - box) / 2, 0.05)
        _stand(rng, ground, _vary(rng, drawing, ground, True, restyled), centre, box)
    return _degrade(rng, [ground])[0]


def group(
    rng: np.random.Generator, drawings: list[np.ndarray], px: int = 112, restyled: bool = True
) -> Image.Image:
    """One to six drawings, the same or different, scattered or in rows, none touching another.

    Args:
      rng: decides everything.
      drawings: uint8[N, N, 4] each, one for every thing to be seen; equal ones are drawn equal.
      px: edge of the picture.
      restyled: as in `single`; not where colours are asked for.

    Raises:
      ValueError: there is none, or there are more than six.
    """
    number = len(drawings)
    if not 1 <= number <= MOST:
        raise ValueError(f"{number} drawings: expected 1 to {MOST}")
    ground = _ground_for(rng, drawings, px, plain=0.7)
    box = rng.uniform(0.65, 1.0) * (0.6, 0.46, 0.4, 0.36, 0.31, 0.29)[number - 1]
    centres, box = (_rows if rng.random() < 0.3 else _scatter)(rng, number, box)
    varied = {}
    for drawing, centre in zip(drawings, centres):
        if id(drawing) not in varied:
            varied[id(drawing)] = _vary(rng, drawing, ground, True, restyled)
        _stand(rng, ground, varied[id(drawing)], centre, box * rng.uniform(0.8, 1.0))
    return _degrade(rng, [ground])[0]


def blank(rng: np.random.Generator, px: int = 112) -> Image.Image:
    """A picture of px by px with nothing in it but a ground."""
    return _degrade(rng, [_ground(rng, px, plain=0.45)])[0]


def move(
    rng: np.random.Generator,
    drawing: np.ndarray,
    direction: str,
    frames: int = 4,
    px: int = 112,
    restyled: bool = True,
) -> list[Image.Image]:
    """Frames of a drawing that moves straight on, trembling a little, over a still ground.

    Args:
      rng: decides everything else.
      drawing: uint8[N, N, 4].
      direction: of `DIRECTIONS`.
      frames: how many, two or more.
      px: edge of the pictures.
      restyled: as in `single`; not where colours are asked for.

    Raises:
      ValueError: the direction is unknown, or there are fewer than two frames.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction {direction!r}: expected one of {', '.join(DIRECTIONS)}")
    if frames < 2:
        raise ValueError(f"{frames} frames: nothing moves in fewer than two")
    ground = _ground_for(rng, [drawing], px)
    thing = _vary(rng, drawing, ground, True, restyled)
    box, angle = rng.uniform(0.28, 0.5), rng.uniform(-15, 15)
    step = np.array(DIRECTIONS[direction])
    way = rng.uniform(0.35, 1.1 - box)  # as a share of the picture
    aside = rng.uniform(-1, 1) * (1 - box) / 2 * (1 - abs(step))
    middle = 0.5 + aside + rng.uniform(-1, 1) * max(0, (1.1 - box - way) / 2) * abs(step)
    clip = []
    for time in np.linspace(-0.5, 0.5, frames):
        frame = ground.copy()
        centre = middle + time * way * step + rng.uniform(-0.012, 0.012, 2)
        _put(frame, thing, centre, box * rng.uniform(0.96, 1.04), angle + rng.uniform(-3, 3))
        clip.append(frame)
    return _degrade(rng, clip)


def tint(drawing: np.ndarray, colour: str) -> np.ndarray:
    """The drawing in one colour of `COLOURS`, darker and lighter where it was so before.

    Args:
      drawing: uint8[N, N, 4].
      colour: of `COLOURS`.

    Returns:
      uint8[N, N, 4] with the alpha of `drawing`.

    Raises:
      ValueError: the colour is unknown.
    """
    if colour not in COLOURS:
        raise ValueError(f"colour {colour!r}: expected one of {', '.join(COLOURS)}")
    luma, alpha = drawing[..., :3] @ _LUMA / 255, drawing[..., 3]
    seen = luma[alpha > 128] if (alpha > 128).any() else luma
    low, middle, high = np.percentile(seen, (2, 50, 98))
    shade = np.clip((luma - middle) / max(high - low, 0.15), -1, 1)[..., None]
    target = np.float32(COLOURS[colour])
    strength = {"white": 0.25, "black": 0.25}.get(colour, 0.5)  # else they would look gray
    mixed = np.where(shade > 0, target + (255 - target) * shade * strength * 0.8,
                     target * (1 + shade * strength))  # fmt: skip
    return np.dstack([np.clip(mixed, 0, 255).astype(np.uint8), alpha])


def shape(rng: np.random.Generator, name: str, colour: str, px: int = 64) -> Image.Image:
    """A picture of one shape as those of easy-vqa: anywhere, on a plain and nearly white ground.

    Args:
      rng: decides size, place and ground.
      name: of `SHAPES`; rectangles stand upright, triangles have equal sides and one on the ground.
      colour: of `SHAPE_COLOURS`.
      px: edge of the picture.

    Raises:
      ValueError: the shape or the colour is unknown.
    """
    if name not in SHAPES or colour not in SHAPE_COLOURS:
        known = f"one of {', '.join(SHAPES)} in one of {', '.join(SHAPE_COLOURS)}"
        raise ValueError(f"shape {name!r}, colour {colour!r}: expected {known}")
    scale = 4  # drawn larger, for smooth edges
    ground = tuple(int(value) for value in rng.integers(230, 256, 3))
    image = Image.new("RGB", (px * scale, px * scale), ground)
    width = rng.uniform(0.1, 0.48)
    height = {"circle": width, "triangle": width * 0.87, "rectangle": rng.uniform(0.1, 0.48)}[name]
    x, y = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
    box = np.array([x, y, x + width, y + height]) * px * scale
    draw = ImageDraw.Draw(image)
    if name == "triangle":
        left, top, right, bottom = box
        corners = [(left, bottom), (right, bottom), ((left + right) / 2, top)]
        draw.polygon(corners, SHAPE_COLOURS[colour])
    else:
        kind = draw.ellipse if name == "circle" else draw.rectangle
        kind(list(box), SHAPE_COLOURS[colour])
    return image.resize((px, px), Image.Resampling.BOX)


def restyle(rng: np.random.Generator, drawing: np.ndarray, dark: bool = False) -> np.ndarray:
    """The drawing as another hand might have drawn it.

    Few flat colours, details left out, colours paled or taken away, dark lines around the shape and
    between its parts, at times only the lines.

    Args:
      rng: decides everything.
      drawing: uint8[N, N, 4].
      dark: whether it will stand on dark ground, where single lines are light.

    Returns:
      uint8[N, N, 4].
    """
    size, room = drawing.shape[0], 4  # for lines around it
    image = Image.fromarray(drawing).resize((size - 2 * room,) * 2, Image.Resampling.BILINEAR)
    drawing = np.pad(np.asarray(image), ((room, room), (room, room), (0, 0)))
    alpha = drawing[..., 3:]
    # Transparent pixels have no colour: without one, every rim would look like an edge.
    solid = np.where(alpha > 16, drawing[..., :3], _mean(drawing)).astype(np.uint8)
    image = Image.fromarray(solid)
    if rng.random() < 0.4:  # details left out
        small = int(size * rng.uniform(0.25, 0.5))
        image = image.resize((small, small), Image.Resampling.BOX)
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    lines = rng.random() < 0.75
    if lines:
        mask = _lines(rng, np.asarray(image), alpha[..., 0])
    if rng.random() < 0.6:  # few flat colours
        image = image.quantize(int(rng.integers(3, 10)), Image.Quantize.FASTOCTREE).convert("RGB")
    rgb = np.asarray(image).astype(np.float32)
    luma = (rgb @ _LUMA)[..., None]
    fill = rng.random()
    if fill < 0.2 and lines:  # like paper where it was light
        rgb = np.where(luma > rng.uniform(90, 200), rng.uniform(235, 255), rgb)
    elif fill < 0.35:  # pale, or gray
        rgb = luma + (rgb - luma) * rng.uniform(0, 0.6)
    elif fill < 0.6:  # bright
        rgb = luma + (rgb - luma) * rng.uniform(1.1, 1.9) + rng.uniform(0, 25)
    elif fill < 0.75 and lines:  # lines alone
        rgb = np.full_like(rgb, rng.uniform(235, 255))
        if rng.random() < 0.5:
            alpha = np.zeros_like(alpha)
    if lines:
        ink = np.float32(rng.uniform(0, 40, 3) if rng.random() < 0.8 else rng.uniform(0, 90, 3))
        if dark and not alpha.any():
            ink = 255 - ink
        rgb += (ink - rgb) * mask
        alpha = np.maximum(alpha, (255 * mask).astype(np.uint8))
    return np.dstack([np.clip(rgb, 0, 255).astype(np.uint8), alpha])


def _lines(rng, rgb, alpha):
    """float32[N, N, 1] where lines run, 1.5 to 6 px wide at a size of 128: around, and inside."""
    soft = np.asarray(Image.fromarray(rgb).filter(ImageFilter.GaussianBlur(0.8)), np.int16)
    inside, edge = alpha > 128, np.zeros(alpha.shape, bool)
    threshold = rng.uniform(25, 70) if rng.random() < 0.85 else np.inf  # at times none inside
    for axis in (0, 1):
        ahead = np.roll(soft, -1, axis)
        step = np.abs(ahead - np.roll(soft, 1, axis)).max(-1)
        edge |= (step > threshold) & inside & np.roll(inside, -1, axis) & np.roll(inside, 1, axis)
        edge |= inside != np.roll(inside, -1, axis)
    mask = Image.fromarray((edge * 255).astype(np.uint8))
    width = rng.choice([1, 3, 5], p=[0.25, 0.55, 0.2])
    mask = mask.filter(ImageFilter.MaxFilter(int(width)))
    mask = mask.filter(ImageFilter.GaussianBlur(rng.uniform(0.7, 1.1)))  # round and smooth
    gain = 90 if width == 1 else 150  # the blur takes more of what is thin
    return np.clip(np.asarray(mask, np.float32)[..., None] / gain - 0.2, 0, 1)


def _vary(rng, drawing, ground, flip, restyled=True):
    """The drawing flipped, in another style, in other colours: a PIL image, RGBA."""
    if flip and rng.random() < 0.5:
        drawing = drawing[:, ::-1]
    if restyled and rng.random() < RESTYLED:
        drawing = restyle(rng, drawing, dark=_mean_of(ground).mean() < 110)
    image = Image.fromarray(np.ascontiguousarray(drawing))
    strength = 1.0 if restyled else 0.25
    colours = image.convert("RGB").convert("RGB", _colour_change(rng, strength))
    colours.putalpha(image.getchannel("A"))
    return colours


def _colour_change(rng, strength):
    """Twelve numbers of an affine change of colours: hue, saturation, contrast, brightness."""
    angle = rng.normal(0, 0.12) * strength
    saturation = 1 + rng.uniform(-0.5, 0.4) * strength
    if strength == 1 and rng.random() < 0.06:
        saturation = 0.0
    contrast, brightness = 1 + rng.uniform(-0.25, 0.2) * strength, rng.normal(0, 14) * strength
    cos, sin = np.cos(angle), np.sin(angle) / np.sqrt(3)
    third = (1 - cos) / 3
    hue = np.array([[cos + third, third - sin, third + sin],
                    [third + sin, cos + third, third - sin],
                    [third - sin, third + sin, cos + third]])  # fmt: skip
    change = contrast * (saturation * hue + (1 - saturation) * np.outer(np.ones(3), _LUMA))
    offset = np.full((3, 1), 128 * (1 - contrast) + brightness)
    return tuple(np.hstack([change, offset]).ravel().tolist())


def _stand(rng, ground, thing, centre, box):
    """Puts a thing nearly upright, so small that its corners stay within the box."""
    angle = rng.uniform(-14, 14)
    turned = np.abs(np.cos(np.radians(angle))) + np.abs(np.sin(np.radians(angle)))
    _put(ground, thing, centre, box / turned, angle)


def _put(ground, thing, centre, box, angle=0.0, stretch=1.0, shear=0.0):
    """Pastes a thing, its edge and its centre as shares of the picture, turned and deformed."""
    px = ground.width
    edge = max(4, round(box * px))
    if edge < 0.75 * thing.width:  # or fine lines would break
        thing = thing.resize((edge, edge), Image.Resampling.BOX)
    radians, size = np.radians(angle), box * px
    turn = np.array([[np.cos(radians), -np.sin(radians)], [np.sin(radians), np.cos(radians)]])
    deform = np.array([[min(1, stretch), shear], [0, min(1, 1 / stretch)]])
    back = np.linalg.inv(turn @ deform * size / thing.width)  # from picture to thing
    offset = thing.width / 2 - back @ (np.asarray(centre) * px)
    matrix = (*back[0], offset[0], *back[1], offset[1])
    layer = thing.transform(
        (px, px), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=(0, 0, 0, 0)
    )
    ground.paste(layer, (0, 0), layer)


def _nearest(centres):
    """The shortest distance between two centres, and twice that to the border, by axis."""
    border = 2 * np.minimum(centres, 1 - centres).min()
    gaps = np.abs(centres[:, None] - centres[None]).max(-1) + 9 * np.eye(len(centres))
    return min(border, gaps.min())


def _scatter(rng, number, box):
    """Centres at random, further apart than the box; the box shrinks until that is possible."""
    while True:
        for _ in range(30):
            centres = rng.uniform(box / 2, 1 - box / 2, (number, 2))
            gaps = np.abs(centres[:, None] - centres[None]).max(-1) + 9 * np.eye(number)
            if gaps.min() > 1.06 * box:
                return centres, box
        box *= 0.95


def _rows(rng, number, box):
    """Centres side by side, in one row, two or three."""
    columns = number if number < 4 else int(rng.integers(2, 4))
    rows = -(-number // columns)
    cell = 1 / max(columns, rows)
    box = min(box * 1.2, 0.9 * cell)
    grid = [((i % columns + 0.5) / columns, (i // columns + 0.5) / rows) for i in range(number)]
    slack = (cell - box) / 2 * 0.8
    centres = np.array(grid) + rng.uniform(-slack, slack, (number, 2))
    return centres[:, :: rng.choice([1, -1])], box  # as likely in columns


@functools.lru_cache(maxsize=8)
def _plane(px):
    """float32[px, px] across and down, from -0.5 to 0.5."""
    line = np.linspace(-0.5, 0.5, px, dtype=np.float32)
    return np.meshgrid(line, line)


def _ground_for(rng, drawings, px, plain=0.45):
    """A ground on which all things can be seen, as far as a few tries find one."""
    means = np.array([_mean(drawing) for drawing in drawings])
    for _ in range(6):
        ground = _ground(rng, px, plain)
        if np.linalg.norm(means - _mean_of(ground), axis=1).min() > 60:
            break
    return ground


def _mean(drawing):
    """float32[3] colour, transparent parts left out."""
    small = drawing[::4, ::4].reshape(-1, 4).astype(np.float32)
    weight = small[:, 3:] + 1e-3
    return (small[:, :3] * weight).sum(0) / weight.sum()


def _mean_of(ground):
    return np.asarray(ground.resize((1, 1), Image.Resampling.BOX), np.float32)[0, 0]


def _ground(rng, px, plain):
    """What things stand on."""
    first, second = rng.uniform(0, 255, (2, 3)).astype(np.float32)
    if rng.random() < 0.4:  # pale
        first, second = 255 - (255 - first) * 0.25, 255 - (255 - second) * 0.25
    if rng.random() < plain:
        colour = 255 if rng.random() < 0.55 else first
        return Image.new("RGB", (px, px), tuple(np.broadcast_to(colour, 3).astype(int).tolist()))
    second = first + (second - first) * rng.uniform(0.15, 0.8)
    across, down = _plane(px)
    angle = rng.uniform(0, np.pi)
    along = across * np.cos(angle) + down * np.sin(angle)
    athwart = down * np.cos(angle) - across * np.sin(angle)
    kind, waves = rng.integers(6), rng.uniform(2, 9)
    if kind == 0:  # gradient
        share = along + 0.5
    elif kind == 1:  # stripes
        share = (np.sin(along * waves * 6.28) > rng.uniform(-0.6, 0.6)).astype(np.float32)
    elif kind == 2:  # checks
        share = ((np.floor(along * waves) + np.floor(athwart * waves)) % 2).astype(np.float32)
    elif kind == 3:  # grain
        share = rng.random((px, px), np.float32) * rng.uniform(0.2, 0.8)
    elif kind == 4:  # spots of light, out of focus
        share = sum(
            np.exp(-((across - x) ** 2 + (down - y) ** 2) / (2 * r * r))
            for x, y, r in zip(*rng.uniform(-0.5, 0.5, (2, 5)), rng.uniform(0.04, 0.2, 5))
        )
    else:  # clouds of several octaves, as unsharp photographs have
        return _clouds(rng, px, first, second)
    rgb = first + (second - first) * np.clip(share, 0, 1)[..., None]
    return Image.fromarray(rgb.astype(np.uint8))


def _clouds(rng, px, first, second):
    rgb = np.zeros((px, px, 3), np.float32)
    for octave, cells in enumerate((3, 6, 12, 24)[: rng.integers(1, 5)]):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        rgb += np.asarray(coarse.resize((px, px), Image.Resampling.BICUBIC), np.float32) / 2**octave
    share = rgb / 510
    return Image.fromarray((first + (second - first) * share).clip(0, 255).astype(np.uint8))


def _degrade(rng, frames):
    """What cameras and files do to pictures, the same to all frames: blur, grain, JPEG."""
    px = frames[0].width
    small = int(px * rng.uniform(0.45, 0.8)) if rng.random() < 0.1 else None
    radius = rng.uniform(0.3, 1.0) if rng.random() < 0.2 else None
    colours = _colour_change(rng, 0.5) if rng.random() < 0.3 else None
    sigma = rng.uniform(2, 12) if rng.random() < 0.25 else None
    quality = int(rng.integers(25, 90)) if rng.random() < 0.25 else None
    done = []
    for image in frames:
        if small:
            image = image.resize((small, small), Image.Resampling.BILINEAR)
            image = image.resize((px, px), Image.Resampling.BILINEAR)
        if radius:
            image = image.filter(ImageFilter.GaussianBlur(radius))
        if colours:
            image = image.convert("RGB", colours)
        if sigma:
            grain = rng.standard_normal((px, px, 3), np.float32) * sigma
            image = Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))
        if quality:
            file = io.BytesIO()
            image.save(file, "JPEG", quality=quality)
            image = Image.open(file).convert("RGB")
        done.append(image)
    return done
