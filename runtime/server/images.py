"""Images that arrive inside a request, as data: URIs. Nothing is fetched from anywhere."""

from __future__ import annotations

import base64
import binascii
import io

from PIL import Image

from trtvlm.model.images import FORMATS
from trtvlm.runtime.server.errors import ApiError


def read_data_uri(url: str, param: str, max_pixels: int) -> bytes:
    """The bytes of an image file from "data:image/png;base64,...".

    Only the file's header is looked at: enough to refuse what is no image, or too large to decode. ApiError 400: either
    of these, another kind of URL, or broken base64.
    """
    scheme = url[:16].partition(":")[0].lower() if ":" in url[:16] else ""
    if scheme != "data":
        raise ApiError(
            400,
            f"{param} must be a data: URI with the image in it (data:image/png;base64,...); this server fetches "
            "nothing from the network or the disk.",
            param=param,
            code="unsupported_image_url",
        )
    head, comma, data = url[5:].partition(",")
    media_type, *options = [part.strip().lower() for part in head[:200].split(";")]
    if not comma or "base64" not in options:
        raise _invalid(param, "must be base64 in the form data:image/png;base64,...")
    if media_type and not media_type.startswith("image/"):
        raise _invalid(param, "must have an image/... media type")
    try:
        content = base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError):
        raise _invalid(param, "does not hold valid base64") from None
    _check_header(content, param, max_pixels)
    return content


def _check_header(content: bytes, param: str, max_pixels: int) -> None:
    Image.init()
    try:
        with Image.open(io.BytesIO(content), formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        raise _too_large(param, "too many", max_pixels) from None
    except Exception:  # Pillow's parsers raise nearly anything on hostile bytes
        raise _invalid(param, "is not an image of a known format, or it is damaged: send PNG, JPEG or WebP") from None
    if width * height > max_pixels:
        raise _too_large(param, f"{width} x {height}", max_pixels)


def _invalid(param: str, problem: str) -> ApiError:
    return ApiError(400, f"{param} {problem}.", param=param, code="invalid_image")


def _too_large(param: str, size: str, max_pixels: int) -> ApiError:
    message = f"{param} has {size} pixels; at most {max_pixels:,} are accepted: scale it down."
    return ApiError(400, message, param=param, code="image_too_large")
