"""How well a model reads pages: character error rates on drawn and real pages, beside tesseract's on the same images.

    python -m trtvlm.scripts.evaluate_reading [--model nano | --engine DIR] [--pages N] [--output FILE.json]

Prints a markdown table; `--output` writes the figures and the worst readings as JSON. Blanks and line breaks are folded
to one blank and typographic characters to ASCII before comparing. Tesseract is Debian's `tesseract-ocr`, told that a
page is one block of text (`--psm 6`); it is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
from PIL import Image

from trtvlm.model.cache_kind import CACHE_KINDS, CacheKind
from trtvlm.model.errors import UserError
from trtvlm.model.pages.fonts import Split
from trtvlm.model.pages.page import Page, PageSpec, render_page
from trtvlm.model.pages.samples import load_labelled, load_samples
from trtvlm.model.pages.typography import TO_ASCII

Reader = Callable[[list[Image.Image]], list[str]]
# 128 bits, so never one of the short seeds that training uses
ENTROPY = 0xE7A10A7E0F5C4D2B9B6A33C1D8E25F70
MAX_NEW_TOKENS = 640


@dataclass(frozen=True)
class Score:
    """How a reader did on a set: `cer` is edits over the characters of all its pages with text, blanks folded."""

    pages: int
    characters: int
    cer: float
    exact: int
    blank_pages: int
    blank_read_blank: int
    seconds: float
    worst: list[dict[str, Any]]


def fold(text: str) -> str:
    """Fold every run of blanks and line breaks to one blank, and curly quotes, dashes and ligatures to ASCII."""
    return " ".join(text.translate(TO_ASCII).split())


def score(pages: Sequence[Page], readings: Sequence[str], seconds: float = 0.0, worst: int = 5) -> Score:
    """Compare readings with the pages' text. Pages without text are counted apart: an error rate needs characters."""
    pairs = [(fold(page.text), fold(reading)) for page, reading in zip(pages, readings, strict=True)]
    written = [(index, truth, reading) for index, (truth, reading) in enumerate(pairs) if truth]
    blank = [reading for truth, reading in pairs if not truth]
    cer = jiwer.cer([truth for _, truth, _ in written], [reading for _, _, reading in written]) if written else 0.0
    rated = sorted(
        ((jiwer.cer(truth, reading), index, truth, reading) for index, truth, reading in written), reverse=True
    )
    return Score(
        pages=len(pages),
        characters=sum(len(truth) for _, truth, _ in written),
        cer=float(cer),
        exact=sum(truth == reading for truth, reading in pairs),
        blank_pages=len(blank),
        blank_read_blank=sum(not reading for reading in blank),
        seconds=round(seconds, 3),
        worst=[
            {"page": index, "cer": round(rate, 4), "truth": truth, "reading": reading}
            for rate, index, truth, reading in rated[:worst]
            if rate
        ],
    )


def evaluate(readers: Mapping[str, Reader], sets: Mapping[str, Sequence[Page]]) -> dict[str, dict[str, Score]]:
    """Let every reader read every set: `result[set][reader]`."""
    result: dict[str, dict[str, Score]] = {}
    for name, pages in sets.items():
        result[name] = {}
        for reader_name, read in readers.items():
            started = time.perf_counter()
            readings = read([page.image for page in pages])
            result[name][reader_name] = score(pages, readings, time.perf_counter() - started)
    return result


def markdown(result: Mapping[str, Mapping[str, Score]]) -> str:
    """Return the table: a row a set, two columns a reader."""
    readers = list(next(iter(result.values())))
    head = "| pages | how many | characters | " + " | ".join(f"{name}: CER | exact" for name in readers) + " |"
    lines = [head, "| --- | ---: | ---: |" + " ---: | ---: |" * len(readers)]
    for name, scores in result.items():
        first = next(iter(scores.values()))
        cells = " | ".join(f"{entry.cer:.2%} | {entry.exact}" for entry in scores.values())
        lines.append(f"| {name} | {first.pages} | {first.characters:,} | {cells} |")
    return "\n".join(lines)


def fresh_pages(split: Split, count: int, seed: int = 0) -> list[Page]:
    """Draw pages that nobody has seen, from a seed never trained on."""
    sequence = np.random.SeedSequence(ENTROPY, spawn_key=(seed, ("train", "heldout").index(split)))
    rng = np.random.default_rng(sequence)
    return [render_page(rng, PageSpec(fonts=split)) for _ in range(count)]


def tesseract_reader() -> Reader | None:
    """Return tesseract as a reader, or None where it is not installed."""
    program = shutil.which("tesseract")
    if program is None:
        return None

    def read(images: list[Image.Image]) -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            names = []
            for index, image in enumerate(images):
                names.append(str(Path(folder) / f"{index:05}.png"))
                image.save(names[-1])
            listing = Path(folder) / "pages.txt"
            listing.write_text("\n".join(names) + "\n", encoding="utf-8")
            # one process for all: it puts a form feed after each page
            command = [program, str(listing), "stdout", "--psm", "6", "--dpi", "100", "-l", "eng"]
            done = subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8")
        texts = done.stdout.split("\f")[: len(images)]
        return [*texts, *[""] * (len(images) - len(texts))]

    return read


def model_reader(model: str | None, engine: str | None, kv_cache: CacheKind = "fp16") -> Reader:
    """Return a model (float) or an engine directory as a reader, answering the default prompt greedily."""
    from trtvlm.runtime.engine import open_engine, open_model
    from trtvlm.runtime.request import Request, question
    from trtvlm.runtime.session import Session

    opened = open_engine(engine, kv_cache=kv_cache) if engine else open_model(model or "nano", kv_cache=kv_cache)
    session = Session(opened)

    def read(images: list[Image.Image]) -> list[str]:
        return [session.answer(Request(question([image]), max_new_tokens=MAX_NEW_TOKENS)).text for image in images]

    return read


def page_sets(count: int, seed: int, folders: Sequence[str]) -> dict[str, list[Page]]:
    """Return the sets to read: fresh pages where fonts are installed (else the bundled ones), real ones, folders."""
    sets: dict[str, list[Page]] = {}
    splits: tuple[tuple[str, Split, str], ...] = (
        ("training fonts", "train", "heldout"),
        ("held-out fonts", "heldout", "heldout_fonts"),
    )
    for name, split, bundled in splits:
        try:
            sets[f"{name}, new pages"] = fresh_pages(split, count, seed)
        except UserError:
            sets[f"{name}, bundled pages"] = load_samples(bundled, count)
    sets["real (PDF)"] = load_samples("real", count)
    for folder in folders:
        sets[Path(folder).name] = load_labelled(folder, count)
    return sets


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", help="a model, by name or folder (nano)")
    source.add_argument("--engine", help="an engine directory instead")
    source.add_argument("--no-model", action="store_true", help="tesseract alone")
    parser.add_argument("--kv-cache", choices=CACHE_KINDS, default="fp16", help="how latents are cached (fp16)")
    parser.add_argument("--pages", type=int, default=200, help="pages of each set, at most (200)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other pages (0)")
    parser.add_argument(
        "--folder", action="append", default=[], help="a folder of pages with labels.jsonl to read as well"
    )
    parser.add_argument("--no-tesseract", action="store_true", help="the model alone")
    parser.add_argument("--output", type=Path, help="write the figures and the worst readings here, as JSON")
    arguments = parser.parse_args()
    readers: dict[str, Reader] = {}
    if not arguments.no_model:
        readers[Path(arguments.engine or arguments.model or "nano").name] = model_reader(
            arguments.model, arguments.engine, arguments.kv_cache
        )
    tesseract = None if arguments.no_tesseract else tesseract_reader()
    if tesseract:
        readers["tesseract"] = tesseract
    if not readers:
        parser.error("nobody is left to read: tesseract is not installed")
    result = evaluate(readers, page_sets(arguments.pages, arguments.seed, arguments.folder))
    print(markdown(result))
    if arguments.output:
        figures = {name: {reader: asdict(entry) for reader, entry in scores.items()} for name, scores in result.items()}
        arguments.output.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
