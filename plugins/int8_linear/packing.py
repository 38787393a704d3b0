"""INT8 weights: symmetric codes -127..127 and one scale an output row."""

import torch
from torch import Tensor

HIGHEST = 127
"""-128 is not used, so that a row and its negative quantize alike."""


def row_scales(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Amax / 127 of every row of weight [..., out, in] -> float32 [..., out], rounded to `dtype`; 1 for zero rows."""
    scales = (weight.float().abs().amax(-1) / HIGHEST).to(dtype).float()
    return torch.where(scales > 0, scales, 1.0)


def quantize_int8(weight: Tensor, scales: Tensor) -> Tensor:
    """Nearest codes int8 of weight [..., out, in] under scales [..., out]."""
    return (weight.float() / scales.float().unsqueeze(-1)).round().clamp(-HIGHEST, HIGHEST).to(torch.int8)


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """Float32 weight [..., out, in] = code * scale of its row."""
    return codes.float() * scales.float().unsqueeze(-1)
