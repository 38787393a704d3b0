"""The layer that stands where a float linear layer stood."""

from typing import cast

import torch
from torch import Tensor, nn

from trtvlm.plugins.int8_linear import packing
from trtvlm.plugins.int8_linear.op import int8_linear


class Int8Linear(nn.Module):
    """A bias-free linear layer over INT8 weights; buffers weight int8 [out, in] and scales [out]."""

    weight: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, scales: Tensor) -> None:
        super().__init__()
        if weight.dtype != torch.int8 or scales.shape != weight.shape[:1]:
            raise ValueError(f"int8 weights {weight.dtype} {tuple(weight.shape)} with scales {tuple(scales.shape)}")
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)
        self.out_features, self.in_features = weight.shape

    @classmethod
    def from_float(cls, weight: Tensor) -> "Int8Linear":
        """Round a float weight [out, in] to nearest."""
        scales = packing.row_scales(weight)
        return cls(packing.quantize_int8(weight, scales), scales)

    def forward(self, x: Tensor) -> Tensor:
        """X [..., in] -> [..., out] in x's dtype."""
        return cast(Tensor, int8_linear(x, self.weight, self.scales))

    def dequantized(self) -> Tensor:
        """The float32 weight [out, in]."""
        return packing.dequantize(self.weight, self.scales)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.in_features}, {self.out_features}"
