"""Ctrl+C and SIGTERM that are not lost in the middle of a native library."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """Remember a request to stop; the function it yields raises it again.

    Both signals end a command by an exception. One that comes up while a native library calls back into Python is
    printed or dropped there, and the work goes on: measured, most of those that reach a build while it exports and
    compiles. So long work calls the function between its steps. In other threads than the main one, which get no
    signals, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    asked: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def pass_on(number: int, frame: FrameType | None) -> None:
        handler = before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)

    def remember(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        pass_on(number, frame)

    def check() -> None:
        if asked:
            pass_on(asked[0], None)

    # A signal that is ignored, or ends the process at once, stays so.
    ours = [number for number, handler in before.items() if callable(handler)]
    for number in ours:
        signal.signal(number, remember)
    try:
        yield check
    finally:
        for number in ours:
            signal.signal(number, before[number])
