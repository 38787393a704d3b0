"""torch.ops.trtvlm.int8_linear; CUDA has a kernel, other devices and what it does not take run the reference."""

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


@int8_linear.register_kernel("cuda")
def _(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    from trtvlm.plugins.int8_linear import device

    run = device.int8_linear if device.supports(x, codes) else reference.int8_linear
    return run(x, codes, scales)
