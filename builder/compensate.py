"""Rounding that makes up for itself: what one input's rounding gets wrong, the inputs not yet rounded put right."""

from __future__ import annotations

import torch
from torch import Tensor

from trtvlm.plugins.int4_linear.packing import GROUP_SIZE, HIGHEST, LOWEST

# Of the mean diagonal, added to it: inputs that were rarely seen must not be relied on.
DAMPING = 0.01


@torch.no_grad()
def gram(inputs: Tensor) -> Tensor:
    """X^T X / rows of inputs [rows, in]: float32 [in, in]; zeros when there are no rows."""
    x = inputs.float()
    return x.t() @ x / max(1, x.shape[0])


@torch.no_grad()
def compensated_codes(weight: Tensor, scales: Tensor, hessian: Tensor) -> Tensor:
    """INT4 codes int8 [..., out, in] of a weight under scales [..., out, in / 64] that keep its products (GPTQ).

    Input by input, in order, the rounding error is spread over the inputs still to come so that the output on what was
    seen changes least: GPTQ (arXiv 2210.17323, algorithm 1), with H = `gram` [..., in, in] of the inputs and the Cholesky
    factor of its inverse. With inputs that are not correlated, or none, these are the nearest codes.
    """
    factor = inverse_factor(hessian)
    left = weight.float().clone()
    codes = torch.empty(left.shape, dtype=torch.int8, device=left.device)
    for start in range(0, left.shape[-1], GROUP_SIZE):
        end = start + GROUP_SIZE
        # Column by column in a small copy: its rows are contiguous columns, all experts at once.
        block = left[..., start:end].movedim(-1, 0).contiguous()
        scale = scales[..., start // GROUP_SIZE].float()
        near = factor[..., start:end, start:end].movedim((-2, -1), (0, 1)).contiguous().unsqueeze(-1)
        errors = torch.empty_like(block)
        for column in range(GROUP_SIZE):
            code = (block[column] / scale).round_().clamp_(LOWEST, HIGHEST)
            codes[..., start + column] = code
            torch.div(block[column] - code * scale, near[column, column], out=errors[column])
            if column + 1 < GROUP_SIZE:
                block[column + 1 :] -= near[column, column + 1 :] * errors[column]
        left[..., end:] -= errors.movedim(0, -1) @ factor[..., start:end, end:]
    return codes


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor U of the inverse of the damped H [..., in, in], U^T U = H^-1: float32.

    H read backwards is L L^T; so H = R R^T with R upper, and U is R's inverse. One factorisation instead of two.
    """
    damped = hessian.double()
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    # All-zero inputs leave nothing to weigh: any positive diagonal does.
    damping = DAMPING * diagonal.mean(-1, keepdim=True)
    diagonal += torch.where(damping > 0, damping, 1.0)
    lower = torch.linalg.cholesky(damped.flip((-2, -1)))
    del damped, diagonal
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
    inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
    return inverse.flip((-2, -1)).float()
