"""vita_jax/data/concepts.py: names and drawings, out of packages made here and of the real ones."""

import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest

from vita_jax.data import concepts
from vita_jax.data.concepts import (
    HELD_OUT,
    LABELS,
    PACKAGES,
    STYLES,
    Drawings,
    fetch,
    read_concepts,
)


def row(code, label, group, subgroup=0):
    return {"hexcode": code, "label": label, "group": group, "subgroup": subgroup, "tags": [label]}


def square(colour):
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">{body(colour)}</svg>'


def body(colour):
    return f'<path fill="{colour}" d="M4 6h8v4H4z"/>'  # half as high as wide, within a margin


@pytest.fixture
def folder(tmp_path):
    """Three concepts; packages as small as their formats allow."""

    def write(package, files):
        with tarfile.open(tmp_path / package.file, "w:gz") as archive:
            for name, content in files.items():
                content = content if isinstance(content, str) else json.dumps(content)
                info = tarfile.TarInfo(f"package/{name}")
                info.size = len(content.encode())
                archive.addfile(info, io.BytesIO(content.encode()))

    en = [row("1F408", "cat", 3), row("2693", "anchor", 5, 1), row("1F9CA", "ice", 4)]
    unwanted = [row("1F600", "grin", 0), row("1F550", "one o’clock", 5), row("1F99C", "parrot", 3)]
    zh = [
        row("1F408", "猫", 3),
        row("2693", "锚", 5),
        row("1F9CA", "冰", 4),
        row("1F550", "一点", 5),
    ]
    names = {"1F408": "CAT", "2693": "ANCHOR", "1F9CA": "ICE CUBE"}
    tables = {"subgroups": {"0": "animal-mammal", "1": "transport-water"}}
    write(
        LABELS,
        {
            "en/data.json": en + unwanted,
            "zh/data.json": zh,
            "meta/groups.json": tables,
            "meta/unicode-names.json": names,
        },
    )
    write(STYLES["twemoji"], {"1f408.svg": square("red")})
    write(HELD_OUT["openmoji"], {"color/svg/1F408.svg": square("lime"), "black/svg/2693.svg": ""})
    by_code = {"icons": {"kitty": {"body": body("blue")}}, "aliases": {"a": {"parent": "kitty"}}}
    write(STYLES["noto"], {"icons.json": by_code, "chars.json": {"1f408": "kitty"}})
    by_name = {"icons": {"ice-cube": {"body": body("blue")}, "anchor": {"body": body("teal")}}}
    for style, package in STYLES.items():
        if style not in ("twemoji", "noto"):
            write(package, {"icons.json": by_name, "chars.json": {}})
    return tmp_path


def test_concepts_are_those_of_the_kinds_with_both_names(folder):
    found = read_concepts(folder)
    assert [(c.en, c.zh, c.kind) for c in found] == [
        ("cat", "猫", 3),
        ("anchor", "锚", 5),
        ("ice", "冰", 4),
    ]
    assert [c.subgroup for c in found[:2]] == ["animal-mammal", "transport-water"]
    assert found[0].tags_en == ("cat",) and found[0].tags_zh == ("猫",)


def test_styles_that_have_a_concept_never_name_the_held_out(folder):
    drawings = Drawings(folder)
    assert drawings.styles("1F408") == ("noto", "twemoji")
    assert "noto" not in drawings.styles("2693") and "fluent" in drawings.styles("2693")
    assert "streamline" in drawings.styles("1F9CA")  # by its name in Unicode
    assert not STYLES.keys() & HELD_OUT.keys()


@pytest.mark.parametrize("style, colour", [("noto", (0, 0, 255)), ("twemoji", (255, 0, 0)),
                                           ("openmoji", (0, 255, 0))])  # fmt: skip
def test_a_drawing_fills_its_square_by_its_longer_side(folder, style, colour):
    drawn = Drawings(folder).draw(style, "1F408", 32)
    assert drawn.shape == (32, 32, 4) and drawn.dtype == np.uint8
    rows, columns = (drawn[..., 3] > 128).any(1).nonzero()[0], (drawn[..., 3] > 128).any(0)
    assert columns.all() and (rows[0], rows[-1]) == (8, 23)
    assert tuple(drawn[16, 16]) == (*colour, 255) and drawn[0, 0, 3] == 0


def test_wrong_names_are_told(folder):
    drawings = Drawings(folder)
    with pytest.raises(ValueError, match="style 'crayon'.*noto.*openmoji"):
        drawings.draw("crayon", "1F408", 32)
    with pytest.raises(ValueError, match="twemoji has no drawing of 2693"):
        drawings.draw("twemoji", "2693", 32)
    (folder / STYLES["noto"].file).unlink()
    with pytest.raises(FileNotFoundError, match=r"iconify-json-noto-.*fetch\("):
        drawings.draw("noto", "1F408", 32)


def test_fetch_checks_what_is_there(folder):
    with pytest.raises(ValueError, match="emojibase-data.*sha256.*expected d01d0e2c.*fetch it"):
        fetch(folder)


def test_fetch_without_npm_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="install Node.js, or .*npm pack emojibase-data@17"):
        fetch(tmp_path)


def test_fetch_tells_why_npm_failed(tmp_path, monkeypatch):
    (npm := tmp_path / "npm").write_text("#!/bin/sh\necho no such host >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setattr(concepts.shutil, "which", lambda name: str(npm))
    with pytest.raises(ValueError, match="npm pack emojibase-data@17.0.0: no such host; check"):
        fetch(tmp_path / "new")


def test_packages_are_pinned():
    assert len({package.file for package in PACKAGES}) == len(PACKAGES)
    assert all(len(package.sha256) == 64 and package.licence for package in PACKAGES)


@pytest.mark.slow
def test_the_real_packages(tmp_path):
    folder = os.environ.get("VITA_DRAWINGS", tmp_path)  # one that is filled saves the download
    fetch(folder)
    found, drawings = read_concepts(folder), Drawings(folder)
    assert len(found) == 837
    cat = next(c for c in found if c.en == "cat")
    assert (cat.code, cat.zh, cat.kind, cat.subgroup) == ("1F408", "猫", 3, "animal-mammal")
    for style, least in {"noto": 837, "twemoji": 825, "fluent_flat": 829, "openmoji": 837}.items():
        assert len(drawings._svgs(style)) == least
    apple = next(c for c in found if c.en == "red apple")
    for style in (*drawings.styles(apple.code), *HELD_OUT):
        drawn = drawings.draw(style, apple.code, 64)
        red, green, blue = drawn[drawn[..., 3] > 200][:, :3].mean(0)
        assert red > 1.5 * max(green, blue), style
