"""POST /v1/chat/completions, from the first byte of the body to the last of the answer."""

from __future__ import annotations

import asyncio
import contextlib
import time
from functools import partial
from typing import TYPE_CHECKING

from starlette.datastructures import Headers

from trtvlm.model.errors import UserError
from trtvlm.runtime.result import Result
from trtvlm.runtime.server.body import read_body
from trtvlm.runtime.server.errors import ApiError, Gone, ShuttingDown, TimedOut
from trtvlm.runtime.server.parse import parse
from trtvlm.runtime.server.queue import QueueFull
from trtvlm.runtime.server.responses import DONE, Completion, Json, event
from trtvlm.runtime.server.service import queue_full

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.types import Receive, Scope, Send

    from trtvlm.runtime.request import Request
    from trtvlm.runtime.server.queue import Event, Job
    from trtvlm.runtime.server.schemas import ChatRequest
    from trtvlm.runtime.server.service import Service


class ChatCompletions:
    """The endpoint, as an ASGI application: it must see the client go away while it waits, which needs `receive`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. ApiError before the response has begun; after that, errors are events in its stream."""
        with contextlib.suppress(Gone), self._service.admitted():
            chat, request = await self._read(Headers(scope=scope), receive)
            async with self._place(request, receive) as (job, events):
                await self._answer(chat, job, events, scope, receive, send)

    async def _read(self, headers: Headers, receive: Receive) -> tuple[ChatRequest, Request]:
        service, limits = self._service, self._service.limits
        try:
            _require_json(headers)
            service.require_place()
        except ApiError:
            with contextlib.suppress(ApiError):
                await read_body(receive, 0, limits.upload)  # a client that still writes would not see the refusal
            raise
        with service.uploading():
            body = await read_body(receive, limits.body_bytes, limits.upload)
            return await asyncio.to_thread(parse, body, service.model, limits)

    @contextlib.asynccontextmanager
    async def _place(self, request: Request, receive: Receive) -> AsyncIterator[tuple[Job, asyncio.Queue[Event]]]:
        """A place in the queue, given up on the way out: by then the answer is out, or nobody waits for it."""
        queue = self._service.queue
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()
        try:
            job = queue.submit(request, partial(_hand_over, loop, events))
        except QueueFull as full:
            raise queue_full(full.retry_after) from None
        timer = loop.call_later(self._service.limits.request, queue.cancel, job, TimedOut())
        watcher = loop.create_task(self._watch(receive, job))
        try:
            yield job, events
        finally:
            timer.cancel()
            watcher.cancel()
            queue.cancel(job, Gone())

    async def _watch(self, receive: Receive, job: Job) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._service.queue.cancel(job, Gone())

    async def _answer(
        self, chat: ChatRequest, job: Job, events: asyncio.Queue[Event], scope: Scope, receive: Receive, send: Send
    ) -> None:
        # The status line waits for the first event, so that a prompt the model refuses still gets its 400.
        first = await events.get()
        if isinstance(first, BaseException):
            raise self._error(first, job)
        self._service.metrics.started(job, time.perf_counter())
        completion = Completion(self._service.model, chat.include_usage)
        if chat.stream:
            await self._stream(completion, job, first, events, send)
            return
        last: Event = first
        while isinstance(last, str):
            last = await events.get()
        if isinstance(last, BaseException):
            raise self._error(last, job)
        self._service.metrics.answered(job, last, time.perf_counter())
        await Json(completion.whole(last))(scope, receive, send)

    async def _stream(
        self, completion: Completion, job: Job, first: Event, events: asyncio.Queue[Event], send: Send
    ) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def write(data: bytes, more: bool = True) -> None:
            message = {"type": "http.response.body", "body": data, "more_body": more}
            try:
                await asyncio.wait_for(send(message), self._service.limits.send)
            except asyncio.TimeoutError:  # the client holds the connection but takes nothing
                raise Gone from None

        await write(completion.first())
        item: Event = first
        while isinstance(item, str):
            if item:
                await write(completion.piece(item))
            item = await events.get()
        if isinstance(item, Result):
            self._service.metrics.answered(job, item, time.perf_counter())
            await write(completion.last(item), more=False)
        else:
            await write(event(self._error(item, job).body) + DONE, more=False)

    def _error(self, error: BaseException, job: Job) -> ApiError:
        """What the client gets to read. Gone is raised: there is no client."""
        if isinstance(error, UserError):
            return ApiError(400, str(error), param="messages", code="invalid_prompt")
        if isinstance(error, Gone | TimedOut | ShuttingDown):
            self._service.metrics.cancelled.inc()
        if isinstance(error, Gone):
            raise error
        if isinstance(error, TimedOut):
            began = "was not finished" if job.started is not None else "did not come up"
            message = f"The request {began} within {self._service.limits.request:g} seconds."
            return ApiError(504, message, code="timeout", retry_after=self._service.queue.retry_after())
        if isinstance(error, ShuttingDown):
            return ApiError(503, "The server shut down before the answer was finished.", code="draining")
        return ApiError(500, "The answer could not be generated; the server's log says why.", code="generation_failed")


def _require_json(headers: Headers) -> None:
    """Keeps out what a web page may send to a local server without asking: forms and plain text."""
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "The Content-Type header must be application/json.", code="unsupported_media_type")


def _hand_over(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], item: Event) -> None:
    """From the answering thread to the event loop."""
    with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
        loop.call_soon_threadsafe(events.put_nowait, item)
