"""`int4_linear` on the device: the decoding kernel for few rows, the one of a prompt for more."""

from __future__ import annotations

import torch
from torch import Tensor

from trtvlm.plugins.cuda.repacked import Repacked
from trtvlm.plugins.cuda.tiles import INPUTS, ROWS, int4_tiles
from trtvlm.plugins.int4_linear import decode, gemm
from trtvlm.plugins.int4_linear.decode import MOST_ROWS, LinearWeight

"""Rows up to which the decoding kernels are used: a row's bits do not depend on how many there are."""


def _pack(packed: Tensor, scales: Tensor, pre_quant_scale: Tensor | None) -> LinearWeight:
    return LinearWeight(*int4_tiles(packed, scales), half(pre_quant_scale))


_weights = Repacked(_pack)


def supports(x: Tensor, packed: Tensor, scales: Tensor) -> bool:
    """Whether the kernels take these: halves, groups of 64 inputs, whole tiles of 16 outputs."""
    outputs, groups = scales.shape
    inputs = packed.shape[1]
    return x.dtype == torch.half and inputs == INPUTS * groups and inputs > 0 and outputs % ROWS == 0 and outputs > 0


def int4_linear(x: Tensor, packed: Tensor, scales: Tensor, pre_quant_scale: Tensor | None = None) -> Tensor:
    """`reference.int4_linear` of what `supports` allows; sums are float32, and scales are not rounded into the weight."""
    weight = _weights(packed, scales, pre_quant_scale)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    rows = flat.shape[0]
    out = x.new_empty(rows, scales.shape[0])
    if rows > MOST_ROWS:
        assert weight.codes is not None
        assert weight.scales is not None
        gemm.gemm(flat, weight.codes, weight.scales, out, weight.pre_quant_scale)
    elif rows:
        decode.linear(flat, weight, out, rows)
    return out.view(*x.shape[:-1], scales.shape[0])


def half(tensor: Tensor | None) -> Tensor | None:
    """A vector as contiguous halves."""
    return None if tensor is None else tensor.half().contiguous()
