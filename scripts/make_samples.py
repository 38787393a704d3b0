"""Draw the bundled sample pages again: `python -m trtvlm.scripts.make_samples [FOLDER]`.

The seeds are of their own: training seeds are short tuples, these are 128-bit entropies, so no sample page is ever
trained on. Which fonts are installed decides how the pages look, so the files themselves are in the repository.
"""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from trtvlm.model.pages.content import Writer
from trtvlm.model.pages.fonts import Face, Split, em_per_height, face, families
from trtvlm.model.pages.page import Page, PageSpec, render_page
from trtvlm.model.pages.samples import SAMPLES, write_labelled
from trtvlm.model.pages.sheet import Cell, Sheet

ENTROPY = {
    "calibration": 0xC0A11B12A7E5B3D94F6C8E21A05D7731,
    "heldout": 0x4E1D0A75D2B64C13985EF06B7A2C9D48,
    "heldout_fonts": 0x8F07E5A1C3924B6DB17A50E3D94C2F66,
}
COUNTS = {"calibration": 64, "heldout": 100, "heldout_fonts": 60}
FONTS: dict[str, Split] = {"calibration": "train", "heldout": "train", "heldout_fonts": "heldout"}


def sample_pages(split: str) -> Iterator[Page]:
    """Yield pages of a split without end; page i depends on i and the installed fonts only."""
    index = 0
    while True:
        sequence = np.random.SeedSequence(ENTROPY[split], spawn_key=(index,))
        yield render_page(np.random.default_rng(sequence), PageSpec(fonts=FONTS[split]))
        index += 1


DEMO_ITEMS = (
    ("Sourdough loaf", "4.20"),
    ("Green tea, 100 g", "7.95"),
    ("2 x Apricot jam", "9.80"),
    ("Dark roast coffee", "12.40"),
)


def demo_page() -> Page:
    """Draw a shop's receipt, clean and easy on the eye."""
    groups = {group[0].family: group for group in families("train")}
    group = groups.get("Liberation Sans") or groups.get("DejaVu Sans") or next(iter(groups.values()))
    bold_file = next((font for font in group if font.path.endswith("-Bold.ttf")), group[0])
    plain_file = next((font for font in group if font.path.endswith("-Regular.ttf")), group[0])
    body, bold = (
        face(font.path, round(height * em_per_height(font.path)))
        for font, height in ((plain_file, 24), (bold_file, 28))
    )
    rng = random.Random(0)
    sheet = Sheet(rng, Writer(rng), body, bold=bold, width=430, height=460, columns=48, rows=10, pitch=1.42)

    def centred(text: str, font: Face = body) -> None:
        sheet.row([Cell((sheet.width - sheet.measure(text, font)) / 2, text, font)])

    centred("HARBOUR STREET BAKERY", bold)
    centred("Tuesday, March 4, 2025  09:41")
    sheet.top += 12
    for item, price in DEMO_ITEMS:
        sheet.row([Cell(0, item, body), Cell(sheet.width - sheet.measure(price), price, body)])
    sheet.top += 8
    sheet.rule(0, sheet.top - 8, sheet.width, sheet.top - 8)
    total = face(bold_file.path, body.size)
    sheet.row([Cell(0, "TOTAL", total), Cell(sheet.width - total.width("$34.35"), "$34.35", total)])
    sheet.top += 8
    centred("Thank you & see you soon!")
    ink = sheet.image.crop(sheet.image.getbbox())
    page = Image.new("L", (512, 384))
    page.paste(ink, ((512 - ink.width) // 2, (384 - ink.height) // 2))
    return Page(ImageOps.invert(page), sheet.text)


def main() -> None:
    """Write all splits and the demo page to the folder named on the command line, or in place."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else SAMPLES
    for split, count in COUNTS.items():
        shutil.rmtree(folder / split, ignore_errors=True)
        source = sample_pages(split)
        size = write_labelled(folder / split, [next(source) for _ in range(count)])
        print(f"{split}: {count} pages, {size / 1e6:.2f} MB")
    demo = demo_page()
    demo.image.save(folder / "demo.png", optimize=True)
    (folder / "demo.txt").write_text(demo.text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
