"""`trtvlm serve`: an engine behind OpenAI's HTTP interface."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trtvlm.model.errors import UserError
from trtvlm.runtime.executor import EXECUTORS
from trtvlm.runtime.request import Request
from trtvlm.runtime.server.limits import Limits
from trtvlm.runtime.speculate import MAX_DRAFT_TOKENS
from trtvlm.scripts.cache_option import kv_cache_option

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator

    from trtvlm.model.cache_kind import CacheKind
    from trtvlm.runtime.result import Result
    from trtvlm.runtime.server.queue import Generate
    from trtvlm.runtime.session import Session

SECONDS = click.FloatRange(min=0, min_open=True)


@click.command()
@click.option("--engine", metavar="DIR", help="An engine directory that `trtvlm build` made.")
@click.option("--model", metavar="NAME", help="Instead of an engine: a model by name (nano) or folder, unquantized.")
@click.option("--draft", metavar="NAME", help="With --model: its draft. The bundled models bring their own.")
@click.option("--name", metavar="ID", help="What clients call the model. By default: the folder's or model's name.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on. There are no passwords.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes any free port.")
@click.option(
    "--queue",
    metavar="N",
    default=16,
    show_default=True,
    type=click.IntRange(min=0),
    help="Requests that may wait beside the one being answered; the next one gets 429.",
)
@click.option(
    "--max-body-mb",
    metavar="MB",
    default=Limits.body_bytes / 2**20,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Largest request body, in MiB; images arrive in it, a third larger than their files.",
)
@click.option(
    "--max-pixels",
    metavar="N",
    default=Limits.pixels,
    show_default=True,
    type=click.IntRange(min=1),
    help="Largest image, width times height.",
)
@click.option(
    "--max-images",
    metavar="N",
    default=Limits.images,
    show_default=True,
    type=click.IntRange(min=0),
    help="Most images in one request.",
)
@click.option(
    "--max-tokens",
    metavar="N",
    default=Limits.tokens,
    show_default=True,
    type=click.IntRange(min=1),
    help="Longest answer; also of requests that name no length.",
)
@click.option(
    "--request-timeout",
    metavar="S",
    default=Limits.request,
    show_default=True,
    type=SECONDS,
    help="Give a request up after so many seconds, the wait included.",
)
@click.option(
    "--drain-timeout",
    metavar="S",
    default=30.0,
    show_default=True,
    type=click.FloatRange(min=0),
    help="After SIGTERM or Ctrl+C, finish what is in flight for so many seconds at most.",
)
@click.option(
    "--draft-tokens",
    metavar="K",
    type=click.IntRange(0, MAX_DRAFT_TOKENS),
    default=Request.draft_tokens,
    show_default=True,
    help="Tokens that the draft proposes a step; 0 decodes with the target alone.",
)
@click.option("--device", default="cpu", show_default=True, help="Where the model runs: cpu, cuda, cuda:1, ...")
@kv_cache_option
@click.option(
    "--executor",
    type=click.Choice(EXECUTORS),
    default="auto",
    show_default=True,
    help="What runs an engine directory: PyTorch (auto), its TensorRT engines, or their graphs on a CPU.",
)
def command(
    engine: str | None,
    model: str | None,
    draft: str | None,
    name: str | None,
    host: str,
    port: int,
    queue: int,
    max_body_mb: float,
    max_pixels: int,
    max_images: int,
    max_tokens: int,
    request_timeout: float,
    drain_timeout: float,
    draft_tokens: int,
    device: str,
    kv_cache: CacheKind,
    executor: str,
) -> None:
    """Answer OpenAI-style requests over HTTP, one after the other.

    The port opens at once; the model is loaded behind it. Images come inside the request, as data: URIs. SIGTERM and
    Ctrl+C finish what is in flight first; a second signal does not wait.

    \b
    trtvlm serve --engine engine
    trtvlm serve --model nano --port 8001

    \b
    POST /v1/chat/completions   text and images in, text out, streamed or not
    GET  /v1/models             the one model
    GET  /health  /ready        alive; taking requests (503 while loading or draining)
    GET  /metrics               for Prometheus
    """
    if (engine is None) == (model is None):
        raise click.UsageError("Give either --engine DIR or --model NAME.")
    if draft is not None and model is None:
        raise click.UsageError("--draft goes with --model; an engine directory has its own draft inside.")
    if executor not in ("auto", "torch") and engine is None:
        raise click.UsageError(f"--executor {executor} goes with --engine: a model has no engines.")
    if engine is not None and not Path(engine).expanduser().is_dir():
        raise UserError(f"There is no engine directory {engine}: make one with `trtvlm build`.")
    try:
        from trtvlm.runtime.server.process import serve
        from trtvlm.runtime.server.service import Service
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'trtvlm[serve]'.") from None

    def opener() -> Generate:
        generate, milliseconds = _load(engine, model, draft, device, kv_cache, executor, max_pixels, draft_tokens)
        click.echo(f"ready after {milliseconds / 1e3:.1f} s")
        return generate

    limits = Limits(
        body_bytes=int(max_body_mb * 2**20),
        pixels=max_pixels,
        images=max_images,
        tokens=max_tokens,
        request=request_timeout,
    )
    serve(Service(name or _name(engine or str(model)), limits, queue), opener, host, port, drain_timeout, click.echo)


def _name(path_or_name: str) -> str:
    """A folder's own name; a bundled or hub name as it is."""
    folder = Path(path_or_name).expanduser()
    return folder.resolve().name if folder.is_dir() else path_or_name


def _load(
    engine: str | None,
    model: str | None,
    draft: str | None,
    device: str,
    kv_cache: CacheKind,
    executor: str,
    max_pixels: int,
    draft_tokens: int,
) -> tuple[Generate, float]:
    """The callable of an engine or a model, and the ms that opening took."""
    from trtvlm.runtime.engine import open_engine, open_model
    from trtvlm.runtime.session import Session

    if engine is not None:
        opened = open_engine(
            engine, device, executor, lambda sentence: click.echo(f"Warning: {sentence}", err=True), kv_cache
        )
    else:
        opened = open_model(str(model), draft, device, kv_cache=kv_cache)
    opened.processor.max_pixels = max_pixels
    return answering(Session(opened), draft_tokens), opened.load_ms


def answering(session: Session, draft_tokens: int) -> Generate:
    """A session as the callable that the server knows, with speculation as this server was told."""

    def generate(request: Request, cancelled: threading.Event, /) -> Iterator[str | Result]:
        return session.generate(dataclasses.replace(request, draft_tokens=draft_tokens), cancelled)

    return generate
