"""The layer that stands where a float linear layer stood."""

from typing import cast

import torch
from torch import Tensor, nn

from trtvlm.plugins.int4_linear import packing
from trtvlm.plugins.int4_linear.op import int4_linear


class Int4Linear(nn.Module):
    """A bias-free linear layer over a packed INT4 weight; buffers as the checkpoint has them.

    weight int8 [out / 2, in], scales [out, in / group], pre_quant_scale [in] or none.
    """

    weight: Tensor
    scales: Tensor
    pre_quant_scale: Tensor | None

    def __init__(self, weight: Tensor, scales: Tensor, pre_quant_scale: Tensor | None = None) -> None:
        super().__init__()
        if scales.shape[0] != 2 * weight.shape[0]:
            raise ValueError(f"{scales.shape[0]} rows of scales for a packed weight of {2 * weight.shape[0]} outputs")
        self.register_buffer("weight", weight.view(torch.int8))
        self.register_buffer("scales", scales)
        self.register_buffer("pre_quant_scale", pre_quant_scale)
        self.in_features, self.out_features = weight.shape[1], scales.shape[0]

    @classmethod
    def from_float(cls, weight: Tensor, group: int = packing.GROUP_SIZE) -> "Int4Linear":
        """Round a float weight [out, in] to nearest, without calibration."""
        scales = packing.group_scales(weight, group)
        return cls(packing.pack(packing.quantize_int4(weight, scales)), scales)

    def forward(self, x: Tensor) -> Tensor:
        """X [..., in] -> [..., out] in x's dtype."""
        return cast(Tensor, int4_linear(x, self.weight, self.scales, self.pre_quant_scale))

    def dequantized(self) -> Tensor:
        """The float32 weight [out, in] that x itself is multiplied by, pre_quant_scale folded in."""
        return packing.dequantize(self.weight, self.scales, self.pre_quant_scale)

    def extra_repr(self) -> str:
        """Sizes and the group."""
        return f"{self.in_features}, {self.out_features}, group={self.in_features // self.scales.shape[1]}"
