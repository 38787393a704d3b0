"""INT4 weights as bytes: the checkpoint layout of TensorRT-LLM and ModelOpt, ONNX's layout, and their inverses.

Codes are signed, -8..7, symmetric, without a zero point. All functions take any number of leading dimensions (experts).
"""

import torch
from torch import Tensor

GROUP_SIZE = 64
"""Inputs that share a scale. 64 divides every quantized dimension of the DeepSeek-VL2 models; 128 does not."""

LOWEST, HIGHEST = -8, 7


def group_scales(weight: Tensor, group: int = GROUP_SIZE, dtype: torch.dtype = torch.float32) -> Tensor:
    """Round-to-nearest scales amax / 7 of weight [..., out, in] -> float32 [..., out, in / group].

    Rounded to `dtype`, the one the engine computes in, so that codes made with them fit what the engine multiplies by.
    A group of zeros gets a scale of 1. ValueError if `group` does not divide `in`.
    """
    if weight.shape[-1] % group:
        raise ValueError(f"groups of {group} do not divide {weight.shape[-1]} inputs")
    amax = weight.float().reshape(*weight.shape[:-1], -1, group).abs().amax(-1)
    scales = (amax / HIGHEST).to(dtype).float()
    return torch.where(scales > 0, scales, 1.0)


def quantize_int4(weight: Tensor, scales: Tensor) -> Tensor:
    """Nearest codes (ties to even) of weight [..., out, in] under scales [..., out, groups] -> int8 of weight's shape.

    ValueError if the groups do not divide `in`.
    """
    codes = (weight.float() / _spread(scales, weight.shape[-1])).round()
    return codes.clamp(LOWEST, HIGHEST).to(torch.int8)


def pack(codes: Tensor) -> Tensor:
    """Codes int8 [..., out, in] -> int8 [..., out / 2, in]: row 2r in the low nibble of byte row r, 2r + 1 in the high.

    int8 and not uint8, because TensorRT-LLM's loader looks for int8. ValueError if `out` is odd or a code is outside
    -8..7.
    """
    if codes.shape[-2] % 2:
        raise ValueError(f"INT4 rows are packed in pairs, but there are {codes.shape[-2]}")
    return _join(codes[..., 0::2, :], codes[..., 1::2, :]).view(torch.int8)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`: int8 or uint8 [..., out / 2, in] -> codes int8 [..., out, in]."""
    low, high = _split(packed.view(torch.int8))
    return torch.stack((low, high), dim=-2).flatten(-3, -2)


def dequantize(packed: Tensor, scales: Tensor, pre_quant_scale: Tensor | None = None) -> Tensor:
    """The float32 weight [..., out, in] that x is multiplied by: code * scale * pre_quant_scale of the input channel.

    packed int8 or uint8 [..., out / 2, in], scales [..., out, groups], pre_quant_scale [..., in] (AWQ multiplies the
    activation by it; folding it into the weight is the same product).
    """
    codes = unpack(packed)
    weight = codes.float() * _spread(scales, codes.shape[-1])
    return weight if pre_quant_scale is None else weight * pre_quant_scale.float().unsqueeze(-2)


def pack_onnx(codes: Tensor) -> Tensor:
    """Codes int8 [..., in] -> uint8 [..., in / 2], ONNX's INT4: pairs along the last axis, first in the low nibble.

    ValueError if `in` is odd or a code is outside -8..7.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"ONNX packs INT4 in pairs along the last axis, which has {codes.shape[-1]}")
    return _join(codes[..., 0::2], codes[..., 1::2])


def unpack_onnx(packed: Tensor) -> Tensor:
    """The inverse of `pack_onnx`: uint8 [..., in / 2] -> codes int8 [..., in]."""
    low, high = _split(packed.view(torch.int8))
    return torch.stack((low, high), dim=-1).flatten(-2)


def _spread(scales: Tensor, inputs: int) -> Tensor:
    """Scales [..., groups] -> float32 [..., inputs], each repeated over its group."""
    groups = scales.shape[-1]
    if groups == 0 or inputs % groups:
        raise ValueError(f"{groups} scales do not divide {inputs} inputs")
    return scales.float().repeat_interleave(inputs // groups, dim=-1)


def _join(low: Tensor, high: Tensor) -> Tensor:
    for half in (low, high):
        if half.numel() and (int(half.min()) < LOWEST or int(half.max()) > HIGHEST):
            raise ValueError(f"INT4 codes must be in {LOWEST}..{HIGHEST}")
    return (low.to(torch.int16) & 0xF | (high.to(torch.int16) & 0xF) << 4).to(torch.uint8)


def _split(packed: Tensor) -> tuple[Tensor, Tensor]:
    # Arithmetic shifts of int8 extend the sign, which is what two's complement nibbles need.
    return (packed << 4) >> 4, packed >> 4
