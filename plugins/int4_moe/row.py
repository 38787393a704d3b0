"""A MoE layer of one row in two launches: kernels that overlap better than those of many rows, with the same bits."""

from __future__ import annotations

from torch import Tensor

from trtvlm.plugins.cuda.launch import kernel
from trtvlm.plugins.cuda.turns import Turns, launch_in_turn
from trtvlm.plugins.int4_linear.decode import Norm
from trtvlm.plugins.int4_moe.layer import ROUTE_WARPS, DecodeWorkspace, MoEWeights, parts, router_blocks

SOURCE = "int4_moe/row.cu"
EXPERT_WARPS, MERGED = 16, 32  # of a block: warps; outputs, if it adds up
_INPUT_VALUES = 1024  # INPUT_QUADS of row.cu
_SLICES, _TILE = 4, 512 + 32  # UP_WARPS; bytes of a tile's codes and scales


def decode_row(
    residual: Tensor, norm: Norm, weights: MoEWeights, workspace: DecodeWorkspace, turns: Turns | None = None
) -> None:
    """`decode.moe_decode` of one row."""
    experts, hidden = weights.router.shape
    fc_scale, fc_codes, fc_scales = parts(weights.shared_fc)
    proj_scale, proj_codes, proj_scales = parts(weights.shared_proj)
    routing, shared_blocks = router_blocks(experts, hidden, _INPUT_VALUES), weights.shared_width // 32
    places = 0 if turns is None else turns.room.count - routing
    if places > 0:
        # A block a multiprocessor: then the next launch's first blocks have one each, too.
        shared_blocks = min(shared_blocks, places)
    launch_in_turn(
        turns, kernel(SOURCE, "route_row", weights.macros), (max(places, shared_blocks) + routing,), 32 * ROUTE_WARPS,
        residual, norm.square_sums, norm.weight, norm.eps, weights.router, weights.fc.pre_quant_scale, workspace.logits,
        workspace.inputs, workspace.input_scales, fc_scale, fc_codes, fc_scales, proj_scale, workspace.shared, workspace.done,
        shared_blocks, shared=route_bytes(hidden), counted=routing, apart=True,
    )  # fmt: skip
    routed, summing = weights.width // 64 * weights.routing.top_k, hidden // MERGED
    launch_in_turn(
        turns, kernel(SOURCE, "experts_row", weights.macros), (routed + summing,), 32 * EXPERT_WARPS,
        workspace.inputs, workspace.input_scales, workspace.logits, weights.correction_bias, weights.fc.codes, weights.fc.scales,
        weights.proj.pre_quant_scale, weights.proj.codes, weights.proj.scales, workspace.given, proj_codes, proj_scales,
        workspace.shared, residual, norm.square_sums, workspace.done, shared=expert_bytes(weights), counted=summing,
    )  # fmt: skip


def route_bytes(hidden: int) -> int:
    """Dynamic shared memory of a block of `route_row`: `SharedUp` of row_shared.cuh."""
    steps = -(-hidden // 64 // _SLICES)
    return ROUTE_WARPS * 2 * steps * _TILE + _SLICES * steps * (128 + 4) + 2 * ROUTE_WARPS * 2 * 64


def expert_bytes(weights: MoEWeights, slots: int = 1) -> int:
    """Dynamic shared memory of a block of experts for `slots` rows: the larger of `Routed` and `Merge` (row_*.cuh)."""
    hidden, top_k, groups = weights.router.shape[1], weights.routing.top_k, max(1, weights.shared_width // 64)
    slices = _SLICES * -(-hidden // 64 // _SLICES)
    inputs = 128 * slices if slots == 1 else 0  # several rows' lie where some of the tiles come
    routed = hidden // 16 * _TILE + inputs + slots * (4 * slices + 128 + 4 * _SLICES * 2 * 64 + 4) + 128 + 4
    merge = groups * (2 * _TILE + slots * (128 + 4)) + slots * (weights.units * 2 * 4 * MERGED + 2 * 4 * top_k)
    return -(-max(routed, merge) // 16) * 16
