"""Reading a request's body: bounded in size and time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from trtvlm.runtime.server.errors import ApiError, Gone

if TYPE_CHECKING:
    from starlette.types import Receive


async def read_body(receive: Receive, most: int, seconds: float) -> bytes:
    """The body, at most `most` bytes, within so many seconds.

    What is too large is read to its end and thrown away: a client that still writes would not see the refusal but a
    broken connection. ApiError 413: too large. 408: too slow. Gone: the client went away.
    """
    body = bytearray()
    try:
        fits = await asyncio.wait_for(_read(receive, body, most), seconds)
    except asyncio.TimeoutError:
        raise ApiError(408, f"The body did not arrive within {seconds:g} seconds.", code="upload_timeout") from None
    if not fits:
        message = f"The body is larger than {most / 2**20:g} MiB: send fewer or smaller images."
        raise ApiError(413, message, code="request_too_large")
    return bytes(body)


async def _read(receive: Receive, body: bytearray, most: int) -> bool:
    """Into `body`, to the end of the message; False and nothing when that is more than `most`."""
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        chunk, more = message.get("body", b""), message.get("more_body", False)
        size += len(chunk)
        if size <= most:
            body += chunk
        else:
            body.clear()
    return size <= most
