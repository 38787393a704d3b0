"""Weights to bring into L2 ahead of the launches that read them: as much as the cache has room for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

# Of the cache; the rest is for what the launches in between read and write.
SHARE = 0.35


@dataclass(frozen=True)
class Ahead:
    """Weights in the order they will be read: pieces int64 [count, 2] on the device, each a start and a number of bytes."""

    pieces: Tensor | None = None
    count: int = 0


NOTHING = Ahead()


def ahead(weights: Sequence[Tensor | None]) -> Ahead:
    """The weights, which must outlive it, cut where the share of the cache is used up."""
    left = int(SHARE * l2_bytes())
    pieces = []
    for weight in [weight for weight in weights if weight is not None]:
        size = min(left, weight.numel() * weight.element_size())
        if size:
            left -= size
            pieces.append((weight.data_ptr(), size))
    return Ahead(torch.tensor(pieces, dtype=torch.int64, device="cuda"), len(pieces)) if pieces else NOTHING


@lru_cache
def l2_bytes() -> int:
    """Size of the current device's L2 cache."""
    size: int = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return size
