"""What int8_linear means."""

import torch.nn.functional as F
from torch import Tensor

from trtvlm.plugins.int8_linear.packing import dequantize


def int8_linear(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Y = x @ W^T with W = code * scale rounded to x's dtype, as an engine of that dtype has it.

    x [..., in], codes int8 [out, in], scales [out] -> [..., out] in x's dtype.
    """
    return F.linear(x, dequantize(codes, scales).to(x.dtype))
