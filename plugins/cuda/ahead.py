"""Weights to bring into L2 ahead of the launches that read them: as much as the cache has room for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

# Of the cache; the rest is for what the launches in between read and write.
SHARE = 0.35
BLOCKS = 96
MOST = 4

Ahead = tuple[Tensor | int | None, ...]


def ahead(weights: Sequence[Tensor | None]) -> Ahead:
    """Kernel arguments (start, bytes) of up to MOST weights, cut where the share of the cache is used up."""
    left = int(SHARE * l2_bytes())
    out: list[Tensor | int | None] = []
    for weight in [weight for weight in weights if weight is not None][:MOST]:
        size = min(left, weight.numel() * weight.element_size())
        left -= size
        out += [weight, size]
    return (*out, *[None, 0] * (MOST - len(out) // 2))


@lru_cache
def l2_bytes() -> int:
    """Size of the current device's L2 cache."""
    size: int = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return size
