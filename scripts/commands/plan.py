"""`trtvlm plan`: what a model takes and could do on a GPU, before anything is downloaded or built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trtvlm.builder.planner.gpus import GPUS, find_gpu
from trtvlm.runtime.speculate import DEFAULT_DRAFT_TOKENS, MAX_DRAFT_TOKENS
from trtvlm.scripts.cache_option import kv_cache_option

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.table import Table

    from trtvlm.builder.planner.plan import Plan
    from trtvlm.builder.planner.projection import Range
    from trtvlm.model.bench_results import BenchResults
    from trtvlm.model.cache_kind import CacheKind

MAX_LENGTH = 4096
CONTEXT = 1024


@click.command()
@click.option(
    "--model",
    metavar="MODEL",
    required=True,
    help="deepseek-vl2-tiny, deepseek-vl2-small, deepseek-vl2, nano, a folder with a config.json, or a hub name.",
)
@click.option("--gpu", metavar="GPU", required=True, help=f"One of {', '.join(GPUS)}.")
@click.option("--draft", metavar="MODEL", help="The draft that speculates for it. A bundled model brings its own.")
@click.option(
    "--quant",
    type=click.Choice(["none", "int8_wo", "int4_awq"]),
    default="int4_awq",
    show_default=True,
    help="How linear layers are stored: 16 bit, 8-bit weights, or 4-bit weights with AWQ scales in groups of 64.",
)
@click.option(
    "--lm-head",
    type=click.Choice(["fp16", "int8", "int4"]),
    help="How the LM head is stored. By default int8, and fp16 with --quant none.",
)
@kv_cache_option
@click.option(
    "--max-length",
    metavar="N",
    type=click.IntRange(min=16),
    help=f"Positions of the cache. By default {MAX_LENGTH:,}, or what the models have.",
)
@click.option(
    "--tiles",
    metavar="N",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="Views of an image: its overview and the tiles it is cut into.",
)
@click.option(
    "--context",
    metavar="N",
    type=click.IntRange(min=0),
    help=f"Positions in the cache when a token is decoded. By default {CONTEXT:,}, or what the cache has.",
)
@click.option(
    "--draft-tokens",
    metavar="K",
    type=click.IntRange(1, MAX_DRAFT_TOKENS),
    default=DEFAULT_DRAFT_TOKENS,
    show_default=True,
    help="Tokens that the draft proposes a step.",
)
@click.option(
    "--accepted",
    metavar="A",
    type=float,
    help="How many of them are kept a step, on average. By default what was measured on the bundled pair.",
)
@click.option(
    "--measured",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="What `trtvlm bench --output` wrote. By default the project's own of an H200, where there is a checkout.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else.")
def command(
    model: str,
    gpu: str,
    draft: str | None,
    quant: str,
    lm_head: str | None,
    kv_cache: CacheKind,
    max_length: int | None,
    tiles: int,
    context: int | None,
    draft_tokens: int,
    accepted: float | None,
    measured: Path | None,
    as_json: bool,
) -> None:
    """Say what a model takes and could do on a GPU.

    From the configuration alone: parameters, bytes on disk and on the card, what fits where, the bytes a token moves, the time
    they take at least, and a projection from steps measured on another GPU. Nothing is downloaded but a hub name's config.json.

    \b
    trtvlm plan --model deepseek-vl2-small --gpu rtx3090
    trtvlm plan --model deepseek-vl2 --draft deepseek-vl2-tiny --gpu rtx4090 --accepted 2.5 --json
    """
    card = find_gpu(gpu)
    from trtvlm.builder.planner.plan import Settings, plan
    from trtvlm.model.bench_results import bundled_acceptance
    from trtvlm.model.checkpoint import bundled_draft
    from trtvlm.model.presets import read_config
    from trtvlm.runtime.engine import check_pair

    draft = draft if draft is not None else bundled_draft(model)
    target = (model, read_config(model))
    drafter = None if draft is None else (draft, read_config(draft))
    if drafter is not None:
        check_pair(target[1], drafter[1])
    known = min(config.language.max_position_embeddings for _, config in (target, drafter or target))
    positions = max_length or min(MAX_LENGTH, known)
    context = min(CONTEXT, positions) if context is None else context
    guessed = accepted is None and model != "nano"
    if accepted is None:
        accepted = min(draft_tokens, bundled_acceptance() or 0.0)
    settings = Settings(quant, lm_head, positions, tiles, context, draft_tokens, accepted, kv_cache)
    results = _results(measured)
    found = plan(target, drafter, card, settings, results)
    if as_json:
        click.echo(json.dumps(found.to_dict() | {"measured": None if results is None else results.gpu}))
        return
    _show(found, results, guessed)


def _results(path: Path | None) -> BenchResults | None:
    from trtvlm.model.bench_results import BenchResults, default_results

    found = path or default_results()
    return None if found is None else BenchResults.read(found)


def _show(found: Plan, results: BenchResults | None, guessed: bool) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for title, table in _tables(found):
        console.print(title, style="bold", soft_wrap=True)
        console.print(table)
        console.print()
    for line in _notes(found, results, guessed):
        console.print(line, soft_wrap=True)


def _tables(found: Plan) -> Iterator[tuple[str, Table]]:
    for role in found.models:
        yield _weights(found, role)
    yield _memory(found)
    yield _fits(found)
    yield _widths(found)
    yield _times(found)


def _table(first: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _weights(found: Plan, role: str) -> tuple[str, Table]:
    model, settings = found.models[role], found.settings
    title = f"{model.name} ({role}): {settings.quant}, LM head {settings.head()}"
    table = _table("part", "parameters", "active a token", "in the checkpoint", "on the device")
    for part in (*model.parts.values(), model.total):
        if part.parameters:
            counts = (f"{count / 1e6:,.1f} M" for count in (part.parameters, part.active))
            table.add_row(part.name, *counts, _gb(part.checkpoint_bytes), _gb(part.device_bytes))
    return title, table


def _memory(found: Plan) -> tuple[str, Table]:
    settings = found.settings
    title = f"Memory on the card: {settings.positions:,} positions, images of up to {settings.views} views"
    table = _table("what", *found.models)
    memories = [model.memory for model in found.models.values()]
    rows = {
        "language weights": [memory.weights for memory in memories],
        "vision and projector": [memory.vision for memory in memories],
        f"KV cache{', latents in 8 bits' if settings.kv_cache == 'int8' else ''}": [
            memory.cache for memory in memories
        ],
        "image activations, or": [memory.image for memory in memories],
        "a prompt's activations": [memory.prefill for memory in memories],
        "step buffers": [memory.buffers for memory in memories],
        "running": [memory.running for memory in memories],
        "at most while it is opened": [memory.opening for memory in memories],
    }
    for what, sizes in rows.items():
        table.add_row(what, *(_gb(size) for size in sizes))
    table.add_row("CUDA and graphs (allowance)", _gb(found.shared_bytes))
    table.add_row("needed in all", _gb(found.needed_bytes))
    return title, table


def _fits(found: Plan) -> tuple[str, Table]:
    cards = found.fits[0].cards
    table = _table("--quant", "LM head", "needed", *(f"{gib} GB card" for gib in cards), found.gpu.name)
    for fit in found.fits:
        answers = ("yes" if fits else "no" for fits in (*fit.cards.values(), fit.gpu))
        table.add_row(fit.quant, fit.lm_head, "-" if fit.bytes is None else _gb(fit.bytes), *answers)
    return "What fits", table


def _widths(found: Plan) -> tuple[str, Table]:
    title = f"Bytes of one step over {found.settings.context:,} cached positions, routing spread evenly"
    table = _table("rows", "experts a layer", "bytes", "times one row's", "floor", _projected(found))
    for width in found.widths:
        relative = width.total_bytes / found.widths[0].total_bytes
        times = (_ms(width.decoding.floor_ms), _range(width.decoding.projected_ms))
        table.add_row(str(width.rows), f"{width.experts:.1f}", _gb(width.total_bytes), f"{relative:.2f}", *times)
    return title, table


def _times(found: Plan) -> tuple[str, Table]:
    table = _table("what", "floor", _projected(found))
    plain, spec = found.widths[0].decoding, found.speculation
    table.add_row("a token, without speculation", _ms(plain.floor_ms), _range(plain.projected_ms))
    if spec is not None:
        what = f"a token, {spec.drafted} drafted, {spec.accepted:.2f} accepted a step"
        table.add_row(what, _ms(spec.decoding.floor_ms), _range(spec.decoding.projected_ms))
        even = spec.break_even
        projected = "-" if even is None else f"{even.low - 1:.2f} to {even.high - 1:.2f}"
        table.add_row("accepted a step that it takes to gain", f"{max(0.0, spec.break_even_floor - 1):.2f}", projected)
    first = found.first_token
    table.add_row(f"before the first token, {first.prompt_tokens:,} image tokens", _ms(first.floor_ms), "-")
    return f"Time on {found.gpu.name}", table


def _notes(found: Plan, results: BenchResults | None, guessed: bool) -> Iterator[str]:
    gpu = found.gpu
    capability = ".".join(map(str, gpu.compute_capability))
    yield (
        f"{gpu.name}: {gpu.memory_gib:g} GiB, {gpu.bandwidth_gbps:,.0f} GB/s, {gpu.tensor_tflops:g} TFLOP/s (float16, float32 "
        f"sums), SM {capability}. Floors: bytes at that bandwidth, or, before the first token, products at that rate."
    )
    if found.basis is not None and results is not None:
        basis = found.basis
        yield (
            f"Projected from steps measured on {results.gpu} ({results.date}): {basis.steps[0].ms:.2f} ms for one row in "
            f"{basis.steps[0].launches} launches, {100 * basis.share:.0f}% of the bandwidth for further bytes, "
            f"{basis.fixed_us_a_launch:.1f} us a launch besides. Nobody has run this on {gpu.name}."
            if basis.gpu != gpu
            else f"Measured on {results.gpu} ({results.date}); with other settings than there, moved by the bytes."
        )
    for role, reason in found.no_projection.items():
        yield f"No projection for the {role}, only floors: {reason}."
    if found.speculation is not None and guessed:
        yield "The acceptance is that of the bundled pair, not of these models: give yours with --accepted."
    others = [fit.quant for fit in found.fits if fit.quant != "int4_awq"]
    whole = sum(model.float32_bytes for model in found.models.values())
    yield (
        f"Only int4_awq has kernels: on a GPU, {' and '.join(others)} are run in float32 so far, {_gb(whole)} of weights; their "
        "rows say what would fit as they are stored."
    )
    files = {
        key: sum(model.files[key] for model in found.models.values()) for key in next(iter(found.models.values())).files
    }
    yield (
        f"An engine directory takes {_gb(sum(files.values()))} on disk: {_gb(files['checkpoint'] + files['vision'])} of weights, "
        f"{_gb(files['graphs'])} of graphs and {_gb(files['engines'])} of engines (these two not with --no-compile)."
    )
    stages = {
        key: max(model.building[key] for model in found.models.values()) for key in ("quantize", "compile", "verify")
    }
    reading = f", {_gb(stages['verify'])} to read pages with (not with --verify-samples 0)" if stages["verify"] else ""
    yield (
        f"Building takes about {_gb(stages['quantize'])} of host memory to quantize, {_gb(stages['compile'])} to compile (not "
        f"with --no-compile){reading}: estimates."
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def _projected(found: Plan) -> str:
    here = found.basis is not None and found.basis.gpu == found.gpu
    return "by measured steps" if here else "projected (not measured)"


def _ms(value: float) -> str:
    if value < 0.1:
        return f"{1e3 * value:.1f} us"
    return f"{value:.2f} ms" if value < 100 else f"{value:.0f} ms"


def _range(found: Range | None) -> str:
    if found is None:
        return "-"
    low, high = _ms(found.low), _ms(found.high)
    return low if low == high else f"{low.removesuffix(' ms')} to {high}"
