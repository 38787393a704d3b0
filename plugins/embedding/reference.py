"""What `embed` means."""

import torch
from torch import Tensor

SUM_WIDTH = 16
"""Residual values that one sum of squares is over."""


def embed(tokens: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Residual float32 [M, hidden] of tokens int [M] and table [V, hidden], and its sums of squares [M, hidden / 16].

    Tokens outside the table read its first or last row.
    """
    residual = table[tokens.long().clamp(0, len(table) - 1)].float()
    return residual, residual.square().unflatten(-1, (-1, SUM_WIDTH)).sum(-1)


def choose(values: Tensor, candidates: Tensor) -> Tensor:
    """The most likely tokens int32 [M] of the head's candidates: values float32 and tokens int32 [M, blocks].

    The smaller of equal ones.
    """
    best = values == values.amax(-1, keepdim=True)
    return torch.where(best, candidates, torch.iinfo(torch.int32).max).amin(-1).int()
