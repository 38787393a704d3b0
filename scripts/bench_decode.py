"""Time the decode steps of the official sizes on a GPU, with random INT4 weights and an INT8 head.

    python -m trtvlm.scripts.bench_decode deepseek-vl2-small --output benchmarks/decode-small.json

Batch 1 at a context of 1,024: the median of CUDA graph replays of whole steps of 1, 4 and 8 rows, and the mean time of each
kernel (by the profiler, outside a graph), with how often a step launches it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch

from trtvlm.model.cache import KVCache
from trtvlm.model.sizes import language_size
from trtvlm.plugins.cuda.timing import time_graph
from trtvlm.plugins.random_checkpoint import RandomCheckpoint
from trtvlm.runtime.cuda.decode import DecodeProgram
from trtvlm.runtime.cuda.weights import load_weights

CONTEXT, POSITIONS, SPAN = 1024, 1152, 1088
PROFILED = 3


def measure(program: DecodeProgram, tokens: torch.Tensor, rows: int) -> dict[str, Any]:
    """One width: microseconds a step, and of each kernel its mean time and launches a step."""
    from torch.profiler import ProfilerActivity, profile

    cursor = torch.full((1,), CONTEXT, dtype=torch.int32, device=tokens.device)

    def step() -> None:
        program.launch(tokens[:rows], cursor, rows, SPAN)

    found: dict[str, Any] = {"rows": rows, "us": round(time_graph([step], 30), 1)}
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(PROFILED):
            step()
        torch.cuda.synchronize()
    found["kernels"] = {
        event.key: {"us": round(event.device_time_total / event.count, 2), "launches": event.count // PROFILED}
        for event in profiled.key_averages()
        if event.device_time_total > 0 and event.count >= PROFILED
    }
    return found


@click.command()
@click.argument("models", nargs=-1)
@click.option("--lm-head", type=click.Choice(["int8", "fp16", "int4"]), default="int8", show_default=True)
@click.option("--fetch-ahead/--no-fetch-ahead", default=True, show_default=True, help="Bring weights into L2 ahead.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the figures here, as JSON.")
def main(models: tuple[str, ...], lm_head: str, fetch_ahead: bool, output: Path | None) -> None:
    """Run as a script."""
    record: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "context": CONTEXT, "lm_head": lm_head,
        "fetch_ahead": fetch_ahead, "models": {},
    }  # fmt: skip
    for name in models or ("deepseek-vl2-tiny", "deepseek-vl2-small", "deepseek-vl2"):
        config = language_size(name)
        weights = load_weights(RandomCheckpoint(config, "int4", lm_head))  # type: ignore[arg-type]
        cache = KVCache(config, 1, POSITIONS, torch.half, "cuda")
        program = DecodeProgram(weights, cache, 8, fetch_ahead)
        program.residual.normal_()
        tokens = torch.randint(0, config.vocab_size, (8,), device="cuda").int()
        record["models"][name] = [measure(program, tokens, rows) for rows in (1, 4, 8)]
        print(name, json.dumps(record["models"][name]), flush=True)
        del program, weights
        torch.cuda.empty_cache()
    if output is not None:
        output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
