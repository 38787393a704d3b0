"""Loading images: what the eye sees comes out as 8-bit RGB; what cannot be read is refused in one sentence."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from trtvlm.model.errors import UserError
from trtvlm.model.images import load_image

Transpose = Image.Transpose

pytestmark = [  # pytest undoes the filters that the module sets
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin"),
]


def picture() -> Image.Image:
    """13 x 7, no two pixels alike and no symmetry."""
    values = np.arange(7 * 13 * 3, dtype=np.int64).reshape(7, 13, 3) * 37 % 256
    return Image.fromarray(values.astype(np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def same(left: Image.Image, right: Image.Image) -> bool:
    return left.mode == right.mode and left.size == right.size and left.tobytes() == right.tobytes()


def refusal(source: object, **options: object) -> str:
    """The sentence `source` is refused with."""
    with pytest.raises(UserError) as caught:
        load_image(source, **options)  # type: ignore[arg-type]
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert " at 0x" not in sentence
    return sentence


def test_every_kind_of_source_gives_the_same_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture().save(path)
    data = path.read_bytes()
    for source in (path, str(path), data, bytearray(data), memoryview(data), picture()):
        assert same(load_image(source), picture())


# How a camera stores an upright picture under each EXIF orientation: the inverse of the turn the tag asks for.
@pytest.mark.parametrize(
    ("orientation", "stored"),
    [
        (1, None),
        (2, Transpose.FLIP_LEFT_RIGHT),
        (3, Transpose.ROTATE_180),
        (4, Transpose.FLIP_TOP_BOTTOM),
        (5, Transpose.TRANSPOSE),
        (6, Transpose.ROTATE_90),
        (7, Transpose.TRANSVERSE),
        (8, Transpose.ROTATE_270),
    ],
)
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_orientation_is_applied(orientation: int, stored: Transpose | None, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = picture() if stored is None else picture().transpose(stored)
    assert same(load_image(encoded(image, format, exif=exif)), picture())


def test_a_broken_exif_block_does_no_harm() -> None:
    assert same(load_image(encoded(picture(), exif=b"Exif\0\0MM\0*\0\0\xff\xff\xff\xff")), picture())


def test_an_opaque_alpha_channel_changes_nothing() -> None:
    image = picture()
    image.putalpha(255)
    assert same(load_image(encoded(image)), picture())


def test_dark_text_on_transparency_gets_a_white_page() -> None:
    image = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    image.putpixel((2, 0), (0, 0, 0, 128))
    white, black, half = np.asarray(load_image(encoded(image)))[0].tolist()
    assert (white, black) == ([255] * 3, [0] * 3)
    assert half == [127] * 3


def palette_image() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 200, 10, 20])
    image.putpixel((1, 0), 1)
    return image


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        (palette_image(), {}, [[0, 0, 0], [200, 10, 20]]),
        (palette_image(), {"transparency": 0}, [[255, 255, 255], [200, 10, 20]]),
        (palette_image().convert("RGB"), {"transparency": (0, 0, 0)}, [[255, 255, 255], [200, 10, 20]]),
        (Image.frombytes("L", (2, 1), b"\x00\x50"), {}, [[0] * 3, [80] * 3]),
        (Image.frombytes("L", (2, 1), b"\x00\x50"), {"transparency": 0}, [[255] * 3, [80] * 3]),
        (Image.frombytes("LA", (2, 1), b"\x00\x00\x50\xff"), {}, [[255] * 3, [80] * 3]),
        (Image.frombytes("1", (2, 1), b"\x40"), {}, [[0] * 3, [255] * 3]),
    ],
    ids=["palette", "palette-alpha", "rgb-key", "grey", "grey-key", "grey-alpha", "bilevel"],
)
def test_colour_modes(image: Image.Image, options: dict[str, object], expected: list[list[int]]) -> None:
    assert np.asarray(load_image(encoded(image, **options)))[0].tolist() == expected


@pytest.mark.parametrize("format", ["TIFF", "JPEG"])
def test_cmyk(format: str) -> None:
    colour = (200, 60, 30)
    got = np.asarray(load_image(encoded(Image.new("RGB", (8, 8), colour).convert("CMYK"), format))).astype(int)
    assert np.abs(got - np.array(colour)).max() <= 3  # JPEG rounds


GREY = np.arange(256, dtype=np.uint16).reshape(16, 16)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(format: str) -> None:
    data = encoded(Image.fromarray(GREY * 257), format)
    got = np.asarray(load_image(data))
    assert np.array_equal(got[..., 0], GREY)
    assert np.array_equal(got[..., 0], got[..., 2])


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_16_bit_byte_orders(mode: str) -> None:
    order = ">u2" if mode.endswith("B") else "<u2"
    image = Image.frombytes(mode, (16, 16), (GREY * 257).astype(order).tobytes())
    assert np.array_equal(np.asarray(load_image(image))[..., 1], GREY)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (GREY.astype(np.int32), GREY),
        (GREY.astype(np.int32) * 257, GREY),
        (GREY.astype(np.int32) * 1000, GREY),
        (GREY.astype(np.float32) / 255, GREY),
        (GREY.astype(np.float32), GREY),
        (np.array([[np.nan, -4.0, 255.0]], np.float32), [[0, 0, 255]]),
    ],
    ids=["int-8", "int-16", "int-more", "float-unit", "float-8", "float-odd"],
)
def test_deep_grey(values: np.ndarray, expected: np.ndarray) -> None:
    assert np.array_equal(np.asarray(load_image(Image.fromarray(values)))[..., 0], expected)


@pytest.mark.parametrize("format", ["GIF", "TIFF", "PNG", "WEBP"])
def test_the_first_frame_counts(format: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "lime")]
    data = encoded(
        frames[0], format, save_all=True, append_images=frames[1:], **{"WEBP": {"lossless": True}}.get(format, {})
    )
    assert load_image(data).getpixel((1, 1)) == (255, 0, 0)


def test_the_callers_image_is_left_as_it_was() -> None:
    image = picture().convert("RGBA")
    image.putalpha(7)
    before = image.copy()
    load_image(image)
    assert same(image, before)


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1)])
def test_extreme_shapes(size: tuple[int, int]) -> None:
    assert load_image(encoded(Image.new("L", size, 9))).size == size


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds hardly a byte of it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(9000, 9000), (12_000, 10_000), (100_000, 100_000)])
def test_a_decompression_bomb_is_refused_unopened(size: tuple[int, int]) -> None:
    assert "80,000,000" in refusal(png_header(*size))


def test_the_pixel_limit_is_the_callers() -> None:
    assert "13 x 7 = 91 pixels" in refusal(encoded(picture()), max_pixels=90)
    assert load_image(encoded(picture()), max_pixels=91).size == (13, 7)
    assert "at most 90" in refusal(picture(), max_pixels=90)


def test_refusals_of_paths(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe")
    assert "There is no image file" in refusal(tmp_path / "absent.png")
    assert "is a folder" in refusal(tmp_path)
    assert "empty" in refusal(tmp_path / "empty.png")
    assert "not a regular file" in refusal(str(tmp_path / "pipe"))
    assert "cannot be read" in refusal("a\0b.png")


def test_the_sentence_names_the_image(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    assert "notes.txt" in refusal(tmp_path / "notes.txt")
    assert refusal(b"hello", name="image 2 of 3").startswith("Image 2 of 3 is not an image")


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (b"", "empty"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "known format"),
        (Image.new("RGB", (0, 5)), "no pixels"),
        (42, "must be a path, bytes or a PIL image, not int"),
    ],
    ids=["empty", "svg", "eps", "no-pixels", "int"],
)
def test_refusals(source: object, sentence: str) -> None:
    assert sentence in refusal(source)


FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM"]
NOISE = Image.effect_noise((40, 30), 90).convert("RGB")
FILES = {format: encoded(NOISE, format) for format in FORMATS}


@pytest.mark.parametrize("format", FORMATS)
def test_a_truncated_file_is_called_damaged(format: str) -> None:
    data = FILES[format]
    assert "damaged or cut short" in refusal(data[: len(data) * 2 // 3])


def spoil(change: Callable[[bytes], bytes], format: str) -> None:
    # any exception but a UserError fails the test
    with contextlib.suppress(UserError):
        assert load_image(change(FILES[format]), max_pixels=100_000).mode == "RGB"


@settings(max_examples=60, deadline=None)
@given(format=st.sampled_from(FORMATS), keep=st.integers(0, 3000))
def test_any_prefix_loads_or_is_refused(format: str, keep: int) -> None:
    spoil(lambda data: data[:keep], format)


@settings(max_examples=100, deadline=None)
@given(format=st.sampled_from(FORMATS), position=st.floats(0, 1), byte=st.integers(0, 255))
def test_any_flipped_byte_loads_or_is_refused(format: str, position: float, byte: int) -> None:
    # the squared position favours the header, where a byte does most harm
    def flip(data: bytes) -> bytes:
        at = min(int(position**2 * len(data)), len(data) - 1)
        return data[:at] + bytes([byte]) + data[at + 1 :]

    spoil(flip, format)


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    refusal(data)
