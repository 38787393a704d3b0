"""What one request may ask of the server. Imports nothing heavy: the command line reads its defaults from here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Anything beyond is refused with a 4xx before it costs more than reading it.

    body_bytes: of the HTTP body. pixels: of one image. images, messages: in one request. tokens: of one answer; an
    answer is as long as this where the request names no length. characters: of all text in one request; the exact
    number of tokens is for the model to judge. uploads: bodies being read at the same time. Times in seconds: `upload`
    to read a body; `request` from there to the end of the answer, waiting included; `send` to have a piece taken.
    """

    body_bytes: int = 32 * 2**20
    pixels: int = 80_000_000  # trtvlm.model.images.MAX_PIXELS, which a test compares
    images: int = 16
    messages: int = 256
    tokens: int = 4096
    characters: int = 100_000
    uploads: int = 32
    upload: float = 60.0
    request: float = 600.0
    send: float = 60.0
