"""A function in a process of its own, beside this one: its memory goes when it ends, and another core does the work."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Generic, TypeVar

from trtvlm.model.errors import UserError

Result = TypeVar("Result")


class Aside(Generic[Result]):
    """`function(*arguments)`, all of which can be pickled, begun at once. Leaving the block ends it, finished or not."""

    def __init__(self, function: Callable[..., Result], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(sender, os.getpid(), function, arguments), daemon=True)
        with _uninterrupted():
            self._process.start()
        sender.close()

    def result(self) -> Result:
        """Wait for what the function returned. What it raised is raised here; UserError if its process was killed."""
        try:
            good, value = self._receiver.recv()
        except EOFError:
            self._process.join()
            raise UserError(
                f"A process of the build ended without a word (status {self._process.exitcode}): there may be too "
                "little memory; close other programs, or leave engines out with --no-compile."
            ) from None
        if not good:
            raise value
        # Let it end by itself: what it has registered with the system is given back then.
        self._process.join(10)
        found: Result = value
        return found

    def __enter__(self) -> Aside[Result]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.join()
        self._receiver.close()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """A process begun now does not see Ctrl+C, which goes to everyone at once: this one hears it, and ends that one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(sender: Connection, parent: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        sender.send((True, function(*arguments)))
    except UserError as error:
        sender.send((False, error))
    except BaseException as error:
        try:
            sender.send((False, error))
        except Exception:  # what cannot be pickled can still be said
            sender.send((False, RuntimeError(f"{type(error).__name__}: {error}")))
        sys.exit(1)


def _end_with(parent: int) -> None:
    """End this process soon after the one that began it, which may have been killed."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)
