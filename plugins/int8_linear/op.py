"""torch.ops.trtvlm.int8_linear; every device runs the reference until it has a kernel."""

import torch
from torch import Tensor

from trtvlm.plugins.int8_linear import reference
from trtvlm.plugins.shapes import require


@torch.library.custom_op("trtvlm::int8_linear", mutates_args=())
def int8_linear(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """`reference.int8_linear`. Any number of leading dimensions."""
    return reference.int8_linear(x, codes, scales)


@int8_linear.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    require(x.shape[-1] == codes.shape[1], f"x has {x.shape[-1]} inputs, the weight {codes.shape[1]}")
    require(scales.shape[0] == codes.shape[0], "one scale an output")
    return x.new_empty(*x.shape[:-1], codes.shape[0])
