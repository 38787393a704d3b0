"""What `trtvlm bench` measured, as tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

GIB = 1 << 30
Record = dict[str, Any]


def show(record: Record, console: Console) -> None:
    """Print every section that the record has, model by model."""
    for name, entry in record["models"].items():
        for title, table in tables(record, entry):
            console.print(f"{name}: {title}", style="bold", soft_wrap=True)
            console.print(table)
            console.print()
    console.print(
        f"{record['gpu']}, driver {record['driver']}, torch {record['torch']}, NVRTC {record['nvrtc']}, {record['date']}. "
        f"A large copy on the device moved {record['copy_gbps']:,.0f} GB/s, bytes read and written.",
        soft_wrap=True,
    )


def tables(record: Record, entry: Record) -> Iterator[tuple[str, Table]]:
    """Title and table of each section of one model."""
    copy = record["copy_gbps"]
    if "steps" in entry:
        cache = ", latents cached in 8 bits" if record.get("kv_cache") == "int8" else ""
        yield (
            f"decode steps at a context of {record['context']:,}, batch 1, greedy{cache}",
            _steps(entry["steps"], copy),
        )
        first, *more = entry["steps"]
        yield f"a step of {_rows(first['rows'])} by kernel", _kernels(first, copy)
        if more:
            yield "us a step by kernel and rows, and the share of a copy's bandwidth", _widths(entry["steps"], copy)
    if "speculation" in entry:
        yield f"a speculative step with {entry['speculation']['draft']}", _speculation(entry)
    for key, title in (("prefill", "prefill"), ("vision", "vision")):
        if key in entry:
            yield title, _entries(entry[key])
    if "memory" in entry:
        yield "memory", _memory(entry["memory"])
    if "capped_memory" in entry:
        capped = entry["capped_memory"]
        yield f"memory under a cap of {capped['cap'] / GIB:.2f} GiB, with {capped['draft']} as draft", _memory(capped)
    if "cold_start" in entry:
        yield "from the start of the process, kernels compiled or on disk", _start(entry["cold_start"])
    if "baselines" in entry:
        yield "the same sizes in bf16, a token", _baselines(entry["baselines"])


def _table(first: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _steps(steps: list[Record], copy: float) -> Table:
    table = _table(
        "rows", "p50 ms", "p95", "p99", "replays", "times one row's", "launches", "bytes", "GB/s", "of a copy"
    )
    first = steps[0]["ms"]["p50"]
    for step in steps:
        ms = step["ms"]
        rate = step["bytes"] / (ms["p50"] * 1e6)
        table.add_row(
            str(step["rows"]), *(f"{ms[key]:.3f}" for key in ("p50", "p95", "p99")), str(ms["replays"]),
            f"{ms['p50'] / first:.2f}", str(sum(kernel["launches"] for kernel in step["kernels"].values())),
            _size(step["bytes"]), f"{rate:,.0f}", f"{100 * rate / copy:.0f}%",
        )  # fmt: skip
    return table


def _kernels(step: Record, copy: float) -> Table:
    table = _table("kernel", "launches", "us a launch", "us a step", "share", "bytes a step", "GB/s", "of a copy")
    whole = sum(kernel["us"] * kernel["launches"] for kernel in step["kernels"].values())
    for name, kernel in step["kernels"].items():
        us, launches = kernel["us"], kernel["launches"]
        row = [name, str(launches), f"{us:.2f}", f"{us * launches:.1f}", f"{100 * us * launches / whole:.0f}%"]
        if kernel.get("bytes"):
            rate = kernel["bytes"] / (us * 1e3)
            row += [_size(kernel["bytes"] * launches), f"{rate:,.0f}", f"{100 * rate / copy:.0f}%"]
        table.add_row(*row)
    gap = 1e3 * step["ms"]["p50"] - whole
    table.add_row("between kernels" if gap > 0 else "overlap of kernels", "", "", f"{abs(gap):.1f}")
    return table


def _widths(steps: list[Record], copy: float) -> Table:
    table = _table("kernel", *(_rows(step["rows"]) for step in steps))
    for name in dict.fromkeys(name for step in steps for name in step["kernels"]):
        cells = []
        for step in steps:
            kernel = step["kernels"].get(name)
            if kernel is None:
                cells.append("-")
                continue
            share = f" ({100 * kernel['bytes'] / (kernel['us'] * 1e3 * copy):.0f}%)" if kernel.get("bytes") else ""
            cells.append(f"{kernel['us'] * kernel['launches']:.1f}{share}")
        table.add_row(name, *cells)
    return table


def _speculation(entry: Record) -> Table:
    found = entry["speculation"]
    table = _table("accepted a step", "tokens/s", "ms a token", "times plain decoding")
    step_ms = found["ms"]["p50"]
    plain = next((step["ms"]["p50"] for step in entry.get("steps", []) if step["rows"] == 1), None)
    for accepted in sorted({0.0, float(found["drafted"]), float(found.get("accepted") or 0)}):
        ms = step_ms / (1 + accepted)
        row = [f"{accepted:.2f} of {found['drafted']}", f"{1e3 / ms:,.0f}", f"{ms:.3f}"]
        table.add_row(*row, "-" if plain is None else f"{plain / ms:.2f}")
    spread = ", ".join(f"{key} {found['ms'][key]:.3f}" for key in ("p50", "p95", "p99"))
    table.caption, table.caption_justify = f"ms a step: {spread} ({found['ms']['replays']} replays)", "left"
    return table


def _entries(entries: list[Record]) -> Table:
    names = list(dict.fromkeys(name for entry in entries for name in entry))
    table = _table(*(name.replace("_", " ") for name in names))
    for entry in entries:
        table.add_row(*(_value(name, entry.get(name)) for name in names))
    return table


def _value(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(key, part)}" for key, part in value.items())
    if isinstance(value, int | float) and name == "peak":
        return _size(value)
    return f"{value:,.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else "-" if value is None else f"{value}"


def _memory(found: Record) -> Table:
    table = _table("what", "GiB")
    for name, size in found["parts"].items():
        table.add_row(name, f"{size / GIB:.3f}")
    table.add_row("held in all", f"{found['held'] / GIB:.3f}")
    table.add_row("at most at any time", f"{found['peak'] / GIB:.3f}")
    return table


def _start(found: Record) -> Table:
    stages = list(dict.fromkeys(stage for each in found.values() for stage in each))
    table = _table("seconds until", *found)
    for stage in stages:
        table.add_row(stage, *(f"{each[stage]:.2f}" if stage in each else "-" for each in found.values()))
    return table


def _baselines(found: list[Record]) -> Table:
    table = _table("what", "p50 ms", "p95", "p99", "replays")
    for entry in found:
        if "failed" in entry:
            table.add_row(f"{entry['name']}: {entry['failed']}")
        else:
            ms = entry["ms"]
            table.add_row(entry["name"], *(f"{ms[key]:.2f}" for key in ("p50", "p95", "p99")), str(ms["replays"]))
    return table


def _rows(rows: int) -> str:
    return "1 row" if rows == 1 else f"{rows} rows"


def _size(size: float) -> str:
    return f"{size / 1e9:,.3f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"
