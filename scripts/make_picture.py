"""Draw the README's picture: a page, and beside it what `trtvlm generate` printed for it.

python -m trtvlm.scripts.make_picture --engine demo/engine [--image PAGE.png] [--output docs/demo.svg]

The terminal's text is real text, in whatever monospaced font the reader has.
"""

from __future__ import annotations

import base64
import subprocess
import sys
from html import escape
from pathlib import Path

import click
from PIL import Image

from trtvlm.model.errors import UserError
from trtvlm.model.pages.samples import DEMO_PAGE

FONT_SIZE, LEADING, MARGIN, PAGE_WIDTH = 14, 20, 24, 400
CHARACTER = 0.602 * FONT_SIZE  # the advance of the usual monospaced fonts
COLOURS = {"command": "#8ec07c", "text": "#ebdbb2", "figures": "#a89984"}
FONTS = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


def draw(page: Path, lines: list[tuple[str, str]]) -> str:
    """Return an SVG of the page and a terminal. lines: (a key of COLOURS, text)."""
    with Image.open(page) as image:
        kind, (width, height) = image.format or "PNG", image.size
    page_height = round(PAGE_WIDTH * height / width)
    terminal_width = round(max(len(text) for _, text in lines) * CHARACTER) + 2 * MARGIN
    terminal_height = len(lines) * LEADING + 2 * MARGIN
    total = (3 * MARGIN + PAGE_WIDTH + terminal_width, 2 * MARGIN + max(page_height, terminal_height))
    left, top = 2 * MARGIN + PAGE_WIDTH, (total[1] - terminal_height) // 2
    data = base64.b64encode(page.read_bytes()).decode()
    place = f'x="{MARGIN}" y="{(total[1] - page_height) // 2}" width="{PAGE_WIDTH}" height="{page_height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total[0]}" height="{total[1]}" '
        f'viewBox="0 0 {total[0]} {total[1]}" font-family="{FONTS}" font-size="{FONT_SIZE}">',
        f'<image {place} href="data:image/{kind.lower()};base64,{data}"/>',
        f'<rect {place} fill="none" stroke="#a89984"/>',
        f'<rect x="{left}" y="{top}" width="{terminal_width}" height="{terminal_height}" rx="8" fill="#282828"/>',
    ]
    for number, (colour, text) in enumerate(lines):
        y = top + MARGIN + number * LEADING + FONT_SIZE
        span = f'textLength="{len(text) * CHARACTER:.1f}"' if text.strip() else ""
        parts.append(
            f'<text x="{left + MARGIN}" y="{y}" {span} fill="{COLOURS[colour]}" xml:space="preserve">'
            f"{escape(text)}</text>"
        )
    return "\n".join([*parts, "</svg>\n"])


@click.command()
@click.option("--engine", metavar="DIR", default="demo/engine", show_default=True, help="What `make demo` built.")
@click.option("--image", metavar="FILE", type=click.Path(path_type=Path), default=DEMO_PAGE, help="The page to read.")
@click.option("--output", metavar="FILE.svg", type=click.Path(path_type=Path), default=Path("docs/demo.svg"))
def main(engine: str, image: Path, output: Path) -> None:
    """Read a page with an engine, and draw what was printed."""
    command = ["generate", "--engine", engine, "--image", str(image)]
    run = subprocess.run([sys.executable, "-m", "trtvlm.scripts.cli", *command], capture_output=True, text=True)
    if run.returncode:
        raise UserError(run.stderr.strip())
    lines = [("command", "$ trtvlm generate --engine engine"), ("command", f"    --image {image.name}")]
    lines += [("text", line) for line in run.stdout.splitlines()]
    lines += [("figures", line.rstrip()) for line in run.stderr.splitlines()]
    output.write_text(draw(image, lines), encoding="utf-8")
    print(f"{output} is drawn.")


if __name__ == "__main__":
    main()
