"""Time prompts and images on a GPU, with random weights of the official sizes (INT4 language model, vision part in half).

    python -m trtvlm.scripts.bench_prefill deepseek-vl2-small --output benchmarks/prefill.json

Prompts go into an empty cache, up to the logits of their last token; images through tower and projector, all views together.
Medians, host work included; memory is what is allocated besides weights and cache. `--check` also compares a prompt of three
layers with float32 over the same quantized weights, and exits with status 1 if they differ.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch

from trtvlm.model.cache import KVCache
from trtvlm.model.config import LanguageConfig
from trtvlm.model.presets import PRESETS, read_config
from trtvlm.plugins.random_checkpoint import RandomCheckpoint
from trtvlm.runtime.cuda.measure_prefill import measure_prefill, measure_vision
from trtvlm.runtime.cuda.prefill import CHUNK, Prefill
from trtvlm.runtime.cuda.reference import reference_model
from trtvlm.runtime.cuda.weights import load_weights

BOUND = 1e-2


@torch.inference_mode()
def check(config: LanguageConfig, lengths: tuple[int, ...], chunk: int, device: str = "cuda") -> list[dict[str, Any]]:
    """Of each length, the relative errors of the last token's logits and of the last layer's cache."""
    config = dataclasses.replace(config, num_hidden_layers=min(3, config.num_hidden_layers))
    checkpoint = RandomCheckpoint(config, device=device)
    weights, model = load_weights(checkpoint, device), reference_model(checkpoint, device)
    most = max(lengths)
    caches = [KVCache(config, 1, most, dtype, device) for dtype in (torch.half, torch.float32)]
    prefill = Prefill(weights, caches[0], chunk)
    ids = torch.randint(config.vocab_size, (most,), generator=torch.Generator().manual_seed(0)).to(device)
    found = []
    for length in lengths:
        for cache in caches:
            cache.rollback(0)
        last = prefill.run(weights.embedding[ids[:length]])
        logits = model.lm_head(model.model.norm(last))
        expected = model(model.model.embed_tokens(ids[:length]).unsqueeze(0), caches[1], last_only=True)[0, -1]
        held = [
            torch.cat([part[0, ..., :length, :].flatten() for part in vars(cache.layers[-1]).values()])
            for cache in caches
        ]
        row = {"tokens": length, "logits": _error(logits, expected), "cache": _error(*held)}
        found.append(row | {"ok": max(row["logits"], row["cache"]) < BOUND})
    return found


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(f"{float((found.double() - expected.double()).norm() / expected.double().norm()):.2e}")


def _rows(entries: list[dict[str, Any]], what: str) -> None:
    for entry in entries:
        rate, memory = entry[f"{what}_a_second"], entry.get("peak", 0) / 2**20
        print(
            f"  {entry[what]:>6} {what}: {entry['ms']['p50']:9.3f} ms  {rate:>10,} a second  {memory:8.1f} MiB",
            flush=True,
        )


@click.command()
@click.argument("models", nargs=-1)
@click.option("--length", "lengths", multiple=True, type=int, default=(256, 1024, 4096), show_default=True)
@click.option(
    "--chunk", type=click.IntRange(min=1), default=CHUNK, show_default=True, help="Rows of a prompt at a time."
)
@click.option(
    "--tiles", type=click.IntRange(min=0), default=10, show_default=True, help="Images of up to so many views; 0: none."
)
@click.option("--check/--no-check", "checked", default=False, show_default=True, help="Compare with float32 first.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the figures here, as JSON.")
def main(
    models: tuple[str, ...], lengths: tuple[int, ...], chunk: int, tiles: int, checked: bool, output: Path | None
) -> None:
    """Run as a script."""
    record: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "chunk": chunk, "models": {}
    }  # fmt: skip
    good = True
    for name in models or PRESETS:
        config = read_config(name)
        started = time.monotonic()
        entry: dict[str, Any] = {}
        print(name, flush=True)
        if checked:
            entry["check"] = check(config.language, (1, 7, 100, 700, chunk + 1, 2 * chunk + 3), chunk)
            good = good and all(row["ok"] for row in entry["check"])
            print("  check:", json.dumps(entry["check"]), flush=True)
            torch.cuda.empty_cache()
        most = config.language.max_position_embeddings
        entry["prefill"] = measure_prefill(config.language, [n for n in lengths if n <= most], chunk=chunk)
        _rows(entry["prefill"], "tokens")
        torch.cuda.empty_cache()
        vision = (config.vision, config.projector)
        same = next((other for other in record["models"].values() if other.get("vision_of") == repr(vision)), None)
        if tiles and same is None:
            entry |= {"vision": measure_vision(*vision, range(1, tiles + 1)), "vision_of": repr(vision)}
            _rows(entry["vision"], "tiles")
        torch.cuda.empty_cache()
        entry["seconds"] = round(time.monotonic() - started, 1)
        record["models"][name] = entry
    if output is not None:
        output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
