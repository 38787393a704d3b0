"""What int4_linear means."""

import torch.nn.functional as F
from torch import Tensor

from trtvlm.plugins.int4_linear.packing import dequantize


def int4_linear(x: Tensor, packed: Tensor, scales: Tensor, pre_quant_scale: Tensor | None = None) -> Tensor:
    """Y = (x * pre_quant_scale) @ W^T with W = code * scale rounded to x's dtype, as an engine of that dtype has it.

    x [..., in], packed int8 [out / 2, in] (layout: `packing.pack`), scales [out, in / group], pre_quant_scale [in]
    (AWQ, arXiv 2306.00978) -> [..., out] in x's dtype.
    """
    if pre_quant_scale is not None:
        x = x * pre_quant_scale.to(x.dtype)
    return F.linear(x, dequantize(packed, scales).to(x.dtype))
