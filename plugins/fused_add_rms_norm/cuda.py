"""`fused_add_rms_norm` on the device: one launch on torch's stream, capturable."""

from __future__ import annotations

import torch
from torch import Tensor

from trtvlm.plugins.cuda.launch import defines, kernel

KERNEL = "fused_add_rms_norm/kernel.cu"
THREADS = 256
TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
MAX_WIDTH = 16384


def supports(x: Tensor) -> bool:
    """Whether the kernel takes x [..., N]: its type, and rows of whole 16-byte words that fit a block's registers."""
    return x.dtype in TYPES and 0 < x.shape[-1] <= MAX_WIDTH and x.shape[-1] * x.element_size() % 16 == 0


def fused_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, normalised: Tensor, added: Tensor
) -> None:
    """`reference.fused_add_rms_norm` of contiguous x and residual [..., N] into `normalised` and `added`, all of one dtype.

    ValueError: a dtype or width that the kernel does not take.
    """
    if not supports(x):
        raise ValueError(f"fused_add_rms_norm takes no rows of {x.shape[-1]} {x.dtype}")
    launch = kernel(KERNEL, "fused_add_rms_norm", defines(N=x.shape[-1], TYPE=TYPES[x.dtype]))
    rows = x.numel() // x.shape[-1]
    if rows:
        launch((rows,), THREADS, x, residual, weight, eps, normalised, added)
