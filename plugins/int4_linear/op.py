"""torch.ops.trtvlm.int4_linear; CUDA has kernels, other devices and what these do not take run the reference."""

import torch
from torch import Tensor

from trtvlm.plugins.int4_linear import reference
from trtvlm.plugins.shapes import require


@torch.library.custom_op("trtvlm::int4_linear", mutates_args=())
def int4_linear(x: Tensor, packed: Tensor, scales: Tensor, pre_quant_scale: Tensor | None = None) -> Tensor:
    """`reference.int4_linear`. Any number of leading dimensions; `in` a multiple of the group, `out` even."""
    return reference.int4_linear(x, packed, scales, pre_quant_scale)


@int4_linear.register_fake
def _(x: Tensor, packed: Tensor, scales: Tensor, pre_quant_scale: Tensor | None = None) -> Tensor:
    require(x.shape[-1] == packed.shape[1], f"x has {x.shape[-1]} inputs, the weight {packed.shape[1]}")
    require(scales.shape[0] == 2 * packed.shape[0], "one row of scales an output")
    return x.new_empty(*x.shape[:-1], scales.shape[0])


@int4_linear.register_kernel("cuda")
def _(x: Tensor, packed: Tensor, scales: Tensor, pre_quant_scale: Tensor | None = None) -> Tensor:
    from trtvlm.plugins.int4_linear import device

    run = device.int4_linear if device.supports(x, packed, scales) else reference.int4_linear
    return run(x, packed, scales, pre_quant_scale)
