"""`trtvlm generate`: read images, and print what they say as it is decoded."""

from __future__ import annotations

import json
import sys
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import click

from trtvlm.runtime.executor import EXECUTORS
from trtvlm.runtime.request import Request, question
from trtvlm.runtime.speculate import MAX_DRAFT_TOKENS
from trtvlm.scripts.cache_option import kv_cache_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trtvlm.model.cache_kind import CacheKind
    from trtvlm.runtime.engine import Engine
    from trtvlm.runtime.result import Result
    from trtvlm.runtime.session import Session

SEVERAL = ("--image", "--stop")


class SeveralValues(click.Command):
    """Some options take all values that follow them: `--image a.png b.png` is `--image a.png --image b.png`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat the option before each of its values, then parse as usual."""
        spread: list[str] = []
        option, seen = None, 0
        for arg in args:
            if option is None or arg.startswith("-"):
                option, seen = (arg, 0) if arg in SEVERAL else (None, 0)
            else:
                if seen:
                    spread.append(option)
                seen += 1
            spread.append(arg)
        return super().parse_args(ctx, spread)


@click.command(cls=SeveralValues)
@click.option("--engine", metavar="DIR", help="An engine directory that `trtvlm build` made.")
@click.option("--model", metavar="NAME", help="Instead of an engine: a model by name (nano) or folder, unquantized.")
@click.option("--draft", metavar="NAME", help="With --model: its draft. The bundled models bring their own.")
@click.option("--image", "images", metavar="FILE...", multiple=True, help="Images; each is read on its own.")
@click.option("--together", is_flag=True, help="Put all images into one prompt instead.")
@click.option("--prompt", metavar="TEXT", help="What to ask. By default: to read the text in the image.")
@click.option("--no-speculation", is_flag=True, help="Decode with the target alone. The greedy text is the same.")
@click.option(
    "--draft-tokens",
    metavar="K",
    type=click.IntRange(1, MAX_DRAFT_TOKENS),
    default=Request.draft_tokens,
    show_default=True,
    help="Tokens that the draft proposes a step.",
)
@click.option(
    "--temperature",
    metavar="T",
    default=Request.temperature,
    show_default=True,
    help="0 takes the most likely token; above, tokens are sampled.",
)
@click.option(
    "--top-p",
    metavar="P",
    default=Request.top_p,
    show_default=True,
    help="Sample from the fewest tokens that have this probability together.",
)
@click.option("--seed", metavar="S", type=int, help="Makes sampling repeatable.")
@click.option(
    "--max-new-tokens",
    metavar="N",
    type=click.IntRange(min=1),
    default=Request.max_new_tokens,
    show_default=True,
    help="End the text after so many tokens.",
)
@click.option("--stop", metavar="TEXT...", multiple=True, help="End the text before the first of these.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object an image, and nothing else, to stdout.")
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
    images: tuple[str, ...],
    together: bool,
    prompt: str | None,
    no_speculation: bool,
    draft_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    max_new_tokens: int,
    stop: tuple[str, ...],
    as_json: bool,
    device: str,
    kv_cache: CacheKind,
    executor: str,
) -> None:
    """Read images and print what they say, as it is decoded.

    The text goes to stdout, a table of figures to stderr. All images are checked before the first is read.

    \b
    trtvlm generate --engine engine --image page.png
    trtvlm generate --model nano --image *.png --json > pages.jsonl
    trtvlm generate --engine engine --image a.png b.png --together --prompt "Which page is older?"

    \b
    A JSON object holds
      image             the file (with --together: a list of all)
      speculation       whether a draft proposes tokens
      text, token_ids, finish_reason ("stop" or "length")
      accepted_per_step tokens that came out of each step of the target: 1 without speculation
      tokens, tokens_per_second, steps, drafted, accepted
      prompt_tokens, image_tokens
      timings           in ms: load, image, prefill, decode, first_token, total
    """
    if (engine is None) == (model is None):
        raise click.UsageError("Give either --engine DIR or --model NAME.")
    if draft is not None and model is None:
        raise click.UsageError("--draft goes with --model; an engine directory has its own draft inside.")
    if executor not in ("auto", "torch") and engine is None:
        raise click.UsageError(f"--executor {executor} goes with --engine: a model has no engines.")
    if not images and prompt is None:
        raise click.UsageError("Give at least one --image FILE, or a --prompt to answer without one.")
    groups: list[tuple[str, ...]] = [images] if together or not images else [(image,) for image in images]
    requests = [
        Request(
            question(group, prompt),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop,
            draft_tokens=0 if no_speculation else draft_tokens,
        )
        for group in groups
    ]
    from trtvlm.runtime.session import Session

    session = Session(_open(engine, model, draft, device, executor, kv_cache))
    if len(requests) > 1:  # a single one is checked by reading it
        for request in requests:
            session.prepare(request)
    results: list[Result] = []
    for group, request in zip(groups, requests, strict=True):
        if len(groups) > 1 and not as_json:
            click.echo(f"{chr(10) if results else ''}==> {group[0]} <==")
        result = _read(session, request, show=not as_json)
        results.append(result)
        if as_json:
            image = group if together else group[0] if group else None
            speculation = session.engine.draft is not None and not no_speculation
            click.echo(json.dumps({"image": image, "speculation": speculation} | _record(result)))
    if not as_json:
        _print_table(groups, results)


def _open(
    engine: str | None, model: str | None, draft: str | None, device: str, executor: str, kv_cache: CacheKind
) -> Engine:
    from trtvlm.runtime.engine import open_engine, open_model

    if engine is not None:
        return open_engine(
            engine, device, executor, lambda sentence: click.echo(f"Warning: {sentence}", err=True), kv_cache
        )
    assert model is not None
    return open_model(model, draft, device, kv_cache=kv_cache)


def _read(session: Session, request: Request, show: bool) -> Result:
    """The answer; with `show`, its text goes to stdout piece by piece."""
    from trtvlm.runtime.result import Result

    for piece in session.generate(request):
        if isinstance(piece, Result):
            if show:
                click.echo()
            return piece
        if show:
            click.echo(piece, nl=False)
            sys.stdout.flush()
    raise AssertionError("a session ends with a Result")


def _record(result: Result) -> dict[str, Any]:
    return {
        "text": result.text,
        "token_ids": list(result.token_ids),
        "finish_reason": result.finish_reason,
        "accepted_per_step": round(result.accepted_per_step, 4),
        "tokens": len(result.token_ids),
        "tokens_per_second": round(result.tokens_per_second, 2),
        "steps": result.steps,
        "drafted": result.drafted,
        "accepted": result.accepted,
        "prompt_tokens": result.prompt_tokens,
        "image_tokens": result.image_tokens,
        "timings": {name: round(ms, 3) for name, ms in result.timings.items()},
    }


def _print_table(groups: Sequence[tuple[str, ...]], results: Sequence[Result]) -> None:
    """One image: a line for each figure. Several: a line for each image."""
    from rich.console import Console
    from rich.table import Table

    figures = [_figures(result) for result in results]
    table = Table(box=None, pad_edge=False, show_header=len(results) > 1, header_style="bold")
    if len(results) == 1:
        for name, value in figures[0].items():
            table.add_row(name, value)
    else:
        table.add_column("image", overflow="fold")
        for name in figures[0]:
            table.add_column(name, justify="right")
        for group, row in zip(groups, figures, strict=True):
            table.add_row(PurePath(group[0]).name, *row.values())
    console = Console(stderr=True)
    console.print()
    console.print(table)


def _figures(result: Result) -> dict[str, str]:
    per_step = f"{result.accepted / result.steps:.2f}" if result.drafted else "no draft"
    return {
        "tokens": str(len(result.token_ids)),
        "tokens a second": f"{result.tokens_per_second:.1f}",
        "accepted draft tokens a step": per_step,
        "image tokens": str(result.image_tokens),
        "time to first token": f"{result.timings['first_token']:.0f} ms",
    }
