"""A MoE layer of 1 to 16 rows on the device, from the residual stream and back to it; capturable."""

from __future__ import annotations

from torch import Tensor

from trtvlm.plugins.cuda.launch import kernel
from trtvlm.plugins.cuda.turns import Turns, launch_in_turn
from trtvlm.plugins.int4_linear.decode import COLUMNS, Norm, check_rows, norm_factors, shared_bytes
from trtvlm.plugins.int4_moe.layer import (
    INPUT_VALUES,
    ROUTE_WARPS,
    DecodeWorkspace,
    MoEWeights,
    MoEWorkspace,
    down_warps,
    parts,
    router_blocks,
)
from trtvlm.plugins.int4_moe.rows import experts_rows

SOURCE = "int4_moe/decode.cu"
_BLOCK_WARPS = 8


def moe_decode(
    residual: Tensor,
    square_sums: Tensor,
    norm: Norm,
    weights: MoEWeights,
    workspace: DecodeWorkspace,
    rows: int,
    turns: Turns | None = None,
) -> None:
    """residual float32 [rows, hidden] += the layer of its norm, in place; square_sums float32 [rows, hidden / 16] of it.

    square_sums may be norm.square_sums. turns: of the step, if its launches overlap. ValueError here and below: more than 16
    rows.
    """
    route(residual, norm, weights, workspace, rows, turns)
    if rows <= COLUMNS:
        experts_rows(residual, square_sums, weights, workspace, rows, turns)
        return
    experts_up(weights, workspace, rows, turns)
    experts_down(residual, square_sums, weights, workspace, rows, turns)


def route(
    residual: Tensor, norm: Norm, weights: MoEWeights, workspace: MoEWorkspace, rows: int, turns: Turns | None = None
) -> None:
    """The router's product, the experts' inputs, and the shared expert up to its gated product."""
    check_rows(rows)
    experts, hidden = weights.experts, weights.hidden
    blocks = router_blocks(experts, hidden) + weights.shared_width // (16 * weights.shared_pairs)
    grid = (blocks, -(-rows // COLUMNS))
    fc_scale, fc_codes, fc_scales = parts(weights.shared_fc)
    proj_scale, _, _ = parts(weights.shared_proj)
    factors = norm_factors(fc_scale is not None)
    shared = shared_bytes(
        hidden, ROUTE_WARPS, min(rows, COLUMNS), tiles=2 * weights.shared_pairs, staged=True, factors=factors
    )
    launch_in_turn(
        turns, kernel(SOURCE, "route", weights.macros), grid, 32 * ROUTE_WARPS,
        residual, norm.square_sums, norm.weight, norm.eps, weights.router,
        weights.fc.pre_quant_scale, workspace.logits, workspace.inputs, workspace.input_scales,
        fc_scale, fc_codes, fc_scales, proj_scale, workspace.shared, rows, shared // ROUTE_WARPS, shared=shared,
    )  # fmt: skip


def fix_inputs(x: Tensor, weights: MoEWeights, workspace: MoEWorkspace, rows: int) -> None:
    """What `route` leaves for the experts, of inputs half [rows, hidden] that are normalised already."""
    check_rows(rows)
    blocks = -(-x.shape[1] // INPUT_VALUES)
    kernel(SOURCE, "fix_inputs", weights.macros)(
        (blocks, -(-rows // COLUMNS)), 32 * ROUTE_WARPS, x, weights.fc.pre_quant_scale, workspace.inputs,
        workspace.input_scales, rows,
    )  # fmt: skip


def experts_up(weights: MoEWeights, workspace: MoEWorkspace, rows: int, turns: Turns | None = None) -> None:
    """Choose the experts, list the work, and run the chosen ones up to their gated products."""
    check_rows(rows)
    experts, k = weights.experts, weights.routing.top_k
    entries = min(min(rows, COLUMNS) * k, experts)
    launch_in_turn(
        turns, kernel(SOURCE, "experts_up", weights.macros), (1 + weights.width // 64, entries, -(-rows // COLUMNS)),
        32 * _BLOCK_WARPS, workspace.inputs, workspace.input_scales, workspace.logits, weights.correction_bias,
        workspace.weights, workspace.work, weights.fc.codes, weights.fc.scales, weights.proj.pre_quant_scale,
        workspace.hidden, workspace.hidden_scales, workspace.shared, workspace.shared_scales, rows,
        shared=up_bytes(weights.hidden),
    )  # fmt: skip


def experts_down(
    residual: Tensor,
    square_sums: Tensor,
    weights: MoEWeights,
    workspace: MoEWorkspace,
    rows: int,
    turns: Turns | None = None,
) -> None:
    """The second products, weighted and added to the residual stream."""
    check_rows(rows)
    _, shared_codes, shared_scales = parts(weights.shared_proj)
    launch_in_turn(
        turns, kernel(SOURCE, "experts_down", weights.macros), (residual.shape[1] // 16, -(-rows // COLUMNS)),
        32 * down_warps(residual.shape[1]), workspace.hidden, workspace.hidden_scales, workspace.shared, workspace.shared_scales,
        workspace.work, workspace.weights, weights.proj.codes, weights.proj.scales,
        shared_codes, shared_scales, residual, square_sums, rows,
    )  # fmt: skip


def up_bytes(hidden: int) -> int:
    """Dynamic shared memory of a block of `experts_up`: 8 rows' inputs, then its warps' partial sums in their place."""
    return max(COLUMNS * (2 * hidden + 64), shared_bytes(hidden, _BLOCK_WARPS, COLUMNS, tiles=4, staged=False))
