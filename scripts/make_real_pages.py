"""Cut blocks of text out of PDF documents: pictures of real print, with the PDF's own text as the truth.

    python -m trtvlm.scripts.make_real_pages FOLDER NAME=FILE.pdf[.gz] ... [--count N]

A block is at most 10 lines of 48 characters on at most 768 x 512 pixels, its letters 14 to 32 pixels high. Passed over
are blocks with a character that does not fold to ASCII, with pictures, superscripts or lines that touch. Long lines
are cut at a word: what the cut runs through is painted over with the paper's colour.
"""

from __future__ import annotations

import argparse
import gzip
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from trtvlm.model.errors import UserError
from trtvlm.model.pages.page import Page
from trtvlm.model.pages.samples import write_labelled
from trtvlm.model.pages.typography import TO_ASCII

MAX_LINES = 10
MAX_CHARS = 48
MAX_SIZE = (768, 512)
LETTERS = (14.0, 32.0)
ENTROPY = 0x2EA1D0C5B97F4E638A1CE7F05D4B9236

# Dots that lead to a page number: how many there are, and with how many blanks, is nobody's text.
_LEADERS = re.compile(r"\. ?\. ?\. ?\.")


@dataclass(frozen=True)
class Word:
    """A word of a PDF page: its box in points (left, bottom, right, top), as high as its font is."""

    text: str
    left: float
    bottom: float
    right: float
    top: float


def page_words(textpage: Any) -> list[Word]:
    """Return the words of a pypdfium2 text page in its order."""
    words: list[Word] = []
    letters: list[str] = []
    boxes: list[tuple[float, float, float, float]] = []

    def close() -> None:
        if letters:
            left, bottom, right, top = zip(*boxes, strict=True)
            words.append(Word("".join(letters), min(left), min(bottom), max(right), max(top)))
            letters.clear()
            boxes.clear()

    for index in range(textpage.count_chars()):
        char = textpage.get_text_range(index, 1).translate(TO_ASCII)
        box = textpage.get_charbox(index, loose=True)
        if not char.strip():
            close()
            continue
        if boxes and not (boxes[-1][1] < (box[1] + box[3]) / 2 < boxes[-1][3]):
            close()  # the text layer has no blank at the end of some lines
        letters.append(char)
        boxes.append(box)
    close()
    return words


def rows_of(words: list[Word]) -> list[list[Word]]:
    """Group words into rows from the top of the page down, each from left to right."""
    rows: list[list[Word]] = []
    for word in sorted(words, key=lambda word: -(word.bottom + word.top)):
        middle = (word.bottom + word.top) / 2
        if rows and rows[-1][0].bottom < middle < rows[-1][0].top:
            rows[-1].append(word)
        else:
            rows.append([word])
    return [sorted(row, key=lambda word: word.left) for row in rows]


@dataclass(frozen=True)
class Block:
    """Rows of words that are kept, and the words that the right edge runs through."""

    rows: list[list[Word]]
    cut: list[Word]
    box: tuple[float, float, float, float]
    letter: float
    """Height of the smallest letters, points."""

    @property
    def text(self) -> str:
        """The rows, joined by line feeds."""
        return "\n".join(" ".join(word.text for word in row) for row in self.rows)


def block_at(rows: list[list[Word]], first: int, count: int) -> Block | None:
    """Return the block of `count` rows from `first`, or None if it is none that can be judged fairly."""
    chosen = rows[first : first + count]
    words = [word for row in chosen for word in row]
    if len(chosen) < count or not all(word.text.isascii() and word.text.isprintable() for word in words):
        return None
    heights = [word.top - word.bottom for word in words]
    if min(heights) <= 0 or max(heights) > 1.8 * min(heights):
        return None
    if any(_LEADERS.search(" ".join(word.text for word in row)) for row in chosen):
        return None
    for row in chosen:
        # superscripts, formulas: words of one row on different baselines or of different sizes
        if max(abs(word.bottom - row[0].bottom) for word in row) > 0.15 * min(heights):
            return None
    for above, below in pairwise(chosen):
        gap = above[0].bottom - below[0].top
        if gap < -0.35 * min(heights) or gap > 2 * max(heights):
            return None
    left = min(row[0].left for row in chosen)
    right = max(word.right for word in words)
    for row in chosen:
        length = -1
        for word in row:
            length += 1 + len(word.text)
            if length > MAX_CHARS:
                right = min(right, word.left - 1)
                break
    kept = [[word for word in row if word.right <= right] for row in chosen]
    if not all(kept):
        return None
    cut = [word for word in words if word.left < right + 4 and word.right > right]
    top, bottom = max(word.top for word in chosen[0]), min(word.bottom for word in chosen[-1])
    edge = max(word.right for row in kept for word in row)
    return Block(kept, cut, (left, bottom, edge, top), min(heights))


def render_block(pdf_page: Any, block: Block, rng: np.random.Generator) -> Image.Image | None:
    """Render a block at a random size within the limits, or None if there is no such size."""
    left, bottom, right, top = block.box
    margins = rng.uniform(1, 0.9 * block.letter, 4)
    width, height = right - left + margins[0] + margins[2], top - bottom + margins[1] + margins[3]
    largest = min(LETTERS[1] / block.letter, MAX_SIZE[0] / width, MAX_SIZE[1] / height)
    smallest = LETTERS[0] / block.letter
    if largest < smallest:
        return None
    scale = float(rng.uniform(smallest, largest))
    page_height = pdf_page.get_height()
    image: Image.Image = pdf_page.render(scale=scale, grayscale=True).to_pil().convert("L")
    draw = ImageDraw.Draw(image)
    paper = _paper(image)
    for word in block.cut:
        draw.rectangle(_pixels(word.left - 1, word.bottom, word.right + 1, word.top, scale, page_height), fill=paper)
    # the neighbours' rows must not look in: what lies over the margins above and below is painted over too
    x0, y0, x1, y1 = _pixels(
        left - margins[0], bottom - margins[1], right + margins[2], top + margins[3], scale, page_height
    )
    inner = _pixels(left, bottom - 0.02 * block.letter, right, top + 0.02 * block.letter, scale, page_height)
    draw.rectangle((0, y0 - 1, image.width, inner[1]), fill=paper)
    draw.rectangle((0, inner[3], image.width, y1 + 1), fill=paper)
    draw.rectangle((inner[2] + 1, y0, image.width, y1), fill=paper)
    draw.rectangle((0, y0, inner[0] - 2, y1), fill=paper)
    return image.crop((x0, y0, x1, y1))


def _paper(image: Image.Image) -> int:
    counts = image.histogram()
    return counts.index(max(counts))


def _pixels(
    left: float, bottom: float, right: float, top: float, scale: float, page_height: float
) -> tuple[int, int, int, int]:
    return (
        int(left * scale),
        int((page_height - top) * scale),
        int(np.ceil(right * scale)),
        int(np.ceil((page_height - bottom) * scale)),
    )


def real_pages(files: dict[str, Path], count: int, seed: int = 0) -> Iterator[tuple[Page, str]]:
    """Yield about `count` blocks, as many from each document, with the document's name and page.

    Raises UserError for a file that is not a PDF.
    """
    import pypdfium2 as pdfium  # type: ignore[import-untyped]

    for number, (name, path) in enumerate(sorted(files.items())):
        rng = np.random.default_rng(np.random.SeedSequence(ENTROPY, spawn_key=(seed, number)))
        try:
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            document = pdfium.PdfDocument(data)
        except (OSError, EOFError, pdfium.PdfiumError) as error:
            raise UserError(f"{path} cannot be read as a PDF ({error}): name .pdf or .pdf.gz files.") from error
        wanted = -(-count // len(files))
        for _ in range(wanted * 60):
            if not wanted:
                break
            index = int(rng.integers(len(document)))
            found = _random_block(document[index], rng)
            if found:
                wanted -= 1
                yield found, f"{name}, page {index + 1}"


def _random_block(pdf_page: Any, rng: np.random.Generator) -> Page | None:
    import pypdfium2.raw as raw  # type: ignore[import-untyped]

    rows = rows_of(page_words(pdf_page.get_textpage()))
    rows = [row for row in rows if row]
    if len(rows) < 3 or pdf_page.get_rotation():
        return None
    block = block_at(rows, int(rng.integers(len(rows))), int(rng.integers(1, MAX_LINES + 1)))
    if block is None or len(block.text) < 8:
        return None
    left, bottom, right, top = block.box
    for item in pdf_page.get_objects(filter=[raw.FPDF_PAGEOBJ_IMAGE]):
        bounds = item.get_bounds() if hasattr(item, "get_bounds") else item.get_pos()  # renamed in pypdfium2 5
        if bounds[0] < right and bounds[2] > left and bounds[1] < top and bounds[3] > bottom:
            return None
    image = render_block(pdf_page, block, rng)
    return Page(image, block.text) if image is not None else None


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write the blocks and labels.jsonl")
    parser.add_argument("documents", nargs="+", metavar="NAME=FILE", help="documents and the names to cite them by")
    parser.add_argument("--count", type=int, default=60, help="blocks in all (60)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other blocks (0)")
    arguments = parser.parse_args()
    files = {name: Path(path) for name, _, path in (document.partition("=") for document in arguments.documents)}
    found = list(real_pages(files, arguments.count, arguments.seed))
    extra: list[dict[str, object]] = [{"source": source} for _, source in found]
    size = write_labelled(arguments.folder, [page for page, _ in found], extra=extra)
    print(f"{len(found)} blocks, {size / 1e6:.2f} MB in {arguments.folder}")


if __name__ == "__main__":
    main()
