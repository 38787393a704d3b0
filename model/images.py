"""Any image a user has -> upright 8-bit RGB, or one sentence saying why not."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from trtvlm.model.errors import UserError

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image"

# An A3 scan at 600 dpi (70 million pixels) fits; decoded and composited it needs under 1 GB.
MAX_PIXELS = 80_000_000

# Our own limit and refusals speak in the place of these; a broken EXIF block is nothing to report.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

# Raster formats only: Pillow would hand EPS to Ghostscript and WMF to the system, which no stranger's image may do.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO")

# How files of these formats begin: tells a damaged image from something that never was one.
_SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"II*\x00", b"MM\x00*", b"\x00\x00\x00\x0cjP")


def load_image(source: ImageSource, max_pixels: int = MAX_PIXELS, name: str | None = None) -> Image.Image:
    """Read an image as the eye sees it.

    source: a path, the bytes of a file, or a PIL image (left unchanged). Of several frames or pages the first counts.
    max_pixels: more than width * height = this many are refused before decoding.
    name: what error sentences call the image, where the source itself is nameless.

    Returns a PIL image, mode RGB, 8 bit:
    - turned upright by its EXIF orientation;
    - transparent parts laid on white, so that dark text on a transparent page stays readable;
    - 16-bit, 32-bit and float grey scaled to 8 bits, not clipped.
    In the first two points this differs on purpose from the official processor, which ignores the orientation and drops
    alpha: pass `Image.open(path).convert("RGB")` to get its pixels. Upright opaque images come out the same.

    UserError: no such file, a folder, not readable, empty, an unknown format, damaged or cut short, too many pixels.
    """
    name = name or _name(source)
    if not isinstance(source, Image.Image):
        with _open(_read(source, name), name, max_pixels) as image:
            return _decode(image, name, max_pixels)
    return _decode(source, name, max_pixels)


def _name(source: object) -> str:
    if isinstance(source, str | os.PathLike):
        return f"{str(source)!r}"
    return "the image"


def _read(source: object, name: str) -> bytes:
    """The bytes of a file."""
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
    elif isinstance(source, str | os.PathLike):
        data = _read_path(source, name)
    else:
        raise UserError(f"An image must be a path, bytes or a PIL image, not {type(source).__name__}.")
    if not data:
        raise UserError(f"{_start(name)} is empty (0 bytes): give an image file.")
    return data


def _read_path(source: str | os.PathLike[str], name: str) -> bytes:
    try:
        path = Path(source)
        if path.is_dir():
            raise UserError(f"{_start(name)} is a folder, not an image: name a file in it.")
        if path.exists() and not path.is_file():  # a device or a pipe may never end
            raise UserError(f"{_start(name)} is not a regular file: give an image file.")
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"There is no image file {name}: check the path.") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{_start(name)} cannot be read ({reason}): check the path and its permissions.") from None


def _open(data: bytes, name: str, max_pixels: int) -> Image.Image:
    Image.init()
    try:
        return Image.open(io.BytesIO(data), formats=[f for f in FORMATS if f in Image.OPEN])
    except Image.DecompressionBombError:
        raise UserError(_too_large(name, None, max_pixels)) from None
    # Pillow's parsers raise nearly anything on hostile bytes (struct.error, IndexError, OverflowError, ...).
    except Exception as error:
        if data.startswith(_SIGNATURES) or data[8:12] in (b"WEBP", b"avif"):
            raise _damaged(name, error) from None
        raise UserError(
            f"{_start(name)} is not an image of a known format: convert it to PNG, JPEG, WebP, TIFF, GIF or BMP."
        ) from None


def _decode(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width < 1 or height < 1:
        raise UserError(f"{_start(name)} has no pixels ({width} x {height}): give an image of at least 1 x 1.")
    if width * height > max_pixels:
        raise UserError(_too_large(name, (width, height), max_pixels))
    try:
        image.load()
        return _rgb(_upright(image))
    except Exception as error:  # as in _open
        raise _damaged(name, error) from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block says nothing against the pixels
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = _deep_grey_to_8_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")


def _deep_grey_to_8_bits(image: Image.Image) -> Image.Image:
    """I;16*, I and F -> L. Pillow's own convert clips at 255, which turns a 16-bit scan white.

    I;16 is a full 16-bit scale. I and F carry none: the smallest usual one that holds the largest value is taken
    (F 0..1; 0..255; 0..65535), else the largest value itself is white.
    """
    values = np.nan_to_num(np.asarray(image).astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    top = float(values.max())
    if image.mode.startswith("I;16"):
        scale = 65535.0
    elif image.mode == "F" and top <= 1.0:
        scale = 1.0
    else:
        scale = 255.0 if top <= 255.0 else max(top, 65535.0)
    grey = np.rint(np.clip(values / scale, 0.0, 1.0) * 255.0).astype(np.uint8)
    return Image.fromarray(grey)


def _too_large(name: str, size: tuple[int, int] | None, max_pixels: int) -> str:
    what = f"{size[0]} x {size[1]} = {size[0] * size[1]:,} pixels" if size else "too many pixels"
    return f"{_start(name)} has {what}; at most {max_pixels:,} are accepted: scale it down."


def _damaged(name: str, error: Exception) -> UserError:
    header = isinstance(error, UnidentifiedImageError)  # its own text names a buffer's address
    reason = "its header cannot be read" if header else " ".join(str(error).split()) or type(error).__name__
    return UserError(f"{_start(name)} is damaged or cut short ({reason}): save or download it again.")


def _start(name: str) -> str:
    return name[0].upper() + name[1:]
