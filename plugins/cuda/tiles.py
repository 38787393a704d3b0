"""Weights in the order the tensor cores read them (include/tiles.cuh): tiles of 16 outputs by 64 inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from trtvlm.plugins.int4_linear import packing

ROWS, INPUTS = 16, 64


def _order(weight: Tensor) -> Tensor:
    """[..., out, in] -> [..., out / 16, in / 64, step 4, lane 32, register 4, half 2]: what lane's register holds.

    Lane (g, t), step j: registers hold (row g, k), (row g + 8, k), (row g, k + 2), (row g + 8, k + 2) with
    k = 16t + 4j, two inputs each. ValueError if the sizes are no multiples of 16 and 64.
    """
    out, inputs = weight.shape[-2:]
    if out % ROWS or inputs % INPUTS:
        raise ValueError(f"a weight of {out} x {inputs} does not divide into tiles of {ROWS} x {INPUTS}")
    lead = weight.shape[:-2]
    # Dimensions: tile, row half (2), g (8), group, t (4), step (4), input pair (2), half (2)
    cut = weight.reshape(*lead, out // ROWS, 2, 8, inputs // INPUTS, 4, 4, 2, 2)
    n = len(lead)
    order = [*range(n), *(n + d for d in (0, 3, 5, 2, 4, 6, 1, 7))]
    return cut.permute(order).reshape(*lead, out // ROWS, inputs // INPUTS, 4, 32, 4, 2)


def int4_tiles(packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Repack an INT4 weight for the kernels.

    packed int8 [..., out / 2, in] and scales [..., out, in / 64], as the checkpoint has them -> codes int32
    [..., out / 16, in / 64, 32, 4] (one 16-byte word a lane and tile) and scales float16 [..., out / 16, in / 64, 8, 2]
    (rows g and g + 8 side by side).
    """
    codes = _order(packing.unpack(packed).to(torch.int32) + 8)  # [..., step, lane, register, half]
    # Register r's first half is nibble r, its second nibble r + 4: what int4_to_halves takes apart.
    shifts = torch.tensor([[4 * r, 4 * r + 16] for r in range(4)], dtype=torch.int32, device=codes.device)
    words = (codes << shifts).sum((-1, -2), dtype=torch.int64)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    groups = scales.reshape(*scales.shape[:-2], -1, 2, 8, scales.shape[-1])
    return words.transpose(-1, -2).contiguous(), groups.permute(*_lead(groups, 4), -4, -1, -2, -3).half().contiguous()


def half_tiles(weight: Tensor) -> Tensor:
    """Repack a float weight [..., out, in] -> float16 [..., out / 16, in / 64, 4 steps, 32 lanes, 8]."""
    return _order(weight.half()).flatten(-2).contiguous()


def half_rows(tiles: Tensor) -> Tensor:
    """`half_tiles` undone: float16 [..., out / 16, in / 64, 4, 32, 8] -> [..., out, in], contiguous."""
    *lead, outputs, inputs = tiles.shape[:-3]
    # Two halves of a row stay together: one word.
    words = tiles.contiguous().view(torch.int32).view(*lead, outputs, inputs, 4, 8, 4, 2, 2)
    n = len(lead)
    order = [*range(n), *(n + d for d in (0, 6, 3, 1, 4, 2, 5))]
    return words.permute(order).reshape(*lead, ROWS * outputs, INPUTS * inputs // 2).view(torch.half)


def _lead(tensor: Tensor, trailing: int) -> range:
    return range(tensor.dim() - trailing)
