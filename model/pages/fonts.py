"""Which fonts pages are drawn in: a table of families, where their files are, and a face of one size."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from PIL import ImageFont

from trtvlm.model.errors import UserError

Split = Literal["train", "heldout"]
FONTS_VARIABLE = "TRTVLM_FONTS"
PRINTABLE = "".join(map(chr, range(33, 127)))

STANDARD_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "/usr/share/texmf/fonts/opentype",
    "~/.local/share/fonts",
    "~/.fonts",
)
# The font-* packages of PyPI put their files in `<module>/files`; looking for the module imports nothing.
FONT_MODULES = (
    "font_caladea",
    "font_fjallaone",
    "font_hanken_grotesk",
    "font_lato",
    "font_manrope",
    "font_rhd",
    "font_roboto",
    "font_source_sans_pro",
    "font_source_serif_pro",
)
DEBIAN_PACKAGES = (
    "fonts-dejavu fonts-liberation fonts-liberation2 fonts-freefont-ttf fonts-urw-base35 fonts-croscore "
    "fonts-crosextra-carlito fonts-crosextra-caladea fonts-roboto fonts-open-sans fonts-lato "
    "fonts-inconsolata fonts-hack fonts-firacode fonts-cantarell fonts-linuxlibertine fonts-lmodern "
    "fonts-noto-core fonts-noto-mono fonts-comfortaa fonts-courier-prime fonts-cmu fonts-ebgaramond "
    "fonts-junicode fonts-quicksand fonts-oxygen fonts-mononoki fonts-sil-gentium"
)


@dataclass(frozen=True)
class Family:
    """A typeface: the file stems it owns (a full-match regular expression) and the split it is used in."""

    name: str
    stems: str
    split: Split = "train"


# No held-out family has a clone among the training ones (Liberation, croscore, FreeFont and URW draw the same few
# designs; Latin Modern is Computer Modern; Carlito is Lato; all of those are in training). Hairline weights, small
# capitals and swash cuts are left out: nobody prints pages in them, and small capitals hide the letters' case.
_STYLE = (
    r"(-?(Regular|Roman|Book|Medium|Semi[Bb]old|Demi|Bold|Bd|Heavy|Black|ExtraBold|Light|Retina|Italic|Ita?|Oblique))*"
)
FAMILIES: tuple[Family, ...] = (
    Family("DejaVu Sans", rf"DejaVuSans(Condensed)?{_STYLE}"),
    Family("DejaVu Serif", rf"DejaVuSerif(Condensed)?{_STYLE}"),
    Family("DejaVu Sans Mono", rf"DejaVuSansMono{_STYLE}"),
    Family("Liberation Sans", rf"LiberationSans{_STYLE}"),
    Family("Liberation Sans Narrow", rf"LiberationSansNarrow{_STYLE}"),
    Family("Liberation Serif", rf"LiberationSerif{_STYLE}"),
    Family("Liberation Mono", rf"LiberationMono{_STYLE}"),
    Family("Arimo", rf"Arimo{_STYLE}"),
    Family("Tinos", rf"Tinos{_STYLE}"),
    Family("Cousine", rf"Cousine{_STYLE}"),
    Family("FreeSans", rf"FreeSans{_STYLE}"),
    Family("FreeSerif", rf"FreeSerif{_STYLE}"),
    Family("FreeMono", rf"FreeMono{_STYLE}"),
    Family("Nimbus Sans", rf"NimbusSans(Narrow)?{_STYLE}"),
    Family("Nimbus Roman", rf"NimbusRoman{_STYLE}"),
    Family("Nimbus Mono", rf"NimbusMonoPS{_STYLE}"),
    Family("P052", rf"P052{_STYLE}"),
    Family("C059", rf"C059{_STYLE}"),
    Family("URW Bookman", rf"URWBookman{_STYLE}"),
    Family("URW Gothic", rf"URWGothic{_STYLE}"),
    Family("Carlito", rf"Carlito{_STYLE}"),
    Family("Caladea", rf"Caladea{_STYLE}"),
    Family("Roboto", rf"Roboto{_STYLE}"),
    Family("Roboto Condensed", rf"RobotoCondensed{_STYLE}"),
    Family("Open Sans", r"OpenSans-(Cond)?(Light|Regular|Semibold|Bold|ExtraBold)?(Italic)?"),
    Family("Lato", rf"Lato{_STYLE}"),
    Family("Inconsolata", r"Inconsolata"),
    Family("Hack", rf"Hack{_STYLE}"),
    Family("Fira Code", rf"FiraCode{_STYLE}"),
    Family("Linux Libertine", r"LinLibertine_(R|RB|RBI|RI|RZ|RZI|DR|M)"),
    Family("Linux Biolinum", r"LinBiolinum_(R|RB|RI)"),
    Family("Latin Modern Roman", r"lmroman(8|10|12|17|demi10|slant10)-(regular|bold|italic|bolditalic|oblique)"),
    Family("Latin Modern Sans", r"lmsans(8|10|12|17|demicond10)-(regular|bold|oblique|boldoblique)"),
    Family(
        "Latin Modern Mono", r"lmmono(8|10|12|lt10|prop10|slant10|ltcond10)-(regular|bold|italic|oblique|boldoblique)"
    ),
    Family("Computer Modern", r"cmun(rm|bx|ti|bi|sl|ss|sx|tt|vt|ssdc|orm|bmr)"),
    Family("Noto Sans", rf"NotoSans(Display)?{_STYLE}"),
    Family("Noto Serif", rf"NotoSerif(Display)?{_STYLE}"),
    Family("Noto Mono", rf"Noto(Sans)?Mono{_STYLE}"),
    Family("Comfortaa", rf"Comfortaa{_STYLE}"),
    Family("Courier Prime", r"Courier Prime( (Code|Sans))?( Bold)?( Italic)?"),
    Family("EB Garamond", r"EBGaramond(08|12)-(Regular|Italic|Bold)"),
    Family("Quicksand", rf"Quicksand{_STYLE}"),
    Family("Oxygen Mono", r"OxygenMono-Regular"),
    Family("Hanken Grotesk", rf"HankenGrotesk{_STYLE}"),
    Family("Manrope", rf"Manrope{_STYLE}"),
    Family("Red Hat Display", rf"RedHatDisplay{_STYLE}"),
    Family("Source Sans Pro", rf"SourceSansPro{_STYLE}"),
    Family("Source Serif Pro", rf"SourceSerifPro{_STYLE}"),
    Family("Fjalla One", rf"FjallaOne{_STYLE}"),
    Family("Gentium", r"Gentium(Alt)?-[RI]", "heldout"),  # serif
    Family("Cantarell", rf"Cantarell{_STYLE}", "heldout"),  # sans
    Family("Oxygen", r"Oxygen-Sans(-Bold)?", "heldout"),  # sans
    Family("mononoki", rf"mononoki{_STYLE}", "heldout"),  # mono
    Family("Junicode Condensed", r"JunicodeTwoBeta-(Semi)?Condensed(Medium)?(Italic)?", "heldout"),  # condensed, odd
)


@dataclass(frozen=True)
class FontFile:
    """One font file of a family."""

    family: str
    path: str


@lru_cache(maxsize=8)
def families(split: Split) -> tuple[tuple[FontFile, ...], ...]:
    """Return the installed fonts of a split, grouped by family, in the order of the table.

    The folders are those of the environment variable TRTVLM_FONTS (joined by the platform's path separator), or else
    the usual ones of the system and of PyPI's font-* packages. Raises UserError if no font of the split is installed.
    """
    found: dict[str, dict[str, str]] = {}
    table = [(family, re.compile(family.stems)) for family in FAMILIES if family.split == split]
    for path in _font_files(search_folders()):
        for family, stems in table:
            if stems.fullmatch(path.stem):
                # otf and ttf of the same name draw the same letters: the first found is enough
                found.setdefault(family.name, {}).setdefault(path.stem, str(path))
    groups = tuple(
        tuple(FontFile(family.name, path) for _, path in sorted(found[family.name].items()))
        for family, _ in table
        if family.name in found
    )
    if not groups:
        raise UserError(
            f"No {'held-out' if split == 'heldout' else 'training'} font was found in "
            f"{', '.join(map(str, search_folders()))}: install some with `apt-get install {DEBIAN_PACKAGES}` "
            f"(any of them will do) or name a folder in {FONTS_VARIABLE}."
        )
    return groups


def search_folders() -> list[Path]:
    """Return the folders looked in for fonts."""
    named = os.environ.get(FONTS_VARIABLE)
    if named:
        return [Path(folder).expanduser() for folder in named.split(os.pathsep) if folder]
    folders = [Path(folder).expanduser() for folder in STANDARD_FOLDERS]
    for module in FONT_MODULES:
        spec = importlib.util.find_spec(module)
        folders += [Path(location) for location in (spec.submodule_search_locations or [])] if spec else []
    return folders


def _font_files(folders: Sequence[Path]) -> Iterator[Path]:
    for folder in folders:
        # sorted: the choice of fonts, and so every page, must not depend on the file system's order
        yield from sorted(path for path in folder.rglob("*") if path.suffix.lower() in {".ttf", ".otf"})


class Face:
    """A font file at one size, with what the layout needs to know of it, measured once.

    `ascent` and `height` are pixels: from the baseline to the top of the tallest letter, and from there to the
    bottom of the lowest one. `advances[code]` is the width of an ASCII character.
    """

    def __init__(self, path: str, size: int) -> None:
        """Open the file at `size` pixels to the em."""
        # Basic layout: no ligatures, so that every character keeps its own shape, and twice as fast.
        self.font = ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
        self.path = path
        self.size = size
        top, bottom = self.font.getbbox("bdfhklTgjpqy|", anchor="ls")[1::2]
        self.ascent = int(-top)
        self.height = int(bottom - top)
        self.advances = [0.0] * 32 + [self.font.getlength(chr(code)) for code in range(32, 127)]

    def width(self, text: str) -> float:
        """Return the width of an ASCII text in pixels, kerning left out."""
        advances = self.advances
        return sum(advances[code] for code in text.encode("ascii"))


@lru_cache(maxsize=8192)
def face(path: str, size: int) -> Face:
    """Return the (cached) face of a font file at `size` pixels to the em."""
    return Face(path, size)


@lru_cache(maxsize=1024)
def em_per_height(path: str) -> float:
    """Return the em size of a font divided by its letters' height, ascender to descender."""
    return 100 / face(path, 100).height


@lru_cache(maxsize=2048)
def glyphs(path: str, characters: str) -> frozenset[str]:
    """Return those of the characters that a font draws."""
    font = face(path, 24).font
    absent = bytes(font.getmask("\U0010fffe"))
    masks = {char: bytes(font.getmask(char)) for char in characters}
    return frozenset(char for char, mask in masks.items() if any(mask) and mask != absent)


def missing_characters(path: str) -> frozenset[str]:
    """Return the printable ASCII characters that a font has no glyph for."""
    return frozenset(PRINTABLE) - glyphs(path, PRINTABLE)


@lru_cache(maxsize=1024)
def lookalikes(path: str) -> frozenset[str]:
    """Return the characters to leave out of random strings, because this font draws another one just like them.

    In many sans-serif fonts capital I, small l and the bar are one stroke, in some O and 0 one ring: in words the
    neighbours tell which it is, in a random string nothing does.
    """
    font = face(path, 40).font
    shapes = {char: font.getmask(char) for char in "Il|1O0o'`"}
    out = set()
    for keep, drop in (("l", "I"), ("l", "|"), ("I", "|"), ("1", "l"), ("1", "I"), ("0", "O"), ("'", "`")):
        a, b = shapes[keep], shapes[drop]
        near = abs(a.size[0] - b.size[0]) <= 4 and abs(a.size[1] - b.size[1]) <= 5
        if near and _difference(a.size, bytes(a), b.size, bytes(b)) < 0.4:
            out |= {keep, drop} if drop != "|" else {drop}
    return frozenset(out)


def _difference(size_a: tuple[int, int], a: bytes, size_b: tuple[int, int], b: bytes) -> float:
    """Share of the ink of two masks that does not overlap, their top left corners laid on each other."""
    total = sum(a) + sum(b)
    if not total:
        return 0.0
    apart = 0
    for y in range(max(size_a[1], size_b[1])):
        for x in range(max(size_a[0], size_b[0])):
            ink_a = a[y * size_a[0] + x] if x < size_a[0] and y < size_a[1] else 0
            ink_b = b[y * size_b[0] + x] if x < size_b[0] and y < size_b[1] else 0
            apart += abs(ink_a - ink_b)
    return apart / total
