"""`trtvlm bench`: how fast a model decodes and answers on the GPU at hand, and what that is made of."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trtvlm.runtime.speculate import DEFAULT_DRAFT_TOKENS
from trtvlm.scripts.cache_option import kv_cache_option

if TYPE_CHECKING:
    from trtvlm.model.cache_kind import CacheKind
    from trtvlm.runtime.cuda.measure_model import Subject, Wanted

PARTS = ("decode", "speculation", "prefill", "vision")
Record = dict[str, Any]


@click.command()
@click.option(
    "--random",
    "sizes",
    metavar="MODEL",
    multiple=True,
    help="Measure a model of these sizes with random weights, made on the GPU: deepseek-vl2-tiny, deepseek-vl2-small, "
    "deepseek-vl2, nano, or a folder with a config.json. Can be given several times.",
)
@click.option("--engine", metavar="DIR", type=click.Path(path_type=Path), help="Measure an INT4 engine directory.")
@click.option("--from", "shown", metavar="FILE", type=click.Path(path_type=Path), help="Show a file; needs no GPU.")
@click.option("--draft", metavar="MODEL", help="The draft of speculative steps: as --random, or the engine's own.")
@click.option(
    "--draft-tokens", metavar="K", type=click.IntRange(1, 15), default=DEFAULT_DRAFT_TOKENS, show_default=True,
    help="Tokens that it proposes a step.",
)  # fmt: skip
@click.option(
    "--accepted", metavar="A", type=click.FloatRange(min=0),
    help="How many of them are kept a step, to give tokens a second for. By default what the bundled pair keeps.",
)  # fmt: skip
@click.option(
    "--only", "only", type=click.Choice(PARTS), multiple=True,
    help="Measure only this part; can be given several times. By default all of them.",
)  # fmt: skip
@click.option(
    "--width", "widths", metavar="M", type=click.IntRange(1, 16), multiple=True,
    help="Rows of a decode step; can be given several times. By default 1, 2, 4, 8 and 16.",
)  # fmt: skip
@click.option(
    "--context", metavar="N", type=click.IntRange(min=1), default=1024, show_default=True,
    help="Positions in the cache when a step begins.",
)  # fmt: skip
@click.option(
    "--replays", metavar="N", type=click.IntRange(min=2), default=500, show_default=True,
    help="Steps of each width, each with tokens of its own.",
)  # fmt: skip
@click.option(
    "--lm-head", type=click.Choice(["int8", "fp16", "int4"]), default="int8", show_default=True,
    help="How random weights store the LM head.",
)  # fmt: skip
@kv_cache_option
@click.option("--cold-start", is_flag=True, help="Measure the way from a process's start to its first token too.")
@click.option(
    "--baselines", is_flag=True, help="Measure the same sizes in transformers too (pip install transformers)."
)
@click.option(
    "--memory-cap", metavar="SIZE",
    help="Instead: run the target, its draft, both vision towers, a prompt that fills the cache, an image of ten views and "
    "speculative steps within this much device memory (20GiB), and say whether it fits.",
)  # fmt: skip
@click.option(
    "--output", metavar="FILE", type=click.Path(path_type=Path),
    help="Write the figures here, as JSON. Models that the file has already stay in it.",
)  # fmt: skip
@click.option(
    "--plot", metavar="FILE", type=click.Path(path_type=Path),
    help="Draw a step's time by kernel for each width, as .svg or .png (pip install 'trtvlm[bench]').",
)  # fmt: skip
def command(
    sizes: tuple[str, ...],
    engine: Path | None,
    shown: Path | None,
    draft: str | None,
    draft_tokens: int,
    accepted: float | None,
    only: tuple[str, ...],
    widths: tuple[int, ...],
    context: int,
    replays: int,
    lm_head: str,
    kv_cache: CacheKind,
    cold_start: bool,
    baselines: bool,
    memory_cap: str | None,
    output: Path | None,
    plot: Path | None,
) -> None:
    """Measure a model on this GPU: time, bytes, memory.

    Decode steps from the embedding to the accepted token, whole speculative steps, prompts, images, memory by what it is
    for, the cold start; each step kernel by kernel, with the share of the bandwidth that a plain copy reaches here.

    \b
    trtvlm bench --random deepseek-vl2-small --output small.json --plot small.svg
    trtvlm bench --random deepseek-vl2 --draft deepseek-vl2-tiny --memory-cap 20GiB
    trtvlm bench --from benchmarks/bench-h200.json
    """
    given = [bool(sizes), engine is not None, shown is not None]
    if sum(given) != 1:
        raise click.UsageError("Give one of --random, --engine and --from.")
    if plot is not None:
        _check_plot(plot)
    if shown is not None:
        from trtvlm.model.bench_file import read_bench

        _finish(read_bench(shown), output, plot)
        return
    from trtvlm.runtime.cuda.device import check_gpu
    from trtvlm.runtime.cuda.measure_memory import parse_size

    pairs = _pairs(sizes, engine, draft, kv_cache)
    kept = _kept(accepted, draft_tokens)
    wanted = _wanted(only or PARTS, widths, context, replays, draft_tokens, kept, lm_head, kv_cache)
    cap = None if memory_cap is None else parse_size(memory_cap)
    if cap is not None:
        _check_capped(pairs)
    check_gpu()
    _check_output(output, wanted)
    if cap is not None:
        found = _capped(*pairs[0], cap, wanted, output)
    else:
        found = _measured(pairs, wanted, cold_start, baselines, output)
    _finish(found, None, plot)


def _check_plot(path: Path) -> None:
    """Say before anything is measured that nothing could be drawn afterwards."""
    import importlib.util

    from trtvlm.model.errors import UserError

    if path.suffix not in (".svg", ".png"):
        raise UserError(f"{path} cannot be drawn: give a name that ends in .svg or .png.")
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")


def _pairs(
    sizes: tuple[str, ...], engine: Path | None, draft: str | None, kv_cache: CacheKind
) -> list[tuple[Subject, Subject | None]]:
    """What to measure, each with its draft; a model that is not there, or pairs that do not fit, end here."""
    from trtvlm.model.artifacts import EngineDir
    from trtvlm.model.cache_kind import check_cache_kind
    from trtvlm.runtime.cuda.measure_model import Subject
    from trtvlm.runtime.engine import check_pair

    targets = [Subject("random", size) for size in sizes]
    own: Subject | None = None
    if engine is not None:
        inside = EngineDir(engine.expanduser()).draft
        targets = [Subject("engine", str(engine.expanduser()))]
        own = None if inside is None else Subject("engine", str(inside.path))
    drafter = own if draft is None else Subject("random", draft)
    pairs = []
    for target in targets:
        config = target.config()
        if drafter is not None:
            check_pair(config, drafter.config())
        both = [subject for subject in (target, drafter) if subject is not None]
        check_cache_kind(kv_cache, ((subject.name, subject.config().language) for subject in both))
        pairs.append((target, drafter))
    return pairs


def _kept(accepted: float | None, drafted: int) -> float:
    """Drafted tokens kept a step: as given, or what the bundled pair keeps."""
    from trtvlm.model.bench_results import bundled_acceptance
    from trtvlm.model.errors import UserError

    if accepted is None:
        return min(drafted, bundled_acceptance() or 0.0)
    if accepted > drafted:
        raise UserError(
            f"--accepted {accepted:g} is more than the {drafted} tokens drafted a step: give at most those."
        )
    return accepted


def _check_capped(pairs: list[tuple[Subject, Subject | None]]) -> None:
    from trtvlm.model.errors import UserError

    if len(pairs) != 1:
        raise UserError("--memory-cap is for one model at a time: give --random once.")
    if pairs[0][1] is None:
        raise UserError("--memory-cap runs speculative steps: give a --draft.")


def _wanted(
    parts: tuple[str, ...],
    widths: tuple[int, ...],
    context: int,
    replays: int,
    drafted: int,
    kept: float,
    lm_head: str,
    kv_cache: CacheKind,
) -> Wanted:
    from trtvlm.runtime.cuda.measure_decode import WIDTHS, Bench
    from trtvlm.runtime.cuda.measure_model import Wanted, check_widths

    wanted = sorted(set(widths or WIDTHS))
    check_widths(wanted, drafted, context)
    return Wanted(parts, wanted, Bench(context, replays), drafted, kept, lm_head, kv_cache)


def _check_output(path: Path | None, wanted: Wanted) -> None:
    """Say before anything is measured that the results could not join what the file has."""
    from trtvlm.model.bench_file import check_same, read_bench
    from trtvlm.runtime.cuda.device import describe

    if path is not None and path.exists():
        check_same(read_bench(path), describe() | _settings(wanted), path)


def _measured(
    pairs: list[tuple[Subject, Subject | None]], wanted: Wanted, cold_start: bool, baselines: bool, output: Path | None
) -> Record:
    from trtvlm.runtime.cuda.device import bytes_in_use
    from trtvlm.runtime.cuda.measure_baselines import measure_baselines
    from trtvlm.runtime.cuda.measure_model import measure_model
    from trtvlm.runtime.cuda.measure_start import measure_start

    before = bytes_in_use()
    models: Record = {}
    for target, draft in pairs:
        entry, copy = measure_model(target, draft, wanted, before, _say)
        if cold_start:
            _say("the start of a process, twice")
            entry["cold_start"] = measure_start(target.kind, target.source, wanted.kv_cache)
        if baselines:
            _say("transformers, in processes of their own")
            sizes = target.source if target.kind == "random" else target.name
            entry["baselines"] = measure_baselines(sizes, wanted.bench.context)
        found = _record({target.name: entry}, wanted, copy)
        models |= found["models"]
        found["models"] = models
        # After every model: what was measured stays if a later one fails.
        _write(found, output)
    return found


def _capped(target: Subject, draft: Subject | None, cap: int, wanted: Wanted, output: Path | None) -> Record:
    from trtvlm.runtime.cuda.measure_capped import measure_capped

    assert draft is not None
    entry, sentence, copy = measure_capped(target, draft, cap, wanted.drafted, wanted.lm_head, _say, wanted.kv_cache)
    record = _record({target.name: {"capped_memory": entry}}, wanted, copy)
    _write(record, output)
    click.echo(sentence)
    return record


def _settings(wanted: Wanted) -> Record:
    return {"context": wanted.bench.context, "lm_head": wanted.lm_head, "kv_cache": wanted.kv_cache}


def _record(models: Record, wanted: Wanted, copy: float) -> Record:
    from datetime import date

    from trtvlm.model.bench_file import SCHEMA, VERSION
    from trtvlm.runtime.cuda.device import describe

    run = {"date": date.today().isoformat(), "command": " ".join(["trtvlm", *sys.argv[1:]])}
    return {
        "schema": SCHEMA, "version": VERSION, **describe(), **run, **_settings(wanted),
        "copy_gbps": round(copy, 1), "models": {name: entry | run for name, entry in models.items()},
    }  # fmt: skip


def _write(record: Record, output: Path | None) -> None:
    from trtvlm.model.bench_file import merged, read_bench, write_bench

    if output is None:
        return
    if output.exists():
        record = merged(read_bench(output), record, output)
    write_bench(output, record)


def _finish(record: Record, output: Path | None, plot: Path | None) -> None:
    from rich.console import Console

    from trtvlm.scripts.bench_tables import show

    console = Console(highlight=False)
    if not console.is_terminal:  # a file or a pipe has no width that would have to be kept
        console.width = 140
    show(record, console)
    _write(record, output)
    if plot is not None:
        from trtvlm.scripts.bench_plot import plot as draw

        draw(record, plot)


def _say(what: str) -> None:
    click.echo(f"... {what}", err=True)
