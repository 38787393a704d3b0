"""The server's state: loading, then ready, then draining; and what is in flight."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from enum import Enum
from typing import TYPE_CHECKING

from trtvlm.runtime.server.errors import ApiError, ShuttingDown
from trtvlm.runtime.server.limits import Limits
from trtvlm.runtime.server.metrics import Metrics
from trtvlm.runtime.server.queue import RequestQueue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from trtvlm.runtime.server.queue import Generate

logger = logging.getLogger(__name__)

RETRY_AFTER = 5  # s; a model loads in seconds, and another server takes over a drained one's place as fast


class State(Enum):
    """Where a server is in its life; there is no way back."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


class Service:
    """Everything that requests share. Made, then told to `load`, and at the end to `drain`.

    model: the name that requests must give. capacity: of the queue, beside the request being answered.
    """

    def __init__(self, model: str, limits: Limits | None = None, capacity: int = 16) -> None:
        self.model = model
        self.created = int(time.time())
        self.limits = limits or Limits()
        self.queue = RequestQueue(capacity)
        self.metrics = Metrics(self.queue, lambda: self.state is State.READY)
        self.state = State.LOADING
        self.failure: BaseException | None = None  # why the model could not be loaded
        self.in_flight = 0  # generation requests between their arrival and the end of their response
        self.uploads = 0  # of which have not yet arrived whole
        self._loader: threading.Thread | None = None

    def load(self, opener: Callable[[], Generate]) -> None:
        """Begin to make the callable, in a thread of its own; ready once that is done."""

        def work() -> None:
            try:
                generate = opener()
            except BaseException as error:
                self.failure = error
                return
            self.queue.start(generate)
            if self.state is State.LOADING:
                self.state = State.READY

        self._loader = threading.Thread(target=work, name="loader", daemon=True)
        self._loader.start()

    def drain(self) -> None:
        """Take no new generation requests. Safe in a signal handler."""
        self.state = State.DRAINING

    def abandon(self) -> None:
        """Give up what is in flight."""
        self.queue.cancel_all(ShuttingDown())

    def busy(self) -> bool:
        """Whether one of its threads is still at work, deep in code that cannot be interrupted perhaps."""
        return self.queue.alive or (self._loader is not None and self._loader.is_alive())

    def require_ready(self) -> None:
        """ApiError 503: loading or draining."""
        if self.state is State.LOADING:
            message = "The model is still being loaded; try again shortly."
            raise ApiError(503, message, code="loading", retry_after=RETRY_AFTER)
        if self.state is State.DRAINING:
            message = "The server is shutting down and takes no new requests."
            raise ApiError(503, message, code="draining", retry_after=RETRY_AFTER)

    def require_place(self) -> None:
        """ApiError 429: the queue is full, or too many bodies are arriving."""
        if self.queue.full() or self.uploads >= self.limits.uploads:
            raise queue_full(self.queue.retry_after())

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a generation request as in flight. ApiError 503: loading or draining."""
        self.require_ready()
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    @contextlib.contextmanager
    def uploading(self) -> Iterator[None]:
        """Count a body as arriving."""
        self.uploads += 1
        try:
            yield
        finally:
            self.uploads -= 1


def queue_full(retry_after: int) -> ApiError:
    """429, for whoever finds no place."""
    message = f"The queue is full; try again in {retry_after} s."
    return ApiError(429, message, code="queue_full", retry_after=retry_after)
