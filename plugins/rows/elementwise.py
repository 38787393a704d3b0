"""Steps between the products: norms, activations, rotations, none of which may know how many rows there are."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# PyTorch computes a vectorised function (exp, and so silu) differently in the few elements at the end of a range that
# do not fill two vectors, and cuts ranges of more than 32,768 elements between threads. A row must meet neither.
_VECTORS, _SERIAL = 32, 32_768


def by_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function`, elementwise, of x [M, N] so that a row's bits do not depend on M."""
    if x.shape[1] % _VECTORS == 0 and x.numel() < _SERIAL:
        return function(x)
    return torch.cat([function(row) for row in torch.split(x, 1)])


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, arXiv 2002.05202), each [M, N]."""
    return by_rows(F.silu, gate) * up


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (arXiv 1910.07467) of float32 x [..., N]: PyTorch reduces each row alone, in one order."""
    return F.rms_norm(x, weight.shape, weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [..., d] in half-split order; cos [..., d] is [cos | cos], sin [..., d] is [-sin | sin].

    Products and sums are single operations, rounded once each: a fused multiply-add would round differently in the
    vectorised and the left-over elements.
    """
    halves = x.view(*x.shape[:-1], 2, -1)
    return x * cos + halves.flip(-2).flatten(-2) * sin
