"""`trtvlm build`: turn a checkpoint into an engine directory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID
    from rich.table import Table


@click.command()
@click.option("--model", metavar="MODEL", required=True, help="The checkpoint: nano, a folder, or a hub name.")
@click.option(
    "--quant",
    type=click.Choice(["none", "int8_wo", "int4_awq"]),
    default="int4_awq",
    show_default=True,
    help="How linear layers are stored: 16 bit, 8-bit weights, or 4-bit weights with AWQ scales in groups of 64.",
)
@click.option("--sm", type=int, default=86, show_default=True, help="Compute capability to compile for (86: RTX 3090).")
@click.option(
    "--flavour",
    type=click.Choice(["auto", "tensorrt-rtx", "tensorrt"]),
    default="auto",
    show_default=True,
    help="Which TensorRT: RTX builds anywhere, a chain of engines; TensorRT on the GPU it is for, one engine with plugins.",
)
@click.option(
    "--output", metavar="DIR", type=click.Path(path_type=Path), required=True, help="The new engine directory."
)
@click.option("--draft", metavar="MODEL", help="The draft that speculates for it. A bundled model brings its own.")
@click.option(
    "--lm-head",
    type=click.Choice(["fp16", "int8", "int4"]),
    help="How the LM head is stored. By default int8, and fp16 with --quant none.",
)
@click.option(
    "--awq",
    type=click.Choice(["lite", "clip", "full"]),
    default="full",
    show_default=True,
    help="What INT4 searches: AWQ's scales (lite), also each group's range (clip), and codes that make up for "
    "each other's rounding (full). Each takes longer and loses less.",
)
@click.option(
    "--calibration",
    metavar="FOLDER|JSONL",
    help="Samples for AWQ: a folder of images (each perhaps with its text in a .txt), or a file of "
    '{"image", "prompt", "answer"} objects, one a line. By default the project\'s own pages.',
)
@click.option(
    "--calibration-samples",
    metavar="N",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="How many of them to calibrate on.",
)
@click.option(
    "--max-seq-len",
    metavar="N",
    type=click.IntRange(min=16),
    help="Positions of the cache. By default as many as both models have.",
)
@click.option(
    "--max-draft-len",
    metavar="K",
    type=click.IntRange(0, 7),
    default=7,
    show_default=True,
    help="Drafted tokens a step at most: decoding is compiled for up to K + 1 rows.",
)
@click.option(
    "--verify-samples",
    metavar="N",
    type=click.IntRange(min=0),
    default=16,
    show_default=True,
    help="Held-out pages to compare the quantized model with the float one on; 0 leaves it out.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where layers are quantized: auto is a GPU if there is one.",
)
@click.option("--compile/--no-compile", default=True, show_default=True, help="Compile engines, or only quantize.")
@click.option("--overwrite", is_flag=True, help="Replace an engine directory that is there; nothing else is replaced.")
@click.option("--dry-run", is_flag=True, help="Say what would be built and how big; write nothing.")
def command(
    model: str,
    quant: str,
    sm: int,
    flavour: str,
    output: Path,
    draft: str | None,
    lm_head: str | None,
    max_seq_len: int | None,
    max_draft_len: int,
    dry_run: bool,
    **rest: Any,
) -> None:
    """Turn a checkpoint into an engine directory.

    Quantizes one decoder layer at a time, exports the vision tower and the language model to ONNX, checks every graph
    against PyTorch, and compiles engines, with TensorRT-RTX without a GPU. A build that is killed goes on after its last
    finished layer; an interrupted one leaves nothing behind.

    \b
    trtvlm build --model nano --quant int4_awq --sm 86 --output engine
    trtvlm build --model deepseek-ai/deepseek-vl2-small --draft my-draft --output small --dry-run
    """
    from rich.console import Console

    from trtvlm.builder.build import BuildSettings, build, plan, planned_sizes
    from trtvlm.builder.flavour import RTX, resolve
    from trtvlm.builder.trtllm_config import BuildConfig
    from trtvlm.model.checkpoint import bundled_draft, resolve_model
    from trtvlm.model.config import ModelConfig
    from trtvlm.scripts.stopping import stoppable

    draft = draft if draft is not None else bundled_draft(model)
    folders = [resolve_model(name) for name in (model, draft) if name is not None]
    context = max_seq_len or min(ModelConfig.from_pretrained(f).language.max_position_embeddings for f in folders)
    flavour = resolve(flavour, sm) if rest["compile"] else RTX
    limits = BuildConfig(
        sm=sm, max_seq_len=context, max_draft_len=max_draft_len, flavour=flavour, engines=rest["compile"]
    )
    settings = BuildSettings(quant=quant, lm_head=lm_head, build=limits, **rest)
    console = Console(stderr=True)
    if dry_run:
        parts = plan(model, output, settings, draft)
        console.print(_planned(planned_sizes(parts, settings)))
        console.print(
            f"{output} would be built for SM {sm} from {', '.join(part.name for part in parts)}; nothing was written."
        )
        return
    with stoppable() as check, _Bars(console) as bars:

        def show(part: str, what: str) -> None:
            check()
            bars.show(part, what)

        report = build(model, output, settings, draft, show)
    console.print(_built(report))
    if report["engines"]:
        console.print(_compiled(report["engines"]))
    console.print(f"{output} is built ({report['bytes'] / 1e6:.1f} MB, {report['seconds']:.0f} s).")


class _Bars:
    """A bar for each part of the build; it moves where a message says how many of how many."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[what]}"))
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        # Steps take minutes: a speed is an average over the last hour.
        self.progress = Progress(*columns, *times, console=console, transient=True, speed_estimate_period=3600)
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _Bars:
        self.progress.start()
        return self

    def show(self, part: str, what: str) -> None:
        """Show what is being done for a part; the parts before it are done."""
        if part not in self.tasks:
            for task in self.tasks.values():
                self.progress.update(task, total=1, completed=1, what="done")
                self.progress.stop_task(task)
            self.tasks[part] = self.progress.add_task(part, total=None, what="")
        counted = re.search(r"(\d+) of (\d+)", what)
        if counted:
            number, total = map(int, counted.groups())
            self.progress.update(self.tasks[part], total=total, completed=number - 1)
        self.progress.update(self.tasks[part], what=what)

    def __exit__(self, *_: object) -> None:
        self.progress.stop()


def _planned(sizes: dict[str, dict[str, int]]) -> Table:
    from rich.table import Table

    table = Table(title="What would be built")
    table.add_column("part")
    for column in ("16-bit checkpoint", "quantized language model", "vision part", "cache"):
        table.add_column(column, justify="right")
    for part, size in sizes.items():
        table.add_row(part, *(f"{size[key] / 1e6:,.2f} MB" for key in ("checkpoint", "language", "vision", "kv_cache")))
    return table


def _built(report: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title=f"Quantized: {report['quant']}, LM head {report['lm_head']}")
    table.add_column("against the 16-bit model, held-out pages")
    parts = report["parts"].values()
    for name in report["parts"]:
        table.add_column(name, justify="right")
    accuracy = [part.get("accuracy", {}) for part in parts]
    for key, what in (("language", "language model"), ("vision", "vision part, 16 bit")):
        table.add_row(what, *(f"{part['bytes'][key] / 1e6:.2f} MB" for part in parts))
    table.add_row("same next token", *(_percent(found.get("next_token_agreement")) for found in accuracy))
    table.add_row("KL divergence, nats", *(f"{found['kl']:.5f}" if "kl" in found else "-" for found in accuracy))
    table.add_row("character error rate, 16 bit", *(_percent(found.get("cer_float")) for found in accuracy))
    table.add_row("character error rate, quantized", *(_percent(found.get("cer_quantized")) for found in accuracy))
    never = [part["experts_never_reached"]["count"] for part in parts]
    if any(never):
        table.add_row("experts calibration never reached, without AWQ", *(f"{count:,}" for count in never))
    fewest = [[min(counts) for counts in part["expert_tokens"].values()] for part in parts]
    table.add_row("fewest calibration tokens of an expert", *(f"{min(n):,}" if n else "-" for n in fewest))
    return table


def _compiled(engines: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(title="Engines, each graph checked with onnxruntime")
    table.add_column("part")
    for column in ("graphs", "ONNX", "engines", "seconds", "largest difference"):
        table.add_column(column, justify="right")
    for part in dict.fromkeys(engine["part"] for engine in engines):
        rows = [engine for engine in engines if engine["part"] == part]
        table.add_row(
            part,
            str(len(rows)),
            *(f"{sum(row[key] for row in rows) / 1e6:.2f} MB" for key in ("onnx_bytes", "engine_bytes")),
            f"{sum(row['seconds'] for row in rows):.1f}",
            f"{max(row['rel_l2'] for row in rows):.1e}",
        )
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}%"
