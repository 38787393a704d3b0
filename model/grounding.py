"""Boxes in an answer: `<|ref|>label<|/ref|><|det|>[[x1, y1, x2, y2], ...]<|/det|>`."""

from __future__ import annotations

import re

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels

_GROUNDED = re.compile(r"<\|ref\|>(.*?)<\|/ref\|>\s*<\|det\|>(.*?)<\|/det\|>", re.DOTALL)
_BOX = re.compile(r"\[\s*(\d{1,9})\s*,\s*(\d{1,9})\s*,\s*(\d{1,9})\s*,\s*(\d{1,9})\s*\]")
_LAST = 999  # coordinates run from 0 to 999 over the whole side


def parse_grounding(text: str, image_size: tuple[int, int]) -> list[tuple[str, list[Box]]]:
    """Every grounded label of an answer, in order, with its boxes in pixels of the original image.

    text: decoded with `skip_special_tokens=False`. image_size: width, height of the image as `load_image` returns it.
    A pixel is int(v / 999 * side), as the official demo draws it; values beyond 999 are taken as 999. A model may write
    anything: what is no box is left out, and a label without one gets an empty list.
    """
    return [
        (label.strip(), [_pixels(box.groups(), image_size) for box in _BOX.finditer(boxes)])
        for label, boxes in _GROUNDED.findall(text)
    ]


def _pixels(box: tuple[str, ...], image_size: tuple[int, int]) -> Box:
    left, top, right, bottom = (
        int(min(int(value), _LAST) / _LAST * side) for value, side in zip(box, image_size * 2, strict=True)
    )
    return left, top, right, bottom
