"""What happens to a page between the printer and the reader: geometry, blur, ink and paper, light, noise, compression.

Ink images are `L`, 0 for no ink and 255 for full ink; page images are `L` or `RGB` as they are seen. Work is done by
Pillow's C code wherever it can be, because a page must be drawn in a millisecond or two.
"""

from __future__ import annotations

import io
import math
import random
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

NOISE_SIDE = 1100  # larger than any page, so that a random cut of it serves
NOISE_LEVELS = (3, 6, 10, 15, 22)  # standard deviations, in grey levels
Color = tuple[int, int, int]


def warp(ink: Image.Image, rng: random.Random) -> Image.Image:
    """Rotate by up to 2 degrees, shear, and tilt a little; the strength is lowered until all the ink stays inside."""
    box = ink.getbbox()
    if box is None:
        return ink
    angle = math.radians(rng.uniform(-2, 2)) if rng.random() < 0.8 else 0.0
    shear = rng.uniform(-0.06, 0.06) if rng.random() < 0.4 else 0.0
    tilt_x, tilt_y = (rng.uniform(-0.04, 0.04), rng.uniform(-0.04, 0.04)) if rng.random() < 0.3 else (0.0, 0.0)
    width, height = ink.size
    corners = np.array([[box[i], box[j], 1.0] for i in (0, 2) for j in (1, 3)]).T
    for strength in (1.0, 0.6, 0.3, 0.12):
        forward = _homography(width, height, angle * strength, shear * strength, tilt_x * strength, tilt_y * strength)
        x, y, z = forward @ corners
        x, y = x / z, y / z
        if x.min() >= 0 and y.min() >= 0 and x.max() <= width and y.max() <= height:
            inverse = np.linalg.inv(forward)
            inverse /= inverse[2, 2]
            if tilt_x or tilt_y:
                coefficients = tuple(inverse.ravel()[:8])
                return ink.transform(ink.size, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BILINEAR)
            coefficients = tuple(inverse.ravel()[:6])
            return ink.transform(ink.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    return ink


def _homography(width: int, height: int, angle: float, shear: float, tilt_x: float, tilt_y: float) -> np.ndarray:
    """Return the 3x3 map of page points (x, y, 1) about the page's centre."""
    centre = np.array([[1, 0, -width / 2], [0, 1, -height / 2], [0, 0, 1]])
    back = np.array([[1, 0, width / 2], [0, 1, height / 2], [0, 0, 1]])
    cos, sin = math.cos(angle), math.sin(angle)
    turn = np.array([[cos, -sin + shear, 0], [sin, cos, 0], [tilt_x / width, tilt_y / height, 1]])
    out: np.ndarray = back @ turn @ centre
    return out


def soften(ink: Image.Image, rng: random.Random, letter: float) -> Image.Image:
    """Blur, shrink and enlarge, thicken or sharpen, in proportion to letters `letter` pixels high."""
    kind = rng.random()
    if kind < 0.5:
        return ink.filter(ImageFilter.GaussianBlur(rng.uniform(0.015, 0.055) * letter))
    if kind < 0.75:
        # never below 11 pixels a letter: what is lost there cannot be read back
        factor = max(rng.uniform(0.5, 0.9), 11 / letter)
        if factor >= 0.95:
            return ink
        width, height = ink.size
        small = ink.resize(
            (max(1, round(width * factor)), max(1, round(height * factor))),
            rng.choice((Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.BOX)),
        )
        return small.resize(
            ink.size, rng.choice((Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.NEAREST))
        )
    if kind < 0.9:
        # spreading or starved ink: blur, then move the edge
        blurred = ink.filter(ImageFilter.GaussianBlur(0.6))
        edge = rng.uniform(0.42, 0.65) * _stroke_level(blurred)
        gain = rng.uniform(2, 5)
        return blurred.point(
            [max(0, min(255, round((value - edge) * gain + 128))) if value else 0 for value in range(256)]
        )
    return ink.filter(ImageFilter.UnsharpMask(radius=1.5, percent=rng.randint(50, 200), threshold=0))


def _stroke_level(ink: Image.Image) -> float:
    """Return how dark strokes are at their core: the ink level that a third of the inked pixels reach.

    Thin letters never reach full ink; a fixed level would tear them.
    """
    counts = ink.histogram()
    wanted = sum(counts[24:]) / 3
    level = 255
    while level > 24 and wanted > counts[level]:
        wanted -= counts[level]
        level -= 1
    return float(level)


def two_level(ink: Image.Image, rng: random.Random) -> Image.Image:
    """Make every pixel ink or paper, as a fax does, at a level that keeps thin strokes whole."""
    edge = rng.uniform(0.4, 0.65) * _stroke_level(ink)
    return ink.point([255 if value > edge else 0 for value in range(256)])


def colors(rng: random.Random, *, plain: bool) -> tuple[Color, Color]:
    """Choose (ink, paper): black on white if plain; else grey or coloured, either way round, told apart easily."""
    if plain:
        return ((255, 255, 255), (0, 0, 0)) if rng.random() < 0.08 else ((0, 0, 0), (255, 255, 255))
    tint = rng.random() < 0.45
    while True:
        dark = _color(rng, 0, 120, tint)
        light = _color(rng, 130, 255, tint)
        contrast = _luminance(light) - _luminance(dark)
        if contrast > 150 or (contrast > 90 and rng.random() < 0.35):
            return (dark, light) if rng.random() < 0.78 else (light, dark)


def _color(rng: random.Random, low: int, high: int, tint: bool) -> Color:
    grey = rng.randint(low, high)
    if not tint:
        return grey, grey, grey
    spread = 70
    r, g, b = (max(0, min(255, grey + rng.randint(-spread, spread))) for _ in range(3))
    return r, g, b


def _luminance(color: Color) -> float:
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]


def paint(ink: Image.Image, ink_color: Color, paper_color: Color) -> Image.Image:
    """Return the page as seen: `L` if both colours are grey, `RGB` otherwise."""
    tables = [
        [round(paper + (full - paper) * value / 255) for value in range(256)]
        for full, paper in zip(ink_color, paper_color, strict=True)
    ]
    if tables[0] == tables[1] == tables[2]:
        return ink.point(tables[0])
    return Image.merge("RGB", [ink.point(table) for table in tables])


def ghost(ink: Image.Image, rng: random.Random) -> Image.Image:
    """Let the back of the sheet show through, faint and mirrored."""
    back = ink.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    back = ImageChops.offset(back, rng.randint(-20, 20), rng.randint(-9, 9))
    strength = rng.uniform(0.05, 0.16)
    return ImageChops.lighter(ink, back.point([round(value * strength) for value in range(256)]))


def shaded(ink: Image.Image, rng: random.Random) -> Image.Image:
    """Tint a band or a column of the page, as tables and program listings have it."""
    width, height = ink.size
    band = Image.new("L", ink.size)
    a, b = sorted((rng.randint(0, height), rng.randint(0, height)))
    c, d = sorted((rng.randint(0, width), rng.randint(0, width))) if rng.random() < 0.3 else (0, width)
    band.paste(rng.randint(10, 50), (c, a, d, b))
    return ImageChops.lighter(ink, band)


def ruled(ink: Image.Image, rng: random.Random, pitch: int) -> Image.Image:
    """Draw faint lines, `pitch` pixels apart, as writing paper has them (or squares)."""
    lines = Image.new("L", ink.size)
    draw = ImageDraw.Draw(lines)
    level = rng.randint(20, 75)
    width, height = ink.size
    for y in range(rng.randrange(pitch), height, pitch):
        draw.line((0, y, width, y), fill=level)
    if rng.random() < 0.2:
        for x in range(rng.randrange(pitch), width, pitch):
            draw.line((x, 0, x, height), fill=level)
    return ImageChops.lighter(ink, lines)


def light(page: Image.Image, rng: random.Random) -> Image.Image:
    """Light the page unevenly: a shadow over a light page, a sheen over a dark one."""
    side = rng.randint(2, 5)
    depth = rng.randint(15, 80)
    cells = bytes(rng.randrange(depth) for _ in range(side * side))
    shade = Image.frombytes("L", (side, side), cells).resize(page.size, Image.Resampling.BICUBIC)
    if page.mode == "RGB":
        shade = Image.merge("RGB", (shade, shade, shade))
    if rng.random() < 0.8:
        return ImageChops.multiply(page, ImageChops.invert(shade))
    return ImageChops.screen(page, shade)


@lru_cache(maxsize=len(NOISE_LEVELS))
def _noise(deviation: int) -> Image.Image:
    """Gaussian noise about 128. The field is fixed; pages take random cuts of it."""
    values = np.random.default_rng(20240229).standard_normal((NOISE_SIDE, NOISE_SIDE), dtype=np.float32)
    return Image.fromarray(np.clip(values * deviation + 128.5, 0, 255).astype(np.uint8))


def _noise_cut(size: tuple[int, int], deviation: int, rng: random.Random) -> Image.Image:
    width, height = size
    field = _noise(deviation)
    if width > NOISE_SIDE or height > NOISE_SIDE:
        return field.resize(size)
    x, y = rng.randint(0, NOISE_SIDE - width), rng.randint(0, NOISE_SIDE - height)
    return field.crop((x, y, x + width, y + height))


def contrast(ink: Image.Image, ink_color: Color, paper_color: Color) -> float:
    """Return by how many grey levels the strokes stand out from the paper, less for thin ones."""
    return abs(_luminance(ink_color) - _luminance(paper_color)) * _stroke_level(ink) / 255


def grain(page: Image.Image, rng: random.Random, strokes: float = 255.0) -> Image.Image:
    """Add gaussian noise, fine or coarse, grey or coloured, to a page with that `contrast` of its strokes."""
    # beyond a seventh of the contrast the thin parts of letters drown, and nobody could say what stood there
    deviation = rng.choice([level for level in NOISE_LEVELS if level <= max(strokes / 7, NOISE_LEVELS[0])])
    size = page.size
    if rng.random() < 0.2 and min(size) >= 8:
        coarse = _noise_cut((size[0] // 2 + 1, size[1] // 2 + 1), deviation, rng)
        noise = coarse.resize(size, Image.Resampling.BILINEAR)
    else:
        noise = _noise_cut(size, deviation, rng)
    if page.mode == "RGB":
        bands = (
            (noise, _noise_cut(size, deviation, rng), _noise_cut(size, deviation, rng))
            if rng.random() < 0.5
            else (noise,) * 3
        )
        noise = Image.merge("RGB", bands)
    return ImageChops.add(page, noise, 1, -128)


def specks(page: Image.Image, rng: random.Random, letter: float) -> Image.Image:
    """Scatter single pixels and small dots, light and dark."""
    width, height = page.size
    page = page.copy()
    draw = ImageDraw.Draw(page)
    for _ in range(min(600, int(width * height * rng.uniform(0.0002, 0.004)))):
        level = rng.choice((0, 255, rng.randrange(256)))
        draw.point((rng.randrange(width), rng.randrange(height)), fill=level if page.mode == "L" else (level,) * 3)
    if letter > 18:
        for _ in range(rng.randrange(6)):
            x, y, level = rng.randrange(width), rng.randrange(height), rng.randrange(256)
            draw.rectangle((x, y, x + 1, y + rng.randint(0, 1)), fill=level if page.mode == "L" else (level,) * 3)
    return page


def compressed(page: Image.Image, rng: random.Random) -> Image.Image:
    """Save as JPEG and read again."""
    buffer = io.BytesIO()
    page.save(buffer, "JPEG", quality=rng.randint(28, 92), subsampling=rng.choice((0, 2)))
    out = Image.open(buffer)
    out.load()
    return out
