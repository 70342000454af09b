"""vita_jax/data/scenes.py: what is asked about a picture is what can be seen in it."""

import colorsys

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from vita_jax.data import scenes
from vita_jax.data.scenes import (
    COLOURS,
    DIRECTIONS,
    PLACES,
    SHAPE_COLOURS,
    SHAPES,
    arrange,
    blank,
    group,
    move,
    restyle,
    shape,
    single,
    tint,
)


def disc(colour=(230, 30, 30), size=64):
    """A ball, lighter at its upper left, with a dark middle."""
    down, across = np.mgrid[:size, :size] / (size - 1) * 2 - 1
    light = np.clip(1 - 0.5 * np.hypot(across + 0.4, down + 0.4), 0.2, 1)
    light[np.hypot(across, down) < 0.3] *= 0.4
    rgb = np.float32(colour) * light[..., None]
    alpha = 255 * (across**2 + down**2 <= 1)
    return np.dstack([rgb, alpha]).astype(np.uint8)


@pytest.fixture
def clean(monkeypatch):
    """White ground, no other styles, nothing degraded: things can be measured."""
    white = Image.new("RGB", (112, 112), "white")
    monkeypatch.setattr(scenes, "_ground", lambda rng, px, plain: white.copy())
    monkeypatch.setattr(scenes, "_degrade", lambda rng, frames: frames)


def blobs(picture):
    """Centres, (across, down) as shares, of what is connected and not white."""
    seen = np.asarray(picture, int).sum(-1) < 3 * 255 - 60
    labels, number = ndimage.label(seen, np.ones((3, 3)))
    centres = ndimage.center_of_mass(seen, labels, range(1, number + 1))
    return np.array([(x, y) for y, x in centres]) / picture.width


RNG = np.random.default_rng


@pytest.mark.parametrize("number", range(1, 7))
def test_a_group_has_so_many_things(clean, number):
    for seed in range(12):
        same = group(RNG(seed), [disc()] * number, restyled=False)
        mixed = group(
            RNG(seed), [disc(c) for c in list(SHAPE_COLOURS.values())[:number]], restyled=False
        )
        assert len(blobs(same)) == len(blobs(mixed)) == number


def test_a_mosaic_has_a_thing_in_each_quarter(clean):
    colours = np.array([(220, 0, 0), (0, 180, 0), (0, 0, 220), (200, 200, 0)], float)
    for seed in range(10):
        drawings = [disc(colour) for colour in colours]
        picture = np.asarray(scenes.mosaic(RNG(seed), drawings, restyled=False), float)
        quarters = picture.reshape(2, 56, 2, 56, 3).swapaxes(1, 2).reshape(4, 56 * 56, 3)
        for number, quarter in enumerate(quarters):
            seen = quarter[quarter.sum(-1) < 3 * 255 - 60]
            likeness = colours @ seen.mean(0) / np.linalg.norm(colours, axis=1)
            assert likeness.argmax() == number and 0.15 < len(seen) / 56**2 < 0.9


def test_things_stand_at_their_places(clean):
    names = list(PLACES)
    for seed in range(20):
        rng = RNG(seed)
        places = [names[i] for i in rng.permutation(5)[: rng.integers(1, 6)]]
        found = blobs(arrange(rng, [disc()] * len(places), places, restyled=False))
        assert len(found) == len(places)
        for place in places:
            assert np.abs(found - PLACES[place]).max(1).min() < 0.12, places


def test_the_first_drawing_stands_at_the_first_place(clean):
    picture = arrange(RNG(0), [disc(), disc((30, 30, 230))], ["right", "left"], restyled=False)
    pixels = np.asarray(picture, int)
    warm = (pixels[..., 0] > pixels[..., 2] + 60).nonzero()[1].mean()
    cold = (pixels[..., 2] > pixels[..., 0] + 60).nonzero()[1].mean()
    assert warm > 2 * cold


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_thing_moves_in_its_direction(clean, direction):
    for seed in range(8):
        clip = move(RNG(seed), disc(), direction, frames=4 + seed % 3, restyled=False)
        track = np.concatenate([blobs(frame) for frame in clip])
        assert len(track) == len(clip) == 4 + seed % 3
        along = track @ np.array(DIRECTIONS[direction])
        aside = track @ (1 - np.abs(DIRECTIONS[direction]))
        assert (np.diff(along) > 0.03).all() and along[-1] - along[0] > 0.2
        assert np.ptp(aside) < 0.06


@pytest.mark.parametrize("colour", COLOURS)
def test_tint_has_the_colour_and_keeps_the_shading(colour):
    drawing = disc()
    tinted = tint(drawing, colour)
    inside = drawing[..., 3] > 0
    np.testing.assert_array_equal(tinted[..., 3], drawing[..., 3])
    mean = tinted[inside][:, :3].mean(0) / 255
    hue, saturation, value = colorsys.rgb_to_hsv(*mean)
    wanted = colorsys.rgb_to_hsv(*np.array(COLOURS[colour]) / 255)
    if wanted[1] > 0.3:
        assert min(abs(hue - wanted[0]), 1 - abs(hue - wanted[0])) < 0.03 and saturation > 0.3
    else:
        assert saturation < 0.1 and abs(value - wanted[2]) < 0.15
    before, after = (picture[inside][:, :3].sum(1) for picture in (drawing, tinted))
    assert np.corrcoef(before, after)[0, 1] > 0.7


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("colour", SHAPE_COLOURS)
def test_shapes_have_their_colour_and_form(name, colour):
    shares = {"circle": (0.7, 0.86), "rectangle": (0.97, 1.01), "triangle": (0.4, 0.56)}[name]
    for seed in range(4):
        pixels = np.asarray(shape(RNG(seed), name, colour, 256), int)
        assert pixels[0, 0].min() >= 230 or pixels[-1, -1].min() >= 230
        seen = (pixels == SHAPE_COLOURS[colour]).all(-1)
        rows, columns = np.nonzero(seen)
        box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        assert shares[0] < seen.sum() / box < shares[1]


def test_a_single_drawing_is_large_and_mostly_inside(clean):
    full = np.pi / 4 * 112**2
    for seed in range(30):
        picture = single(RNG(seed), disc())
        assert picture.size == (112, 112) and picture.mode == "RGB"
        seen = (np.asarray(picture, int).sum(-1) < 3 * 255 - 30).sum() / full
        assert seen > 0.6 * 0.45**2 * 0.7


def test_flip_only_where_allowed(clean, monkeypatch):
    monkeypatch.setattr(scenes, "RESTYLED", 0)
    drawing = disc()
    drawing[:, 32:, :3] = (20, 20, 240)

    def red_at_left(seed, flip):
        pixels = np.asarray(single(RNG(seed), drawing, flip=flip), int)
        warm, cold = pixels[..., 0] > pixels[..., 2] + 40, pixels[..., 2] > pixels[..., 0] + 40
        return warm.nonzero()[1].mean() < cold.nonzero()[1].mean()

    monkeypatch.setattr(scenes, "_colour_change", lambda *_: (1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0))
    kept = [red_at_left(seed, False) for seed in range(30)]
    assert np.mean(kept) > 0.85  # all but those turned upside down
    assert 0.2 < np.mean([red_at_left(seed, True) for seed in range(30)]) < 0.8


def test_restyle_draws_dark_lines_around_the_shape():
    ball = disc((250, 210, 60))
    darkest = []
    for seed in range(40):
        drawn = restyle(RNG(seed), ball)
        assert drawn.shape == ball.shape and drawn.dtype == np.uint8
        rim = drawn[32, :12]  # a row of pixels, from outside across the left rim
        darkest.append(rim[rim[:, 3] > 128][:, :3].sum(1).min(initial=765))
    assert 0.5 < np.mean(np.array(darkest) < 250) < 0.95
    assert len({restyle(RNG(seed), ball).tobytes() for seed in range(10)}) == 10


def test_a_blank_has_nothing_in_it(clean):
    assert len(blobs(blank(RNG(0)))) == 0


def test_the_same_seed_makes_the_same_bytes():
    drawings = [disc(), disc((30, 30, 230))]
    made = [
        lambda rng: [single(rng, drawings[0])],
        lambda rng: [arrange(rng, drawings, ["left", "top"])],
        lambda rng: [group(rng, drawings * 2)],
        lambda rng: [blank(rng)],
        lambda rng: move(rng, drawings[0], "up"),
        lambda rng: [shape(rng, "circle", "red")],
    ]
    for make in made:
        for seed in range(8):
            first, again, other = (make(RNG(s)) for s in (seed, seed, seed + 100))
            assert [p.tobytes() for p in first] == [p.tobytes() for p in again]
            assert [p.size for p in first] == [p.size for p in other]
        assert any(make(RNG(s))[0].tobytes() != first[0].tobytes() for s in range(3))


def test_drawings_are_left_as_they_were():
    drawing = disc()
    before = drawing.copy()
    for seed in range(10):
        single(RNG(seed), drawing)
        tint(drawing, "teal")
    assert np.array_equal(drawing, before)


@pytest.mark.parametrize("make, message", [
    (lambda: arrange(RNG(0), [disc()], ["corner"]), "place 'corner': expected one of left"),
    (lambda: arrange(RNG(0), [disc()], ["left", "top"]), "1 drawings at"),
    (lambda: arrange(RNG(0), [disc()] * 2, ["left", "left"]), "expected a place for each"),
    (lambda: group(RNG(0), []), "0 drawings: expected 1 to 6"),
    (lambda: group(RNG(0), [disc()] * 7), "7 drawings: expected 1 to 6"),
    (lambda: move(RNG(0), disc(), "away"), "direction 'away': expected one of left"),
    (lambda: move(RNG(0), disc(), "up", frames=1), "1 frames: nothing moves"),
    (lambda: tint(disc(), "plaid"), "colour 'plaid': expected one of red"),
    (lambda: shape(RNG(0), "star", "red"), "shape 'star'.*expected one of circle"),
    (lambda: shape(RNG(0), "circle", "pink"), "colour 'pink'.*in one of black"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_told(make, message):
    with pytest.raises(ValueError, match=message):
        make()
