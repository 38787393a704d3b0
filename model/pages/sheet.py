"""A sheet that layouts write rows on: it keeps the place, the room that is left, the ink and the text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from trtvlm.model.pages.content import Writer
from trtvlm.model.pages.fonts import Face
from trtvlm.model.pages.typography import Typesetter


@dataclass(frozen=True)
class Cell:
    """A piece of a row: text with its left edge at `x` pixels; several cells of a row are read left to right."""

    x: float
    text: str
    face: Face


class Sheet:
    """A canvas of ink (0 none, 255 full) that rows of text are drawn on, from the top down.

    `width` and `height` are the pixels that text may take; `columns` the most characters of a row and `rows` the most
    rows; `pitch` the distance of baselines as a multiple of the letters' height; `tracking` extra pixels after
    every character. `lines[i]` is the text of row i.
    """

    def __init__(
        self,
        rng: random.Random,
        writer: Writer,
        body: Face,
        *,
        bold: Face,
        width: int,
        height: int,
        columns: int,
        rows: int,
        pitch: float,
        tracking: float = 0.0,
        antialias: bool = True,
        typesetter: Typesetter | None = None,
    ) -> None:
        """Start an empty sheet."""
        self.rng = rng
        self.writer = writer
        self.body = body
        self.bold = bold
        self.width = width
        self.height = height
        self.columns = columns
        self.rows = rows
        self.pitch = pitch
        self.tracking = tracking
        self.typesetter = typesetter or Typesetter()
        self.lines: list[str] = []
        self.top = 0
        # letters may reach a little out of their box (italics, accents): the slack is cropped away later
        self.slack = body.height // 2 + 4
        self.image = Image.new("L", (width + 2 * self.slack, height + 2 * self.slack))
        self.draw = ImageDraw.Draw(self.image)
        if not antialias:
            self.draw.fontmode = "1"

    @property
    def text(self) -> str:
        """The text written so far."""
        return "\n".join(self.lines)

    def room(self, face: Face | None = None) -> bool:
        """Say whether another row of this face fits."""
        return len(self.lines) < self.rows and self.top + (face or self.body).height <= self.height

    def measure(self, text: str, face: Face | None = None) -> float:
        """Return the width of a text in pixels, tracking included."""
        return (face or self.body).width(text) + self.tracking * len(text)

    def fits(self, text: str, face: Face | None = None, width: float | None = None) -> bool:
        """Say whether a text fits on a row (or in `width` pixels)."""
        return len(text) <= self.columns and self.measure(text, face) <= (self.width if width is None else width)

    def cut(self, text: str, face: Face | None = None, width: float | None = None) -> str:
        """Return the longest beginning of the text that fits, whole words if any of them does."""
        while not self.fits(text, face, width):
            shorter = text.rpartition(" ")[0]
            text = shorter or text[:-1]
        return text.strip()

    def row(self, cells: Sequence[Cell], *, ink: int = 255) -> tuple[int, int]:
        """Draw a row and go to the next; return its top and bottom. Empty cells are left out, as is an empty row."""
        cells = [cell for cell in cells if cell.text]
        if not cells:
            return self.top, self.top
        ascent = max(cell.face.ascent for cell in cells)
        height = max(cell.face.height for cell in cells)
        top = self.top
        for cell in cells:
            self._put(cell, top + ascent, ink)
        # several blanks in a row look like any wide gap: one stands for all of them
        self.lines.append(" ".join(" ".join(cell.text for cell in cells).split()))
        self.top += round(height * self.pitch)
        return top, top + height

    def _put(self, cell: Cell, baseline: int, ink: int) -> None:
        x, y = cell.x + self.slack, baseline + self.slack
        if not self.tracking:
            shown = self.typesetter(cell.text, cell.face.path)
            self.draw.text((x, y), shown, fill=ink, font=cell.face.font, anchor="ls")
            return
        for char in cell.text:
            if char != " ":
                self.draw.text((x, y), char, fill=ink, font=cell.face.font, anchor="ls")
            x += cell.face.advances[ord(char)] + self.tracking

    def rule(self, x0: float, y0: float, x1: float, y1: float, *, thickness: int = 1, ink: int = 255) -> None:
        """Draw a line."""
        s = self.slack
        self.draw.line((round(x0 + s), round(y0 + s), round(x1 + s), round(y1 + s)), fill=ink, width=thickness)

    def box(self, x0: float, y0: float, x1: float, y1: float, *, thickness: int = 1) -> None:
        """Draw a frame; what would lie outside the canvas is moved in."""
        s = self.slack
        w, h = self.image.size
        x0, y0, x1, y1 = max(0, x0 + s), max(0, y0 + s), min(w - 1, x1 + s), min(h - 1, y1 + s)
        self.draw.rectangle((round(x0), round(y0), round(x1), round(y1)), outline=255, width=thickness)

    def invert(self, x0: float, y0: float, x1: float, y1: float) -> None:
        """Swap ink and paper in a rectangle: a dark bar with light letters."""
        s = self.slack
        w, h = self.image.size
        area = (max(0, round(x0 + s)), max(0, round(y0 + s)), min(w, round(x1 + s)), min(h, round(y1 + s)))
        self.image.paste(self.image.crop(area).point(_INVERT), area[:2])


_INVERT = [255 - value for value in range(256)]
