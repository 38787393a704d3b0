"""What fused_add_rms_norm means."""

import torch
from torch import Tensor


def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual) * weight, x + residual): RMSNorm (arXiv 1910.07467), computed in float32.

    x and residual [..., N] of one dtype, weight [N] -> two tensors like x. The sum is rounded to the dtype before it is
    normalised, because the residual stream holds it so; the normalised value is rounded before the weight, as the model
    does.
    """
    added = x + residual
    wide = added.float()
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normalised.to(x.dtype) * weight.to(x.dtype), added
