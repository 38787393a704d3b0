"""Latents in 8 bits: a code a value and a scale a position, and what is read of them."""

import torch
from torch import Tensor

LARGEST_CODE = 127
LEAST_SCALE = 2.0**-24  # the least positive half: what a row of zeros gets
MOST_SCALE = 515.5  # 127 times the next half up is infinite


def quantize_latent(latent: Tensor) -> tuple[Tensor, Tensor]:
    """latent [..., rank], within a half's range -> codes int8 [..., rank] and scales half [...], positive.

    A scale is amax / 127, rounded up to a half, so that no code is cut off; a code is latent / scale to nearest even, both in
    float32. Then |latent - code * scale| <= scale / 2 (up to the rounding of that product). Nothing crosses positions, and
    every step is exact or rounded as IEEE 754 says, so the kernels (`plugins/mla_attention/latent.cuh`) make the same bits.

    The scale is a half, because a code times a half, rounded to half, is one instruction for two values; and two bytes less.
    """
    wide = latent.float()
    # A product: some devices divide by a number as they please.
    wanted = (wide.abs().amax(-1) * (1 / LARGEST_CODE)).clamp(LEAST_SCALE, MOST_SCALE)
    scales = wanted.half()
    # The next half up is the next integer, for positive ones.
    scales = (scales.view(torch.int16) + (scales.float() < wanted).to(torch.int16)).view(torch.half)
    return (wide / scales.float().unsqueeze(-1)).round().to(torch.int8), scales


def dequantize_latent(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What attention reads of codes int8 [..., rank] and scales half [...]: half(code * scale), given as `dtype`."""
    return codes.half().mul_(scales.unsqueeze(-1)).to(dtype)
