"""A MoE layer of one row from the end of attention in two launches, with the bits of a row among others."""

from __future__ import annotations

from torch import Tensor

from trtvlm.plugins.cuda.launch import Defines, defines, kernel
from trtvlm.plugins.cuda.turns import Turns, launch_in_turn
from trtvlm.plugins.int4_linear.decode import LinearWeight, Norm
from trtvlm.plugins.int4_moe.layer import ROUTE_WARPS, DecodeWorkspace, MoEWeights, parts

DENSE_SOURCE, EXPERTS_SOURCE = "int4_moe/dense_row.cu", "int4_moe/experts_row.cu"
EXPERT_WARPS, MERGED = 16, 32  # of a block: warps; outputs, if it adds up
_SLICES, _TILE = 4, 512 + 32  # UP_WARPS; bytes of a tile's codes and scales
_SHARED_OUTPUTS = 32  # of the shared expert's first half, a part


def takes(dense: LinearWeight) -> bool:
    """Whether `dense_row` has the bits of `add_linear`: INT4 alone, and inputs that so many warps share."""
    return dense.halves is None and dense.inputs // 64 <= 64


def dense_row(
    x: Tensor,
    dense: LinearWeight,
    residual: Tensor,
    norm: Norm,
    weights: MoEWeights,
    workspace: DecodeWorkspace,
    turns: Turns | None = None,
) -> None:
    """residual float32 [1, hidden] += x half [1, in] @ dense^T in place, and norm.square_sums of it, for what `takes` allows.

    For `experts_row`: the router's product in workspace.logit_sums, and the shared expert up to its gated product.
    """
    tiles, shared_parts = weights.hidden // 16, weights.shared_width // _SHARED_OUTPUTS
    count = tiles if turns is None else turns.room.count
    blocks, shared_blocks = tiles, shared_parts
    if tiles <= 2 * count and turns is not None:
        # A block a multiprocessor: then the next launch's first blocks have one each, too.
        blocks = min(tiles, count)
        shared_blocks = min(shared_parts, count - blocks)
    values = dense_macros(dense, weights, -(-tiles // blocks))
    fc_scale, fc_codes, fc_scales = parts(weights.shared_fc)
    proj_scale, _, _ = parts(weights.shared_proj)
    launch_in_turn(
        turns, kernel(DENSE_SOURCE, "dense_row", values), (max(blocks + shared_blocks, count),), 32 * ROUTE_WARPS,
        x, dense.pre_quant_scale, dense.codes, dense.scales, residual, norm.square_sums, weights.router, workspace.logit_sums,
        norm.weight, norm.eps, fc_scale, fc_codes, fc_scales, proj_scale, workspace.shared, workspace.done, blocks,
        shared_blocks, shared=dense_bytes(values), counted=blocks, apart=True,
    )  # fmt: skip


def experts_row(
    residual: Tensor,
    square_sums: Tensor,
    norm: Norm,
    weights: MoEWeights,
    workspace: DecodeWorkspace,
    turns: Turns | None = None,
) -> None:
    """residual float32 [1, hidden] += the rest of the layer of its norm, after `dense_row`; square_sums [1, hidden / 16] of it.

    workspace.logits has the router's logits then. ValueError: square_sums are norm.square_sums, which are still read.
    """
    if square_sums is norm.square_sums:
        raise ValueError("experts_row needs buffers for square sums before and after it")
    _, proj_codes, proj_scales = parts(weights.shared_proj)
    routed, summing = weights.width // 64 * weights.routing.top_k, weights.hidden // MERGED
    launch_in_turn(
        turns, kernel(EXPERTS_SOURCE, "experts_row", weights.macros), (routed + summing,), 32 * EXPERT_WARPS,
        residual, norm.square_sums, norm.weight, norm.eps, weights.fc.pre_quant_scale, workspace.logit_sums, workspace.logits,
        weights.correction_bias, weights.fc.codes, weights.fc.scales, weights.proj.pre_quant_scale, weights.proj.codes,
        weights.proj.scales, workspace.given, proj_codes, proj_scales, workspace.shared,
        weights.shared_width // _SHARED_OUTPUTS, square_sums, workspace.done, shared=expert_bytes(weights), counted=summing,
    )  # fmt: skip


def dense_macros(dense: LinearWeight, weights: MoEWeights, turns: int) -> Defines:
    """What `dense_row` is compiled for; turns: tiles of 16 outputs that a block has at most."""
    scaled = int(dense.pre_quant_scale is not None)
    return defines(**dict(weights.macros), DENSE_IN=dense.inputs, DENSE_SCALED=scaled, DENSE_TURNS=turns)


def dense_bytes(values: Defines) -> int:
    """Dynamic shared memory of a block of `dense_row`: the larger of `Dense` and `SharedUp` (row_dense.cuh, row_shared.cuh)."""
    macro = dict(values)
    hidden, turns = int(macro["HIDDEN"]), int(macro["DENSE_TURNS"])
    steps = -(-int(macro["DENSE_IN"]) // 64 // ROUTE_WARPS)
    landing = _TILE * steps * (ROUTE_WARPS if turns > 1 else 1)
    dense = 64 * turns * int(macro["EXPERTS"]) + landing + 128 * steps * ROUTE_WARPS + 64 * turns * (ROUTE_WARPS + 1)
    steps = -(-hidden // 64 // _SLICES)
    shared = ROUTE_WARPS * 2 * steps * _TILE + _SLICES * steps * (128 + 4) + 2 * ROUTE_WARPS * 2 * 64
    return -(-max(dense, shared) // 16) * 16


def expert_bytes(weights: MoEWeights, slots: int = 1) -> int:
    """Dynamic shared memory of a block of experts for `slots` rows: the larger of `Routed` and `Merge` (row_*.cuh)."""
    hidden, top_k, groups = weights.hidden, weights.routing.top_k, max(1, weights.shared_width // 64)
    slices = _SLICES * -(-hidden // 64 // _SLICES)
    inputs = 128 * slices if slots == 1 else 0  # several rows' lie where some of the tiles come
    routed = hidden // 16 * _TILE + inputs + slots * (4 * slices + 128 + 4 * _SLICES * 2 * 64 + 4) + 128 + 4
    merge = groups * (2 * _TILE + slots * (128 + 4)) + slots * (weights.units * 2 * 4 * MERGED + 2 * 4 * top_k)
    merge += 4 * (weights.experts if slots == 1 else 1)
    return -(-max(routed, merge) // 16) * 16
