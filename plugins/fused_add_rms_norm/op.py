"""torch.ops.trtvlm.fused_add_rms_norm; CUDA has a kernel, other devices run the reference."""

import torch
from torch import Tensor

from trtvlm.plugins.fused_add_rms_norm import reference
from trtvlm.plugins.shapes import require


@torch.library.custom_op("trtvlm::fused_add_rms_norm", mutates_args=())
def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`reference.fused_add_rms_norm`: the normalised sum and the sum."""
    return reference.fused_add_rms_norm(x, residual, weight, eps)


@fused_add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    require(x.shape == residual.shape, f"x is {tuple(x.shape)}, the residual {tuple(residual.shape)}")
    return torch.empty_like(x), torch.empty_like(x)


@fused_add_rms_norm.register_kernel("cuda")
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from trtvlm.plugins.fused_add_rms_norm import cuda

    if not cuda.supports(x) or residual.dtype != x.dtype:
        return reference.fused_add_rms_norm(x, residual, weight, eps)
    x = x.contiguous()
    normalised, added = torch.empty_like(x), torch.empty_like(x)
    cuda.fused_add_rms_norm(x, residual.contiguous(), weight.to(x.dtype).contiguous(), eps, normalised, added)
    return normalised, added
