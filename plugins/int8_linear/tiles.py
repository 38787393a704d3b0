"""INT8 weights in the order the tensor cores read them: tiles of 16 outputs by 64 inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from trtvlm.plugins.cuda.tiles import INPUTS, ROWS


def int8_tiles(codes: Tensor) -> Tensor:
    """Repack codes int8 [out, in] -> uint8 [out / 16, in / 64, 2, 32 lanes, 16], stored + 128.

    Lane (g, t) has inputs 16t .. 16t + 15 of rows g and g + 8: four of the one, four of the other, in turns. ValueError if
    the sizes are no multiples of 16 and 64.
    """
    outputs, inputs = codes.shape
    if outputs % ROWS or inputs % INPUTS:
        raise ValueError(f"a weight of {outputs} x {inputs} does not divide into tiles of {ROWS} x {INPUTS}")
    # tile, row half (2), g (8), group, t (4), step pair (2), step (2), input (4)
    cut = (codes.to(torch.int16) + 128).to(torch.uint8).view(outputs // ROWS, 2, 8, inputs // INPUTS, 4, 2, 2, 4)
    ordered = cut.permute(0, 3, 5, 2, 4, 6, 1, 7)
    return ordered.reshape(outputs // ROWS, inputs // INPUTS, 2, 32, 16).contiguous()
