"""Draw a page of printed English text and say what stands on it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from trtvlm.model.pages import degrade
from trtvlm.model.pages.content import Writer
from trtvlm.model.pages.fonts import (
    Face,
    FontFile,
    Split,
    em_per_height,
    face,
    families,
    lookalikes,
    missing_characters,
)
from trtvlm.model.pages.layouts import LAYOUTS
from trtvlm.model.pages.sheet import Sheet
from trtvlm.model.pages.typography import Typesetter

KINDS: Mapping[str, float] = {
    "lines": 0.30,
    "prose": 0.20,
    "heading": 0.08,
    "list": 0.07,
    "form": 0.08,
    "receipt": 0.07,
    "table": 0.07,
    "styles": 0.06,
    "single": 0.06,
    "blank": 0.01,
}


@dataclass(frozen=True)
class Page:
    """A page: the picture (`L` or `RGB`) and its text, lines joined by line feeds in reading order."""

    image: Image.Image
    text: str


@dataclass(frozen=True)
class PageSpec:
    """What pages to draw.

    Widths, heights and letters are pixels; a letter's height goes from the ascender to the descender.
    `degraded` is the share of pages that are not clean; `kinds` weighs the layouts of `layouts.LAYOUTS`.
    """

    fonts: Split = "train"
    min_lines: int = 1
    max_lines: int = 10
    max_chars: int = 48
    max_width: int = 768
    max_height: int = 512
    min_letter: int = 13
    max_letter: int = 40
    degraded: float = 0.6
    kinds: Mapping[str, float] = field(default_factory=lambda: KINDS)


def render_page(rng: np.random.Generator, spec: PageSpec | None = None) -> Page:
    """Draw one page, chosen by `rng` alone (and the fonts installed).

    Raises UserError if no font of the split is installed.
    """
    spec = spec or PageSpec()
    source = random.Random(int(rng.integers(1 << 62)))  # scalar draws cost a tenth of numpy's
    kind = source.choices(list(spec.kinds), weights=list(spec.kinds.values()))[0]
    clean = source.random() >= spec.degraded
    sheet = _written(source, spec, kind, clean)
    ink, letter = _placed(source, spec, sheet)
    image = _clean(source, ink) if clean else _worn(source, ink, letter, sheet)
    return Page(image, sheet.text)


def _written(rng: random.Random, spec: PageSpec, kind: str, clean: bool) -> Sheet:
    """Choose fonts and sizes and let the layout write; a layout that found no room is tried again, smaller."""
    for attempt in range(6):
        sheet = _sheet(rng, spec, kind, clean, smallest=attempt > 2)
        LAYOUTS[kind](sheet)
        if sheet.lines or kind == "blank":
            break
    return sheet


def _font(rng: random.Random, split: Split) -> tuple[FontFile, FontFile]:
    """A font and a companion of the same family (or, now and then, of another)."""
    groups = families(split)
    for _ in range(20):
        group = rng.choice(groups)
        first = rng.choice(group)
        second = rng.choice(group if rng.random() < 0.7 else rng.choice(groups))
        if not missing_characters(first.path) and not missing_characters(second.path):
            return first, second
    raise AssertionError(f"no font of the {split} split has all of ASCII")


def _face(file: FontFile, letter: float) -> Face:
    size = max(6, round(letter * em_per_height(file.path)))
    # larger letters in even sizes only: half as many faces to open, and warps and stretches fill the gaps
    return face(file.path, size if size < 20 else size - size % 2)


def _sheet(rng: random.Random, spec: PageSpec, kind: str, clean: bool, *, smallest: bool) -> Sheet:
    first, second = _font(rng, spec.fonts)
    width, height = spec.max_width, spec.max_height
    if min(width, height) >= 256 and rng.random() < 0.25:
        width, height = height, width
    rows = 1 if kind == "single" else rng.randint(spec.min_lines, spec.max_lines)
    if kind in {"prose", "heading", "receipt", "table", "list", "form"}:
        # these are themselves only with a few lines
        rows = max(rows, rng.randint(min(2, spec.max_lines), spec.max_lines))
    columns = max(1, round(spec.max_chars * (1.0 if rng.random() < 0.3 else rng.uniform(0.15, 1.0))))
    if kind in {"prose", "heading", "receipt", "table"}:
        columns = max(columns, rng.randint(min(16, spec.max_chars), spec.max_chars))
    pitch = rng.choice((rng.uniform(1.0, 1.3), rng.uniform(1.1, 1.5), rng.uniform(1.0, 2.2)))
    # the letters must leave room for the columns and rows; half a letter's height is a usual mean width
    roomiest = min(width / (0.5 * columns), height / (1 + pitch * (rows - 1)) * 0.97)
    largest = max(spec.min_letter, min(spec.max_letter, roomiest))
    letter = spec.min_letter if smallest else rng.uniform(spec.min_letter, largest)
    if rng.random() < 0.04 and roomiest > spec.max_letter:
        letter = rng.uniform(letter, min(roomiest, 1.4 * spec.max_letter))
    body = _face(first, letter)
    contrast = {"heading": (1.0, 1.6), "styles": (0.8, 1.4)}.get(kind, (1.0, 1.15))
    bold = _face(second, max(spec.min_letter, min(letter * rng.uniform(*contrast), 1.5 * spec.max_letter)))
    if bold.height > height * 0.9:
        bold = body
    tracking = 0.0
    if rng.random() < 0.12:
        tracking = rng.uniform(-0.015, 0.12) * body.height
    usable = max(8, min(width - 2, round(columns * (sum(body.advances[97:123]) / 26 + tracking) * 1.12) + 2))
    return Sheet(
        rng,
        Writer(rng, lookalikes(first.path) | lookalikes(second.path)),
        body,
        bold=bold,
        width=usable,
        height=height - 2,
        columns=columns,
        rows=rows,
        pitch=pitch,
        tracking=tracking,
        antialias=not (clean and rng.random() < 0.15),
        typesetter=Typesetter(quotes=rng.random() < 0.25, ligatures=rng.random() < 0.12),
    )


def _placed(rng: random.Random, spec: PageSpec, sheet: Sheet) -> tuple[Image.Image, float]:
    """Cut the ink out and lay it somewhere on a canvas of some shape; return that and the letters' height."""
    widest, tallest = spec.max_width, spec.max_height
    letter = float(min(sheet.body.height, sheet.bold.height))
    if sheet.height > spec.max_height:
        widest, tallest = tallest, widest
    box = sheet.image.getbbox()
    if box is None:
        return Image.new("L", (rng.randint(32, widest), rng.randint(min(32, tallest), tallest))), letter
    ink = sheet.image.crop(box)
    if rng.random() < 0.15:
        stretch = rng.uniform(0.88, 1.15)
        ink = ink.resize((max(1, round(ink.width * stretch)), ink.height), Image.Resampling.BILINEAR)
    if rng.random() < 0.08:
        pad = rng.randint(2, max(3, sheet.body.height // 2))
        framed = Image.new("L", (ink.width + 2 * pad, ink.height + 2 * pad))
        framed.paste(ink, (pad, pad))
        frame = rng.randint(1, 2)
        bar = Image.new("L", framed.size, 255)
        bar.paste(0, (frame, frame, framed.width - frame, framed.height - frame))
        bar.paste(framed.crop((frame, frame, framed.width - frame, framed.height - frame)), (frame, frame))
        ink = bar
    shrink = min(widest / ink.width, tallest / ink.height)
    if shrink < 1:
        ink = ink.resize((max(1, int(ink.width * shrink)), max(1, int(ink.height * shrink))), Image.Resampling.BILINEAR)
        letter *= shrink
    left, right = _margins(rng, widest - ink.width, letter)
    top, bottom = _margins(rng, tallest - ink.height, letter)
    canvas = Image.new("L", (ink.width + left + right, ink.height + top + bottom))
    canvas.paste(ink, (left, top))
    if rng.random() < 0.06:
        canvas = degrade.shaded(canvas, rng)
    return canvas, letter


def _margins(rng: random.Random, spare: int, letter: float) -> tuple[int, int]:
    """Two margins whose sum is at most `spare`: tight, usual, even, or anywhere on a large page."""
    kind = rng.random()
    if kind < 0.2:
        a, b = rng.randint(0, 2), rng.randint(0, 2)
    elif kind < 0.45:
        a, b = rng.randint(2, 12), rng.randint(2, 12)
    elif kind < 0.65:
        a = b = round(rng.uniform(0.2, 2.0) * letter)
    elif kind < 0.85:
        a, b = round(rng.uniform(0.2, 2.5) * letter), round(rng.uniform(0.2, 2.5) * letter)
    else:
        total = rng.randint(0, spare)
        a = rng.randint(0, total)
        b = total - a
    a = min(a, spare)
    return a, min(b, spare - a)


def _clean(rng: random.Random, ink: Image.Image) -> Image.Image:
    """A page as a screenshot or a PDF shows it: two flat colours, mostly black and white."""
    colors = degrade.colors(rng, plain=rng.random() < 0.75)
    if degrade.contrast(ink, *colors) < 60:
        colors = degrade.colors(rng, plain=True)
    return degrade.paint(ink, *colors)


def _worn(rng: random.Random, ink: Image.Image, letter: float, sheet: Sheet) -> Image.Image:
    """A page that was printed, handled, scanned or photographed: each wear on its own."""
    chance = rng.random
    if chance() < 0.06:
        ink = degrade.ruled(ink, rng, max(8, round(sheet.pitch * letter)))
    if chance() < 0.45:
        ink = degrade.warp(ink, rng)
    if chance() < 0.06:
        ink = degrade.ghost(ink, rng)
    if chance() < 0.5:
        ink = degrade.soften(ink, rng, letter)
    if chance() < 0.07:
        return degrade.paint(degrade.two_level(ink, rng), *degrade.colors(rng, plain=True))
    colors = degrade.colors(rng, plain=chance() < 0.35)
    strokes = degrade.contrast(ink, *colors)
    if strokes < 60:
        colors = degrade.colors(rng, plain=True)
        strokes = degrade.contrast(ink, *colors)
    page = degrade.paint(ink, *colors)
    if chance() < 0.25:
        page = degrade.light(page, rng)
    if chance() < 0.45:
        page = degrade.grain(page, rng, strokes)
    if chance() < 0.08:
        page = degrade.specks(page, rng, letter)
    if chance() < 0.25:
        page = degrade.compressed(page, rng)
    return page
