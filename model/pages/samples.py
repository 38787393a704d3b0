"""The pages that are bundled: pictures and their text, for calibrating, testing and the demonstration."""

from __future__ import annotations

import io
import json
from pathlib import Path

from PIL import Image

from trtvlm.model.errors import UserError
from trtvlm.model.pages.page import Page

SAMPLES = Path(__file__).parent / "samples"
SPLITS = ("calibration", "heldout", "heldout_fonts", "real")
LABELS = "labels.jsonl"
DEMO_PAGE = SAMPLES / "demo.png"
DEMO_TEXT = SAMPLES / "demo.txt"


def load_samples(split: str, limit: int | None = None) -> list[Page]:
    """Return the bundled pages of a split, the first `limit` of them.

    `calibration` and `heldout` are drawn in training fonts, `heldout_fonts` in fonts never trained on, all from seeds
    never trained on; `real` is cut from documents. Raises UserError for a split there is none of.
    """
    if split not in SPLITS:
        raise UserError(f"There are no sample pages named {split!r}: choose one of {', '.join(SPLITS)}.")
    return load_labelled(SAMPLES / split, limit)


def load_labelled(folder: str | Path, limit: int | None = None) -> list[Page]:
    """Return the pages of any folder with a `labels.jsonl` of {"file", "text"} objects.

    Raises UserError if the labels are missing or a line of them cannot be used.
    """
    labels = Path(folder) / LABELS
    if not labels.is_file():
        raise UserError(f"{folder} has no {LABELS}: name a folder of page images with their text in that file.")
    pages = []
    for number, line in enumerate(labels.read_text(encoding="utf-8").splitlines()[:limit], 1):
        try:
            label = json.loads(line)
            with Image.open(labels.parent / label["file"]) as image:
                image.load()
                pages.append(Page(image, str(label["text"])))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UserError(
                f"Line {number} of {labels} does not name a readable page and its text ({error})."
            ) from error
    return pages


def write_labelled(folder: str | Path, pages: list[Page], *, extra: list[dict[str, object]] | None = None) -> int:
    """Write pages as small greyscale files and their `labels.jsonl`; return the bytes written.

    A page is a PNG where that is no larger than 1.3 times its JPEG (clean pages are), a JPEG of quality 78 otherwise.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    total = 0
    for index, page in enumerate(pages):
        grey = page.image.convert("L")
        encoded = {}
        for suffix, options in (
            ("png", {"optimize": True}),
            ("jpg", {"format": "JPEG", "quality": 78, "optimize": True}),
        ):
            buffer = io.BytesIO()
            grey.save(buffer, **({"format": "PNG"} | options))
            encoded[suffix] = buffer.getvalue()
        suffix = "png" if len(encoded["png"]) <= 1.3 * len(encoded["jpg"]) else "jpg"
        name = f"{index:03}.{suffix}"
        (folder / name).write_bytes(encoded[suffix])
        total += len(encoded[suffix])
        label = {"file": name, "text": page.text} | (extra[index] if extra else {})
        lines.append(json.dumps(label, ensure_ascii=False) + "\n")
    (folder / LABELS).write_text("".join(lines), encoding="utf-8")
    return total + sum(len(line.encode()) for line in lines)
