"""A linear layer that gives a row the same bits whatever the number of rows computed with it.

An ordinary matrix product picks another algorithm, and so another order of additions, for another number of rows.
The kernels here are tried in order of speed; each must pass `check_row_invariance` on the real weight to be used.
"""

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_ROWS = 16
"""Rows up to which results are promised not to depend on their number."""

Kernel = Callable[[Tensor], Tensor]
"""x float32 [M, in], contiguous -> float32 [M, out]."""


def half_kernel(weight: Tensor) -> Kernel:
    """FBGEMM: float16 weights, float32 activations and sums, packed once; half the bytes of a float32 product.

    The deprecated name of the operator: the call costs 2 us instead of the 12 us of `half_kernel_dispatched`, which is
    more than most of nano's products take. x86 only.
    """
    packed = torch.fbgemm_pack_gemm_matrix_fp16(weight)
    apply = torch.fbgemm_linear_fp16_weight_fp32_activation
    return lambda x: apply(x, packed, None)


def half_kernel_dispatched(weight: Tensor) -> Kernel:
    """The same product under the name that stays."""
    packed = torch.ops.quantized.linear_prepack_fp16(weight, None)
    apply = torch.ops.quantized.linear_dynamic_fp16.default
    return lambda x: apply(x, packed)


def row_by_row_kernel(weight: Tensor) -> Kernel:
    """One matrix-vector product a row: invariant by construction, any machine, any float32 weight."""
    weight = weight.clone()  # a slice of a bigger weight would keep all of it alive

    def apply(x: Tensor) -> Tensor:
        if x.shape[0] > MAX_ROWS:
            return F.linear(x, weight)
        return torch.stack([torch.mv(weight, row) for row in x.unbind()])

    return apply


def check_row_invariance(kernel: Kernel, inputs: int, rows: int = 8) -> bool:
    """Whether every window of 1 to `rows` random rows float32 [*, inputs] comes out with the bits its rows have alone.

    The order of additions does not depend on the numbers, so random rows stand for all.
    """
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([kernel(row) for row in torch.split(x, 1)])
    return all(
        torch.equal(kernel(x[first : first + width]), alone[first : first + width])
        for width in range(2, rows + 1)
        for first in {0, rows - width}
    )


class RowwiseLinear(nn.Module):
    """y = x @ weight^T for x float32 [..., in]; up to MAX_ROWS rows, a row's bits do not depend on the others.

    weight [out, in] is rounded to float16 (what an engine holds and multiplies by) if `dtype` says so or if nothing is
    lost by it; otherwise, or where float16 cannot hold it, it stays float32 and the product is slower.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype = torch.float16) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        weight = weight.detach().float().contiguous()
        half = weight.half().float()
        fits = bool(half.isfinite().all()) and (dtype == torch.float16 or torch.equal(half, weight))
        makers = [half_kernel, half_kernel_dispatched] if fits else []
        self.kernel, self.kernel_name = _first_invariant([*makers, row_by_row_kernel], half if fits else weight)

    def forward(self, x: Tensor) -> Tensor:
        """X float32 [..., in] -> float32 [..., out]."""
        if x.dim() == 2:
            return self.kernel(x)
        return self.kernel(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Sizes and the kernel in use."""
        return f"{self.in_features}, {self.out_features}, kernel={self.kernel_name}"


@torch.inference_mode()
def _first_invariant(makers: list[Callable[[Tensor], Kernel]], weight: Tensor) -> tuple[Kernel, str]:
    for make in makers[:-1]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # half_kernel's name is deprecated
                kernel = make(weight)
                if check_row_invariance(kernel, weight.shape[1]):
                    return kernel, make.__name__
        except (AttributeError, NotImplementedError, RuntimeError):
            continue  # not in this build of PyTorch, or not on this machine
    return makers[-1](weight), makers[-1].__name__
