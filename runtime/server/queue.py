"""A bounded queue that one thread answers strictly in order. Knows nothing of HTTP."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Protocol, TypeAlias

from trtvlm.model.errors import UserError
from trtvlm.runtime.result import Result

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from trtvlm.runtime.request import Request

logger = logging.getLogger(__name__)

LONGEST_RETRY = 60  # s; a guess at a longer wait is worth little
FIRST_GUESS = 1.0  # s an answer takes, until one was measured


class Generate(Protocol):
    """What answers a request: pieces of text, then exactly one Result.

    Runs in one thread, one request after the other. Soon after `cancelled` is set it ends, by returning or by raising
    whatever it likes; the iterator may also be closed at any piece. UserError: the request is at fault, and the client
    gets the sentence. Any other exception fails this request only.
    """

    def __call__(self, request: Request, cancelled: threading.Event, /) -> Iterator[str | Result]:
        """Begin to answer."""
        ...


Event: TypeAlias = "str | Result | BaseException"


class QueueFull(Exception):  # noqa: N818 - names what happened
    """Every place is taken. `retry_after`: whole seconds after which one is likely to be free."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("the queue is full")
        self.retry_after = retry_after


class Job:
    """One request in the queue. `emit` gets its events from any thread: text, and last a Result or an exception."""

    def __init__(self, request: Request, emit: Callable[[Event], None]) -> None:
        self.request = request
        self.cancelled = threading.Event()
        self.submitted = time.perf_counter()
        self.started: float | None = None
        self._emit = emit
        self._over = False
        self._lock = threading.Lock()

    def put(self, event: Event) -> None:
        """Pass an event on, unless the last one has been."""
        with self._lock:
            if self._over:
                return
            self._over = not isinstance(event, str)
            self._emit(event)

    def cancel(self, reason: BaseException) -> None:
        """End it now for whoever waits for it; the thread that answers it follows as soon as it can."""
        self.put(reason)  # first: what the callable does next is of no interest any more
        self.cancelled.set()


class RequestQueue:
    """`capacity` places to wait in, beside the one request that is being answered."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._changed = threading.Condition()
        self._seconds = FIRST_GUESS  # a running mean of what an answer takes
        self._thread: threading.Thread | None = None
        self._stopping = False

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests being answered: 0 or 1. A cancelled one counts until its thread has let go of it."""
        return int(self._running is not None)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, generate: Generate) -> None:
        """Begin to answer, in a thread of its own."""
        if self._thread is not None:
            raise RuntimeError("the queue has been started before")
        self._thread = threading.Thread(target=self._work, args=(generate,), name="answers", daemon=True)
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Let the thread end once nothing waits any more, and wait so many seconds for it."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout)

    def full(self) -> bool:
        """Whether `submit` would refuse now."""
        return len(self._waiting) + self.running > self.capacity

    def submit(self, request: Request, emit: Callable[[Event], None]) -> Job:
        """Take the last place. QueueFull: there is none."""
        job = Job(request, emit)
        with self._changed:
            if self.full():
                raise QueueFull(self.retry_after())
            self._waiting.append(job)
            self._changed.notify()
        return job

    def retry_after(self) -> int:
        """Whole seconds until a place is likely to be free: what one answer takes."""
        return min(LONGEST_RETRY, max(1, math.ceil(self._seconds)))

    def cancel(self, job: Job, reason: BaseException) -> None:
        """Give up a request: a waiting one leaves its place at once, a running one as soon as the callable notices."""
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
        job.cancel(reason)

    def cancel_all(self, reason: BaseException) -> None:
        """Give up all requests."""
        with self._changed:
            jobs = [*self._waiting] + ([self._running] if self._running else [])
            self._waiting.clear()
        for job in jobs:
            job.cancel(reason)

    def _work(self, generate: Generate) -> None:
        while self._answer_next(generate):  # a call each, so that nothing of the last request stays in memory
            pass

    def _answer_next(self, generate: Generate) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopping)
            if not self._waiting:
                return False
            job = self._running = self._waiting.popleft()
        job.started = time.perf_counter()
        last: Event
        try:
            last = _answer(job, generate)
        except BaseException as error:  # even SystemExit: a server whose only thread has died answers nobody
            last = error
            if not job.cancelled.is_set() and not isinstance(error, UserError):
                logger.error("A request failed", exc_info=error)
        with self._changed:
            self._running = None
            if isinstance(last, Result):
                self._seconds += 0.3 * (time.perf_counter() - job.started - self._seconds)
        job.put(last)  # only now: who has an answer finds the place free for the next question
        return True


def _answer(job: Job, generate: Generate) -> Event:
    """Pass the pieces on; the last event is returned."""
    events = generate(job.request, job.cancelled)
    try:
        for event in events:
            if job.cancelled.is_set() or isinstance(event, Result):
                return event
            job.put(event)
    finally:
        if close := getattr(events, "close", None):  # a generator may hold a lock
            close()
    raise RuntimeError("the callable ended without a Result")
