"""The HTTP server over a callable that needs no model: for a thread of the tests, or as a program of its own.

What the last user message says is what the stub does; see `StubModel`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import threading
import time
from typing import TYPE_CHECKING

from trtvlm.model.errors import UserError
from trtvlm.runtime.result import Result
from trtvlm.runtime.server.process import Server, bind, serve
from trtvlm.runtime.server.service import Service, State
from trtvlm.runtime.stop import TextStream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from trtvlm.runtime.request import Request
    from trtvlm.runtime.server.limits import Limits

PATIENCE = 20.0  # s until a test that waits for something gives up


class StubModel:
    """Answers word by word, a token a word; a prompt has as many tokens as words, and 10 more for each image.

    "say ..."    the rest is the answer
    "bytes ..."  the rest is the answer, a token a byte: no character of several bytes is whole at once
    "hold ..."   likewise, but the first word waits for `release(...)` or the cancellation
    "begin ..."  one word, then like hold
    "deaf ..."   like hold, but takes no notice of a cancellation
    "refuse ..." UserError with the rest
    "fail", "fail late", "exit", "silent": RuntimeError; that after a word; SystemExit; an end without a Result
    Anything else is answered with "ok".
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []  # as they were begun
        self.ended: list[str] = []  # the prompts that are over, whichever way
        self._gates: dict[str, threading.Event] = {}
        self._lock = threading.Lock()

    def release(self, name: str) -> None:
        """Let "hold name" go on."""
        self._gate(name).set()

    def _gate(self, name: str) -> threading.Event:
        with self._lock:
            return self._gates.setdefault(name, threading.Event())

    def __call__(self, request: Request, cancelled: threading.Event, /) -> Iterator[str | Result]:
        self.requests.append(request)
        users = [str(m["content"]) for m in request.conversation if m["role"] == "user"]
        prompt = users[-1] if users else ""
        try:
            yield from self._answer(request, prompt, cancelled)
        finally:
            self.ended.append(prompt)

    def _answer(self, request: Request, prompt: str, cancelled: threading.Event) -> Iterator[str | Result]:
        verb, _, rest = prompt.partition(" ")
        if verb == "refuse":
            raise UserError(rest)
        if verb == "exit":
            raise SystemExit(3)
        if verb == "silent":
            return
        if verb == "fail":
            if rest == "late":
                yield "one "
            raise RuntimeError("a secret of the server")
        if verb == "begin":
            yield "begun "
        if verb in ("hold", "begin", "deaf"):
            self._wait(self._gate(rest), cancelled if verb != "deaf" else threading.Event())
        known = verb in ("say", "bytes", "hold", "begin", "deaf")
        yield from _speak(request, rest if known else "ok", by_byte=verb == "bytes")

    def _wait(self, gate: threading.Event, cancelled: threading.Event) -> None:
        for _ in range(int(PATIENCE / 0.002)):
            if gate.wait(0.002):
                return
            if cancelled.is_set():
                raise InterruptedError
        raise AssertionError("nobody came")


def _speak(request: Request, answer: str, by_byte: bool) -> Iterator[str | Result]:
    tokens = [bytes([b]) for b in answer.encode()] if by_byte else [w.encode() for w in _words(answer)]

    def decode(ids: Sequence[int]) -> str:
        return b"".join(tokens[i] for i in ids).decode("utf-8", errors="replace")

    stream = TextStream(decode, request.stop)
    text, used = "", 0
    for used in range(1, min(len(tokens), request.max_new_tokens) + 1):
        text += (piece := stream.push(used - 1))
        yield piece
        if stream.stopped:
            break
    text += (piece := stream.finish())
    yield piece
    images = sum(len(m.get("images", ())) for m in request.conversation)
    words = sum(len(str(m["content"]).split()) for m in request.conversation)
    yield Result(
        text=text,
        token_ids=tuple(range(used)),
        finish_reason="length" if used == request.max_new_tokens < len(tokens) else "stop",
        prompt_tokens=words + 10 * images,
        image_tokens=10 * images,
        reused_tokens=1,
        drafted=4 * used,
        accepted=3 * used,
        steps=used,
        timings={},
    )


def _words(text: str) -> list[str]:
    parts = text.split(" ")
    return [part + " " for part in parts[:-1]] + parts[-1:]


@contextlib.contextmanager
def running(
    model: Callable[..., Iterator[str | Result]], limits: Limits | None = None, capacity: int = 16, load: bool = True
) -> Iterator[tuple[str, Service]]:
    """A server in a thread on a free port of the loopback: its URL, and its service."""
    service = Service("stub", limits, capacity)
    server = Server(service, drain_timeout=PATIENCE)
    sock = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        if load:
            service.load(lambda: model)
            until(lambda: service.state is State.READY)
        yield url, service
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        service.queue.stop(0.1)


def until(condition: Callable[[], object]) -> None:
    """Wait for something to become true. AssertionError: it does not."""
    for _ in range(int(PATIENCE / 0.002)):
        if condition():
            return
        time.sleep(0.002)
    raise AssertionError("it did not happen")


def main() -> None:
    """Serve a stub until a signal; a line of its standard input releases the gate of that name."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--drain-timeout", type=float, default=PATIENCE)
    parser.add_argument("--load", choices=["at-once", "never", "fails", "breaks"], default="at-once")
    arguments = parser.parse_args()
    model = StubModel()

    def opener() -> StubModel:
        if arguments.load == "fails":
            raise UserError("There is no such model.")
        if arguments.load == "breaks":
            raise RuntimeError("broken")
        if arguments.load == "never":
            time.sleep(PATIENCE)
        return model

    def listen() -> None:
        while names := os.read(0, 4096):  # not input(): its lock, held by a thread, aborts the interpreter's end
            for name in names.decode().split():
                model.release(name)

    threading.Thread(target=listen, daemon=True).start()
    serve(Service("stub"), opener, "127.0.0.1", 0, arguments.drain_timeout, lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
