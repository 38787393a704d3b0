"""Export, check and compile every kind of graph of the official sizes, each in a process of its own, and measure it.

    python -m trtvlm.scripts.bench_engines --output benchmarks/engines-cpu.json
    python -m trtvlm.scripts.bench_engines deepseek-vl2-small --kind vision

Weights are random, in the quantized checkpoint's types (INT4, INT8 head): a dense layer and one with experts have every kind
of segment there is. Of each kind: seconds by the clock and of CPU (what counts on a busy machine) of export, of the comparison
with PyTorch through onnxruntime, and of compiling (nothing comes out of a cache); bytes; the largest difference; and the
process's memory at its peak, 0.5 GB of which is Python with its libraries. "chain" runs these layers' graphs and the operators
between them against the float32 model.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch

from trtvlm.model.config import LanguageConfig
from trtvlm.model.presets import PRESETS, preset

if TYPE_CHECKING:
    import onnx

    from trtvlm.model.vlm import DeepseekVL2

MAX_SEQ_LEN, MAX_WIDTH = 4096, 8
SEGMENTS = {
    "embed": "00_embed",
    "attention_in": "01_attention0_in",
    "dense": "02_attention0_out_attention1_in",
    "experts_in": "03_attention1_out_experts1_in",
    "attention_after_experts": "04_experts1_out_attention2_in",
    "head": "06_experts2_out_head",
}
"""Kinds and the segments that stand for them in a model of three layers, the first of them dense."""
KINDS = ("vision", *SEGMENTS, "chain")


def measure(size: str, kind: str, sm: int) -> dict[str, Any]:
    """One kind, in this process."""
    started = time.monotonic()
    record = _chain(size) if kind == "chain" else _graph(size, kind, sm)
    took = {"total_seconds": round(time.monotonic() - started, 1), "cpu_seconds": round(time.process_time(), 1)}
    return {"kind": kind, **record, **took, "peak_bytes": peak_bytes()}


def peak_bytes() -> int:
    """The most memory this process has had in RAM."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _graph(size: str, kind: str, sm: int) -> dict[str, Any]:
    from trtvlm.builder.engine_cache import EngineCache
    from trtvlm.builder.engines import build_graph, segment_job, vision_job
    from trtvlm.builder.finished_graphs import FinishedGraphs
    from trtvlm.builder.layers import PackedLayers
    from trtvlm.builder.reuse import SegmentExporter
    from trtvlm.plugins.random_checkpoint import RandomCheckpoint

    if kind == "vision":
        job = vision_job(random_vision(size))
    else:
        config = _shortened(size)
        chain, recipes = _cut(config)
        step = next(step for step in chain.engines() if step.name == SEGMENTS[kind])
        recipe = recipes[step.name]
        module = recipe.module(PackedLayers(RandomCheckpoint(config, device="cpu")))
        job = segment_job(chain, step, recipe.kind, module, SegmentExporter())
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        return build_graph(job, sm, FinishedGraphs(place / "graphs", ""), EngineCache(place / "cache", limit=0))


def _chain(size: str) -> dict[str, Any]:
    from trtvlm.builder.check_chain import check_chain
    from trtvlm.builder.engines import segment_job
    from trtvlm.builder.layers import FloatLayers, PackedLayers
    from trtvlm.builder.reuse import SegmentExporter
    from trtvlm.plugins.random_checkpoint import RandomCheckpoint

    config = _shortened(size)
    weights, exporter = RandomCheckpoint(config, device="cpu"), SegmentExporter()
    chain, recipes = _cut(config)
    packed, steps = PackedLayers(weights), {step.name: step for step in chain.engines()}

    def graph(name: str) -> onnx.ModelProto:
        return segment_job(chain, steps[name], recipes[name].kind, recipes[name].module(packed), exporter).export()

    found = check_chain(size, chain, graph, packed, FloatLayers(weights))
    return {"layers": config.num_hidden_layers, **dataclasses.asdict(found)}


def random_vision(size: str) -> DeepseekVL2:
    """The vision part of an official size in float16, random: products keep the size of their inputs."""
    from trtvlm.model.random_weights import RandomWeights
    from trtvlm.model.vlm import DeepseekVL2

    config = preset(size)
    with torch.device("meta"):
        model = DeepseekVL2(config)
    model.language = torch.nn.Identity()  # type: ignore[assignment]
    model = model.half().to_empty(device="cpu")
    weights = RandomWeights(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.get(name))
    return model.eval().requires_grad_(False)


def _shortened(size: str) -> LanguageConfig:
    return dataclasses.replace(preset(size).language, num_hidden_layers=3)


def _cut(config: LanguageConfig) -> Any:
    from trtvlm.builder.cut import cut_config
    from trtvlm.plugins.quantized_checkpoint import layout

    names = layout(config, "int4", "int8")
    return cut_config(
        config, "int4", names, max_rows=min(MAX_SEQ_LEN, config.max_position_embeddings), max_width=MAX_WIDTH
    )


def _alone(size: str, kind: str, sm: int) -> dict[str, Any]:
    """`measure` in a process of its own; what went wrong is the record then."""
    command = [sys.executable, "-m", "trtvlm.scripts.bench_engines", size, "--kind", kind, "--sm", str(sm), "--here"]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if run.returncode:
        return {"kind": kind, "failed": (run.stderr.strip().splitlines() or [f"status {run.returncode}"])[-1]}
    record: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return record


@click.command()
@click.argument("sizes", nargs=-1)
@click.option("--kind", "kinds", multiple=True, type=click.Choice(KINDS), help="Only these.")
@click.option("--sm", type=int, default=86, show_default=True, help="Compute capability to compile for.")
@click.option("--here", is_flag=True, help="In this process: one size and one kind, as one line of JSON.")
@click.option(
    "--output", type=click.Path(path_type=Path), help="Write the figures here, as JSON; those there are kept."
)
def main(sizes: tuple[str, ...], kinds: tuple[str, ...], sm: int, here: bool, output: Path | None) -> None:
    """Run as a script."""
    if here:
        print(json.dumps(measure(sizes[0], kinds[0], sm)))
        return
    record: dict[str, Any] = {"models": {}}
    if output is not None and output.is_file():
        record = json.loads(output.read_text(encoding="utf-8"))
    record |= {"command": "python -m trtvlm.scripts.bench_engines", "sm": sm, "cores": os.cpu_count(),
               "threads": torch.get_num_threads(), "max_seq_len": MAX_SEQ_LEN, "max_width": MAX_WIDTH}  # fmt: skip
    for size in sizes or PRESETS:
        found = record["models"].setdefault(size, {})
        for kind in kinds or KINDS:
            found[kind] = _alone(size, kind, sm)
            print(size, json.dumps(found[kind]), flush=True)
            if output is not None:
                output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
