"""A server from its first signal to its last: uvicorn, told to drain before it closes."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING

import uvicorn

from trtvlm.model.errors import UserError
from trtvlm.runtime.server.app import create_app

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from trtvlm.runtime.server.queue import Generate
    from trtvlm.runtime.server.service import Service

LAST_WORDS = 2.0  # s to write the last bytes once there is nothing left to generate


class Server(uvicorn.Server):
    """On SIGTERM or SIGINT: finish what is in flight, refuse what is new with 503, then end. On a second one: end."""

    def __init__(self, service: Service, drain_timeout: float) -> None:
        config = uvicorn.Config(
            create_app(service),
            http="h11",  # the parser that is always installed
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_level="info",
            server_header=False,
            timeout_graceful_shutdown=max(1, int(LAST_WORDS)),
        )
        super().__init__(config)
        self._service = service
        self._drain_timeout = drain_timeout
        self._drain_deadline: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal. uvicorn's own way: close the port at once, and in the end die of the signal, not exit with 0."""
        if self._drain_deadline is not None:
            self.should_exit = True
            self.force_exit = sig == signal.SIGINT
        self._drain_deadline = min(self._drain_deadline or float("inf"), time.monotonic() + self._drain_timeout)
        self._service.drain()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end."""
        if self._service.failure is not None:
            self.should_exit = True
        if self._drain_deadline is not None:
            self._service.drain()  # again: the model may have become ready while the signal came
            if not self._service.in_flight or time.monotonic() > self._drain_deadline:
                self.should_exit = True
        if self.should_exit:
            self._service.drain()
            self._service.abandon()
        return await super().on_tick(counter)


def serve(
    service: Service,
    opener: Callable[[], Generate],
    host: str = "127.0.0.1",
    port: int = 8000,
    drain_timeout: float = 30.0,
    announce: Callable[[str], None] = print,
) -> None:
    """Open the port, load the model behind it, and serve until a signal; returns when drained.

    opener: makes the callable; runs in a thread while /health already answers. announce: gets a sentence with the
    address. Raises what `opener` raises; UserError: the port cannot be had.
    """
    sock = bind(host, port)
    server = Server(service, drain_timeout)
    address = f"[{host}]" if ":" in host else host
    announce(f"{service.model} at http://{address}:{sock.getsockname()[1]}/v1")
    service.load(opener)
    server.run(sockets=[sock])
    if service.failure is not None:
        raise service.failure
    service.queue.stop(timeout=0.5)
    if service.busy():
        # A thread deep in native code cannot be stopped, and pulling the interpreter from under it may crash.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. UserError: no such address, or the port is taken."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        sock = socket.create_server((host, port), family=family)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"Cannot listen on {host} port {port} ({reason}): choose another --host or --port.") from None
    # Connections inherit it. asyncio sets it only on sockets made with an explicit protocol, which this one is not; and
    # without it every small answer waits 40 ms for the client's delayed acknowledgement.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock
