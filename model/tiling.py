"""How DeepSeek-VL2 cuts an image: one global view and a grid of tiles (arXiv 2412.10302, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

Size = tuple[int, int]  # width, height in pixels


def best_resolution(size: Size, candidates: Sequence[Size]) -> Size:
    """The canvas an image of `size` is cut from.

    The one that keeps most of the image's pixels; among those the one with the least padding; among those the first.
    Sides are truncated after scaling, and an image smaller than a canvas counts no more pixels than it has.
    """
    width, height = size

    def rank(candidate: Size) -> tuple[int, int]:
        scale = min(candidate[0] / width, candidate[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return -kept, candidate[0] * candidate[1] - kept

    return min(candidates, key=rank)


def pad_to(image: Image.Image, size: Size, colour: Sequence[int]) -> Image.Image:
    """Scale to fit (bicubic, aspect kept) and centre on `colour`.

    As `PIL.ImageOps.pad`, except that no side shrinks to nothing: a 1 x 4000 image keeps one column.
    """
    width, height = _contained(image.size, size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    if (width, height) == size:
        return resized
    canvas = Image.new(image.mode, size, tuple(colour))
    canvas.paste(resized, (round((size[0] - width) * 0.5), round((size[1] - height) * 0.5)))
    return canvas


def _contained(image: Size, box: Size) -> Size:
    aspect, box_aspect = image[0] / image[1], box[0] / box[1]
    if aspect > box_aspect:
        return box[0], max(1, round(image[1] / image[0] * box[0]))
    if aspect < box_aspect:
        return max(1, round(image[0] / image[1] * box[1])), box[1]
    return box


def cut_views(image: Image.Image, resolution: Size, tile: int, colour: Sequence[int]) -> npt.NDArray[np.uint8]:
    """RGB image -> uint8 [1 + tiles, tile, tile, 3]: the global view, then the tiles row by row.

    A grey image (and one grey of padding) gives [1 + tiles, tile, tile].
    """
    width, height = resolution
    views = [pad_to(image, (tile, tile), colour)]
    canvas = pad_to(image, resolution, colour)
    for top, left in _corners(width, height, tile):
        views.append(canvas.crop((left, top, left + tile, top + tile)))
    return np.stack([np.asarray(view) for view in views])


def _corners(width: int, height: int, tile: int) -> Iterable[Size]:
    return ((top, left) for top in range(0, height, tile) for left in range(0, width, tile))
