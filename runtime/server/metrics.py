"""What /metrics shows, in a registry of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from trtvlm.runtime.result import Result
    from trtvlm.runtime.server.queue import Job, RequestQueue

# s; a cached short answer on a GPU takes 10 ms, a full context on a CPU minutes
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0)

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

# nginx's number for a client that went away before its answer
CLIENT_GONE = 499


class Metrics:
    """Counters of one server. `queue`: whose length is shown. `ready`: whether generation requests are taken."""

    def __init__(self, queue: RequestQueue, ready: Callable[[], bool]) -> None:
        registry = self._registry = CollectorRegistry()

        def counter(name: str, text: str) -> Counter:
            return Counter(f"trtvlm_{name}", text, registry=registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"trtvlm_{name}", text, buckets=BUCKETS, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"trtvlm_{name}", text, registry=registry)

        self.requests = Counter("trtvlm_requests", "HTTP responses", ["path", "status"], registry=registry)
        self.prompt_tokens = counter("prompt_tokens", "Tokens of answered prompts, those of images included")
        self.image_tokens = counter("image_tokens", "Tokens of images in answered prompts")
        self.generated_tokens = counter("generated_tokens", "Tokens of whole answers")
        self.drafted_tokens = counter("drafted_tokens", "Tokens that the draft proposed")
        self.accepted_tokens = counter("accepted_tokens", "Drafted tokens that the target accepted")
        self.steps = counter("target_steps", "Passes of the target after the prefill")
        self.cancelled = counter("cancelled", "Requests given up after they had a place: client gone, or out of time")
        self.queue_seconds = histogram("queue_seconds", "From a place in the queue to the start of the work")
        self.first_token_seconds = histogram(
            "time_to_first_token_seconds", "From a place in the queue to the first text"
        )
        self.request_seconds = histogram("request_seconds", "From a place in the queue to the whole answer")
        gauge("ready", "1 while generation requests are taken").set_function(lambda: float(ready()))
        gauge("queue_depth", "Requests that wait").set_function(lambda: queue.waiting)
        gauge("queue_capacity", "Places to wait in").set_function(lambda: queue.capacity)
        gauge("running", "Requests being answered").set_function(lambda: queue.running)

    def started(self, job: Job, now: float) -> None:
        """The first text of a job is out; `now` as time.perf_counter() has it."""
        self.first_token_seconds.observe(now - job.submitted)
        if job.started is not None:
            self.queue_seconds.observe(job.started - job.submitted)

    def answered(self, job: Job, result: Result, now: float) -> None:
        """A job is done."""
        self.request_seconds.observe(now - job.submitted)
        self.prompt_tokens.inc(result.prompt_tokens)
        self.image_tokens.inc(result.image_tokens)
        self.generated_tokens.inc(len(result.token_ids))
        self.drafted_tokens.inc(result.drafted)
        self.accepted_tokens.inc(result.accepted)
        self.steps.inc(result.steps)

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)


class CountResponses:
    """ASGI middleware: every response by path and status; paths that are none of ours count as one."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything through."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status = CLIENT_GONE

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            status = 500 if status == CLIENT_GONE else status
            raise
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.requests.labels(path, str(status)).inc()
