"""Write a checkpoint of random weights in the official layout, of any size: bfloat16 shards, an index, a tokenizer.

    python -m trtvlm.scripts.make_random_checkpoint FOLDER [--size deepseek-vl2-small] [--layers N] [--on-demand]

Every tensor comes from the seed and its own name, so the same call gives the same bytes. Shards are written piece by piece
in processes of their own; none holds more than PIECE bytes. With --on-demand there are no shards: a file says the seed, and
whoever reads the folder makes each tensor when it is asked for, with the values that the shards would have.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import torch

from trtvlm.builder.stream import SafetensorsWriter, Spec, nbytes
from trtvlm.model.artifacts import PROCESSOR_FILES, write_json
from trtvlm.model.checkpoint import INDEX, resolve_model
from trtvlm.model.config import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from trtvlm.model.presets import PRESETS, preset
from trtvlm.model.random_weights import RANDOM, RandomWeights

SHARD = 4_000_000_000
PIECE = 64_000_000
MID = "mid"


def mid_size() -> ModelConfig:
    """A model between nano and the official ones: every kind of layer, 16 experts, 8 million weights a layer."""
    language = LanguageConfig(
        vocab_size=2048, hidden_size=512, intermediate_size=1024, moe_intermediate_size=256, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=8, n_shared_experts=2, n_routed_experts=16, num_experts_per_tok=3,
        first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32,
        v_head_dim=64, scoring_func="sigmoid", topk_method="noaux_tc", norm_topk_prob=True, routed_scaling_factor=2.0,
        n_group=1, topk_group=1, max_position_embeddings=4096, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return ModelConfig(
        vision=VisionConfig(image_size=128, patch_size=16, width=128, layers=2, heads=2, mlp_ratio=2.0),
        projector=ProjectorConfig(input_dim=128, n_embed=512),
        language=language,
        candidate_resolutions=tuple((128 * w, 128 * h) for w in range(1, 5) for h in range(1, 5)),
    )


def size_of(name: str, layers: int | None = None) -> ModelConfig:
    """The configuration of an official size or "mid", with its first `layers` decoder layers."""
    config = mid_size() if name == MID else preset(name)
    if layers is None:
        return config
    return dataclasses.replace(config, language=dataclasses.replace(config.language, num_hidden_layers=layers))


def write_random_checkpoint(
    folder: Path,
    config: ModelConfig,
    seed: int = 0,
    on_demand: bool = False,
    shard: int = SHARD,
    processes: int | None = None,
) -> int:
    """Write the checkpoint and return the bytes of its tensors. What an unfinished call wrote is written again."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config.to_dict())
    _write_processor(folder, config)
    weights = RandomWeights(config, seed, threads=1)
    sizes = {name: nbytes((torch.bfloat16, shape)) for name, shape in weights.shapes.items()}
    if on_demand:
        write_json(folder / RANDOM, {"seed": seed})
        return sum(sizes.values())
    shards = _split(sizes, shard)
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    jobs = [(folder / name, config, seed, tensors) for name, tensors in zip(names, shards, strict=True)]
    workers = min(len(jobs), processes or os.cpu_count() or 1)
    if workers == 1:
        for job in jobs:
            _write_shard(*job)
    else:
        # Processes of their own, not forks: a fork of a process with threads may hang.
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            pool.starmap(_write_shard, jobs, chunksize=1)
    weight_map = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
    write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
    return sum(sizes.values())


def _split(sizes: dict[str, int], most: int) -> list[list[str]]:
    """Tensors by shard, in the model's order, each shard at most `most` bytes unless a single tensor is larger."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_shard(path: Path, config: ModelConfig, seed: int, names: list[str]) -> None:
    weights = RandomWeights(config, seed, threads=1)
    layout: dict[str, Spec] = {name: (torch.bfloat16, weights.shapes[name]) for name in names}
    with SafetensorsWriter(path, layout) as writer:
        for name in names:
            rows, row = layout[name][1][0], nbytes((torch.bfloat16, layout[name][1][1:]))
            step = max(1, PIECE // row)
            for start in range(0, rows, step):
                writer.write_rows(name, start, weights.rows(name, start, min(rows, start + step)))


def _write_processor(folder: Path, config: ModelConfig) -> None:
    """The bundled tokenizer, whose ids every official vocabulary has room for, and this model's way to cut images."""
    source = resolve_model("nano")
    for name in PROCESSOR_FILES:
        shutil.copyfile(source / name, folder / name)
    raw = json.loads((source / "processor_config.json").read_text(encoding="utf-8"))
    raw |= {
        "candidate_resolutions": [list(size) for size in config.candidate_resolutions],
        "patch_size": config.vision.patch_size,
        "downsample_ratio": config.projector.downsample_ratio,
    }
    write_json(folder / "processor_config.json", raw)


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=[*PRESETS, MID], default="deepseek-vl2-small")
    parser.add_argument("--layers", type=int, help="only the first so many decoder layers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--on-demand", action="store_true", help="write no shards; tensors are made as they are read")
    parser.add_argument("--shard-bytes", type=int, default=SHARD)
    parser.add_argument("--processes", type=int, help="by default one for each core")
    options = parser.parse_args()
    began = time.monotonic()
    written = write_random_checkpoint(
        options.folder,
        size_of(options.size, options.layers),
        options.seed,
        options.on_demand,
        options.shard_bytes,
        options.processes,
    )
    print(f"{options.folder}: {written / 1e9:.2f} GB of random tensors in {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
