"""Rounding that makes up for itself: what one input's rounding gets wrong, the inputs not yet rounded put right."""

from __future__ import annotations

import torch
from torch import Tensor

from trtvlm.plugins.int4_linear.packing import GROUP_SIZE, HIGHEST, LOWEST

# Of the mean diagonal, added to it: inputs that were rarely seen must not be relied on.
DAMPING = 0.01


@torch.no_grad()
def compensated_codes(weight: Tensor, scales: Tensor, inputs: Tensor) -> Tensor:
    """INT4 codes int8 [out, in] of a weight [out, in] under scales [out, in / 64] that keep its products (GPTQ).

    Input by input, in order, the rounding error is spread over the inputs still to come so that the output on `inputs`
    [rows, in] changes least: GPTQ (arXiv 2210.17323, algorithm 1), with H = X^T X and the Cholesky factor of its
    inverse. With inputs that are not correlated, these are the nearest codes.
    """
    factor = _inverse_factor(inputs)
    left = weight.float().clone()
    codes = torch.empty_like(left)
    for start in range(0, left.shape[1], GROUP_SIZE):
        end = start + GROUP_SIZE
        scale = scales[:, start // GROUP_SIZE].float()
        errors = torch.empty(left.shape[0], GROUP_SIZE, device=left.device)
        for column in range(start, end):
            code = (left[:, column] / scale).round().clamp(LOWEST, HIGHEST)
            codes[:, column] = code
            error = (left[:, column] - code * scale) / factor[column, column]
            left[:, column + 1 : end] -= torch.outer(error, factor[column, column + 1 : end])
            errors[:, column - start] = error
        left[:, end:] -= errors @ factor[start:end, end:]
    return codes.to(torch.int8)


def _inverse_factor(inputs: Tensor) -> Tensor:
    """The upper Cholesky factor [in, in] of the inverse of the damped H."""
    x = inputs.double()
    hessian = x.t() @ x / x.shape[0]
    # All-zero inputs leave nothing to weigh: any positive diagonal does.
    damping = DAMPING * float(hessian.diagonal().mean()) or 1.0
    hessian += damping * torch.eye(hessian.shape[0], dtype=hessian.dtype, device=hessian.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()
