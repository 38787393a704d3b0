"""What comes before the first token, measured on the current GPU with random weights: prompts and images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trtvlm.model.cache import KVCache
from trtvlm.model.cache_kind import CacheKind
from trtvlm.model.config import LanguageConfig, ProjectorConfig, VisionConfig
from trtvlm.model.vision import Projector, VisionTower
from trtvlm.plugins.random_checkpoint import RandomCheckpoint
from trtvlm.runtime.cuda.decode import DecodeProgram
from trtvlm.runtime.cuda.measure import Clock, CudaClock, Spread
from trtvlm.runtime.cuda.prefill import CHUNK, Prefill, head_of
from trtvlm.runtime.cuda.vision import VisionProgram
from trtvlm.runtime.cuda.weights import LanguageWeights, load_weights

REPEATS, WARMUP = 12, 3


@torch.inference_mode()
def measure_prefill(
    config: LanguageConfig,
    lengths: Sequence[int],
    weights: LanguageWeights | None = None,
    chunk: int = CHUNK,
    repeats: int = REPEATS,
    clock: Clock | None = None,
    kv_cache: CacheKind = "fp16",
) -> list[dict[str, Any]]:
    """Prompts of `lengths` tokens into an empty cache, up to the logits of the last one; random weights unless there are some.

    Of each {"tokens", "ms": percentiles, "tokens_a_second", "peak": bytes besides weights and cache}. ValueError: a length
    past the model's positions.
    """
    weights = weights or load_weights(RandomCheckpoint(config))
    device = weights.embedding.device
    most = min(max(lengths), config.max_position_embeddings)
    cache = KVCache(config, 1, -(-most // 64) * 64, torch.half, device, kv_cache)
    prefill, program = Prefill(weights, cache, chunk), DecodeProgram(weights, cache, 1)
    found = []
    for length in lengths:
        if length > config.max_position_embeddings:
            raise ValueError(f"{length} tokens are more than the model's {config.max_position_embeddings} positions")
        ids = torch.randint(config.vocab_size, (length,), generator=torch.Generator().manual_seed(length))
        embeds = weights.embedding[ids.to(device)]

        def once(embeds: Tensor = embeds) -> None:
            cache.rollback(0)
            head_of(program, prefill.run(embeds))

        entry, spread = _timed(once, repeats, device, clock)
        found.append({"tokens": length, "tokens_a_second": round(1e3 * length / spread.p50), **entry})
    return found


@torch.inference_mode()
def measure_vision(
    vision: VisionConfig,
    projector: ProjectorConfig,
    tiles: Sequence[int],
    device: torch.device | str = "cuda",
    repeats: int = REPEATS,
    clock: Clock | None = None,
) -> list[dict[str, Any]]:
    """Images of `tiles` views through tower and projector of random weights in half: as `measure_prefill`, "tiles" for tokens."""
    torch.manual_seed(0)
    with torch.device(device):
        parts = VisionTower(vision).half(), Projector(projector).half()
    program, size = VisionProgram(*parts, device), vision.image_size
    found = []
    for views in tiles:
        pixels = torch.rand(views, 3, size, size, device=device).half() * 2 - 1

        def once(pixels: Tensor = pixels) -> None:
            program.encode(pixels)

        entry, spread = _timed(once, repeats, torch.device(device), clock)
        found.append({"tiles": views, "tiles_a_second": round(1e3 * views / spread.p50, 1), **entry})
    return found


def _timed(
    once: Callable[[], None], repeats: int, device: torch.device, clock: Clock | None
) -> tuple[dict[str, Any], Spread]:
    """Times from an idle device to the result, host work included, and the bytes allocated meanwhile."""
    clock = clock or CudaClock()
    on_gpu = device.type == "cuda"
    for _ in range(WARMUP):
        once()
    clock.wait()
    before = 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    times = []
    for _ in range(repeats):
        start = clock.mark()
        once()
        end = clock.mark()
        clock.wait()
        times.append(clock.between(start, end))
    spread = Spread.of(times)
    entry: dict[str, Any] = {"ms": spread.to_dict()}
    if on_gpu:
        entry["peak"] = torch.cuda.max_memory_allocated() - before
    return entry, spread
