"""int4_moe on the device as a graph sees it: from normalised activations and router logits to the experts' sum."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from trtvlm.plugins.cuda.memory import Piece, carve, total_bytes
from trtvlm.plugins.cuda.tiles import int4_tiles
from trtvlm.plugins.int4_linear.decode import MOST_ROWS as ROWS
from trtvlm.plugins.int4_linear.decode import LinearWeight, gated_linear
from trtvlm.plugins.int4_moe.decode import experts_down, experts_up, fix_inputs
from trtvlm.plugins.int4_moe.layer import MoEWeights, MoEWorkspace, Tiles
from trtvlm.plugins.int4_moe.reference import Int4MLP, Routing


@dataclass(frozen=True)
class MoEBoundary:
    """The operator with its weights in tiles on the device. Launches only; every call may be captured."""

    weights: MoEWeights

    @classmethod
    def pack(
        cls, experts: Int4MLP, routing: Routing, shared: Int4MLP | None = None, correction_bias: Tensor | None = None
    ) -> MoEBoundary:
        """From the checkpoint's tensors, on the device. ValueError: what the kernels do not take."""
        count, hidden = experts.fc.shape[0], experts.fc.shape[2]
        # The router is a product of the graph's own; here only its sizes are asked for.
        router = torch.empty(hidden // 16, count, 16, device="meta")
        parts = [None, None] if shared is None else [_tiles(shared, "fc"), _tiles(shared, "proj")]
        return cls(MoEWeights(router, correction_bias, routing, _tiles(experts, "fc"), _tiles(experts, "proj"), *parts))

    @property
    def workspace_bytes(self) -> int:
        """Bytes of workspace a call needs, whatever its rows."""
        return total_bytes(self._pieces)

    @property
    def _pieces(self) -> list[Piece]:
        hidden = self.weights.hidden
        wanted = MoEWorkspace.allocate(self.weights, ROWS, "meta")
        return [
            Piece(torch.float32, (ROWS, hidden)),
            Piece(torch.float32, (ROWS, hidden // 16)),
            *(Piece(value.dtype, tuple(value.shape)) for value in vars(wanted).values()),
        ]

    def __call__(self, x: Tensor, router_logits: Tensor, out: Tensor, memory: Tensor) -> None:
        """`reference.int4_moe`: x half [M, H], router_logits float32 [M, E] -> `out` half [M, H].

        memory: uint8, `workspace_bytes` of it; what it held does not matter.
        """
        w = self.weights
        total, square_sums, *buffers = carve(memory, self._pieces)
        buffer = MoEWorkspace(*buffers)
        for start in range(0, x.shape[0], ROWS):
            rows = min(ROWS, x.shape[0] - start)
            part = slice(start, start + rows)
            workspace = dataclasses.replace(buffer, logits=router_logits[part])
            fix_inputs(x[part], w, buffer, rows)
            if w.shared_fc is not None:
                assert w.shared_proj is not None
                fc = LinearWeight(w.shared_fc.codes, w.shared_fc.scales, w.shared_fc.pre_quant_scale)
                gated_linear(x[part], fc, buffer.shared, rows, next_scale=w.shared_proj.pre_quant_scale)
            experts_up(w, workspace, rows)
            # The kernel adds to a residual stream; here that is the graph's.
            total[:rows].zero_()
            experts_down(total, square_sums, w, workspace, rows)
            out[part].copy_(total[:rows])


def _tiles(mlp: Int4MLP, part: str) -> Tiles:
    """One of an MLP's weights, of one expert or of all, in tiles: a few experts at a time, as unpacking takes room."""
    packed, scales, pre = (getattr(mlp, f"{part}{suffix}") for suffix in ("", "_scales", "_pre"))
    stacked = packed.dim() == 3
    pairs = zip(packed.split(8), scales.split(8), strict=True) if stacked else [(packed, scales)]
    done = [int4_tiles(*pair) for pair in pairs]
    pre = None if pre is None else pre.to(torch.half).contiguous()
    codes, scale = (torch.cat(tensors) if stacked else tensors[0] for tensors in zip(*done, strict=True))
    return Tiles(codes, scale, pre)
