"""Routed and shared experts for a few rows on a CPU."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trtvlm.plugins.rows.elementwise import swiglu
from trtvlm.plugins.rows.linear import RowwiseLinear

DENSE_LIMIT = 2**21
"""Expert weights up to which running all of them in two products is faster than a few products an expert chosen."""

MLPWeights = tuple[Tensor, Tensor, Tensor]
"""One SwiGLU: gate [I, H], up [I, H], down [H, I]."""


class RowwiseMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) with gate and up in one product."""

    def __init__(self, weights: MLPWeights, dtype: torch.dtype = torch.float16) -> None:
        super().__init__()
        gate, up, down = weights
        self.width = gate.shape[0]
        self.gate_up = RowwiseLinear(torch.cat((gate, up)), dtype)
        self.down = RowwiseLinear(down, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """X [M, H] -> [M, H]."""
        gate, up = self.gate_up(x).split(self.width, dim=1)
        out: Tensor = self.down(swiglu(gate, up))
        return out


class RowwiseExperts(nn.Module):
    """Sum of weight * expert(x) over the chosen experts, plus the shared expert, in float32.

    A row's sum runs over the experts in the order of their numbers, never in the order of the rows that chose them.
    """

    def __init__(
        self, experts: Sequence[MLPWeights], shared: MLPWeights | None = None, dtype: torch.dtype = torch.float16
    ) -> None:
        super().__init__()
        self.count = len(experts)
        self.all: _AllExperts | None = None
        if sum(part.numel() for expert in experts for part in expert) <= DENSE_LIMIT:
            self.all = _AllExperts(experts, shared, dtype)
            return
        self.experts = nn.ModuleList(RowwiseMLP(expert, dtype) for expert in experts)
        self.shared = RowwiseMLP(shared, dtype) if shared is not None else None

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """X [M, H], index int64 [M, k], weight float32 [M, k] -> [M, H]."""
        if self.all is not None:
            out: Tensor = self.all(x, index, weight)
            return out
        total = torch.zeros_like(x) if self.shared is None else self.shared(x)
        for number in sorted(set(index.flatten().tolist())):
            rows, slot = (index == number).nonzero(as_tuple=True)
            total.index_add_(0, rows, self.experts[number](x[rows]) * weight[rows, slot].unsqueeze(1))
        return total


class _AllExperts(nn.Module):
    """Every expert as channels of one wide SwiGLU; a row's unchosen channels are multiplied by zero."""

    def __init__(self, experts: Sequence[MLPWeights], shared: MLPWeights | None, dtype: torch.dtype) -> None:
        super().__init__()
        parts = [*experts] if shared is None else [*experts, shared]
        gate, up, down = (torch.cat([part[which] for part in parts], dim=int(which == 2)) for which in range(3))
        self.mlp = RowwiseMLP((gate, up, down), dtype)
        self.count, self.width = len(experts), experts[0][0].shape[0]

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        rows, routed = x.shape[0], self.count * self.width
        gate, up = self.mlp.gate_up(x).split(self.mlp.width, dim=1)
        inner = swiglu(gate, up)
        share = inner.new_zeros(rows, self.count, 1).scatter_(1, index.unsqueeze(2), weight.unsqueeze(2))
        inner[:, :routed].view(rows, self.count, self.width).mul_(share)
        out: Tensor = self.mlp.down(inner)
        return out
