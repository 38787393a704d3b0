"""Bytes that one decode step moves between the GPU's memory and its chip, by part of the model."""

from __future__ import annotations

from trtvlm.builder.planner.parts import LANGUAGE, part_of
from trtvlm.model.cache_kind import CacheKind
from trtvlm.model.config import LanguageConfig
from trtvlm.plugins.quantized_checkpoint import Kind
from trtvlm.plugins.step_bytes import CACHE, moved_bytes


def step_bytes(
    config: LanguageConfig, kind: Kind, lm_head: Kind, rows: int, context: int, kv_cache: CacheKind = "fp16"
) -> dict[str, float]:
    """`trtvlm.plugins.step_bytes.moved_bytes`, added up by part; the cache is one of them."""
    found: dict[str, float] = dict.fromkeys(LANGUAGE, 0)
    for name, size in moved_bytes(config, kind, lm_head, rows, context, kv_cache).items():
        part = name if name == CACHE else part_of(config, name)
        found[part] = found.get(part, 0) + size
    return found
