"""A MoE layer of 1 to 16 rows on the device, from the residual stream and back to it, in three launches; capturable."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trtvlm.plugins.cuda.launch import Defines, defines, kernel
from trtvlm.plugins.cuda.turns import Turns, launch_in_turn
from trtvlm.plugins.int4_linear.decode import COLUMNS, Norm, check_rows, shared_bytes
from trtvlm.plugins.int4_moe.reference import Routing

SOURCE, ROW_SOURCE = "int4_moe/decode.cu", "int4_moe/row.cu"
_ROUTE_WARPS, _UP_WARPS, _BLOCK_WARPS, _ROW_DOWN_WARPS = 8, 4, 8, 16
_ROUTER_EXPERTS, _INPUT_VALUES = 2, 256


@dataclass(frozen=True)
class Tiles:
    """An INT4 weight in tiles (`trtvlm.plugins.cuda.tiles.int4_tiles`), of one layer or stacked over experts."""

    codes: Tensor
    scales: Tensor
    pre_quant_scale: Tensor | None = None


@dataclass(frozen=True)
class MoEWeights:
    """Router float32 [E, hidden], experts and shared expert; fc is [up; gate]. ValueError: what the kernels do not take."""

    router: Tensor
    correction_bias: Tensor | None
    routing: Routing
    fc: Tiles
    proj: Tiles
    shared_fc: Tiles | None = None
    shared_proj: Tiles | None = None

    def __post_init__(self) -> None:
        experts, width = self.router.shape[0], self.width
        if experts > 128 or self.routing.top_k > 15:
            raise ValueError(f"the kernels route to at most 15 of 128 experts, not {self.routing.top_k} of {experts}")
        if self.correction_bias is not None and self.routing.scoring != "sigmoid":
            raise ValueError("the kernels correct sigmoid scores only")
        if self.routing.groups > 1:
            raise ValueError("the kernels do not route in groups")
        if self.shared_width % width:
            raise ValueError(
                f"the shared expert's width {self.shared_width} must be a multiple of the experts' {width}"
            )

    @property
    def width(self) -> int:
        """Inner width of a routed expert."""
        return 64 * self.proj.codes.shape[2]

    @property
    def shared_width(self) -> int:
        """Inner width of the shared expert; 0 if there is none."""
        return 0 if self.shared_proj is None else 64 * self.shared_proj.codes.shape[1]

    @property
    def shared_expert(self) -> list[Tensor]:
        """The shared expert's codes and scales, in the order they are read."""
        return [tensor for part in (self.shared_fc, self.shared_proj) if part for tensor in (part.codes, part.scales)]

    @property
    def macros(self) -> Defines:
        """What the kernels are compiled for."""
        shared_scale = None if self.shared_fc is None else self.shared_fc.pre_quant_scale
        return defines(
            HIDDEN=self.router.shape[1], WIDTH=self.width, EXPERTS=self.router.shape[0], TOP_K=self.routing.top_k,
            SHARED=self.shared_width, SIGMOID=int(self.routing.scoring == "sigmoid"), NORMALISE=int(self.routing.normalise),
            SCALING=float(self.routing.scaling), BIASED=int(self.correction_bias is not None),
            EXPERT_SCALED=int(self.fc.pre_quant_scale is not None), SHARED_SCALED=int(shared_scale is not None),
            DOWN_BLOCK_WARPS=down_warps(self.router.shape[1]),
        )  # fmt: skip


@dataclass(frozen=True)
class MoEWorkspace:
    """Buffers of a layer, for up to `rows` rows; layers can share them.

    inputs, hidden and shared have a word of 16 bits for each value: halves or fixed point (include/fixed.cuh), whichever the next
    kernel takes; their scales are those of fixed point.
    """

    logits: Tensor
    weights: Tensor
    work: Tensor
    inputs: Tensor
    input_scales: Tensor
    hidden: Tensor
    hidden_scales: Tensor
    shared: Tensor
    shared_scales: Tensor

    @classmethod
    def allocate(cls, weights: MoEWeights, rows: int, device: torch.device | str) -> MoEWorkspace:
        """Room for `rows` rows of layers like `weights`."""
        experts, hidden = weights.router.shape
        k, tiles = weights.routing.top_k, -(-rows // COLUMNS)
        return cls(
            torch.empty(rows, experts, device=device),
            torch.empty(rows, k, device=device),
            torch.zeros(tiles, 1 + 3 * min(COLUMNS * k, experts), dtype=torch.int32, device=device),
            torch.empty(tiles * COLUMNS, hidden, dtype=torch.half, device=device),
            torch.empty(tiles, hidden // 64, COLUMNS, device=device),
            torch.empty(rows, k, weights.width, dtype=torch.half, device=device),
            torch.empty(rows, k, weights.width // 64, device=device),
            torch.empty(rows, max(1, weights.shared_width), dtype=torch.half, device=device),
            torch.empty(rows, max(1, weights.shared_width // 64), device=device),
        )


def moe_decode(
    residual: Tensor, norm: Norm, weights: MoEWeights, workspace: MoEWorkspace, rows: int, turns: Turns | None = None
) -> None:
    """residual float32 [rows, hidden] += the layer of its norm, in place; norm.square_sums are renewed.

    turns: of the step, if its launches overlap. ValueError here and below: more than 16 rows.
    """
    if rows == 1:
        _decode_row(residual, norm, weights, workspace, turns)
        return
    route(residual, norm, weights, workspace, rows, turns)
    experts_up(weights, workspace, rows, turns)
    experts_down(residual, norm.square_sums, weights, workspace, rows, turns)


def route(
    residual: Tensor, norm: Norm, weights: MoEWeights, workspace: MoEWorkspace, rows: int, turns: Turns | None = None
) -> None:
    """The router's product, the experts' inputs, and the shared expert up to its gated product."""
    check_rows(rows)
    experts, hidden = weights.router.shape
    shared_tiles = weights.shared_width // 16
    blocks = _router_blocks(experts, hidden) + shared_tiles
    grid = (blocks, -(-rows // COLUMNS))
    fc, proj = weights.shared_fc, weights.shared_proj
    shared = shared_bytes(hidden, _ROUTE_WARPS, min(rows, COLUMNS), tiles=2, normalised=True)
    launch_in_turn(
        turns, kernel(SOURCE, "route", weights.macros), grid, 32 * _ROUTE_WARPS,
        residual, norm.square_sums, norm.weight, norm.eps, weights.router,
        weights.fc.pre_quant_scale, workspace.logits, workspace.inputs, workspace.input_scales,
        None if fc is None else fc.pre_quant_scale, None if fc is None else fc.codes, None if fc is None else fc.scales,
        None if proj is None else proj.pre_quant_scale, workspace.shared, rows, shared // _ROUTE_WARPS, shared=shared,
    )  # fmt: skip


def fix_inputs(x: Tensor, weights: MoEWeights, workspace: MoEWorkspace, rows: int) -> None:
    """What `route` leaves for the experts, of inputs half [rows, hidden] that are normalised already."""
    check_rows(rows)
    blocks = -(-x.shape[1] // _INPUT_VALUES)
    kernel(SOURCE, "fix_inputs", weights.macros)(
        (blocks, -(-rows // COLUMNS)), 32 * _ROUTE_WARPS, x, weights.fc.pre_quant_scale, workspace.inputs,
        workspace.input_scales, rows,
    )  # fmt: skip


def experts_up(weights: MoEWeights, workspace: MoEWorkspace, rows: int, turns: Turns | None = None) -> None:
    """Choose the experts, list the work, and run the chosen ones up to their gated products."""
    check_rows(rows)
    experts, k = weights.router.shape[0], weights.routing.top_k
    entries = min(min(rows, COLUMNS) * k, experts)
    launch_in_turn(
        turns, kernel(SOURCE, "experts_up", weights.macros), (1 + weights.width // 64, entries, -(-rows // COLUMNS)),
        32 * _BLOCK_WARPS, workspace.inputs, workspace.input_scales, workspace.logits, weights.correction_bias,
        workspace.weights, workspace.work, weights.fc.codes, weights.fc.scales, weights.proj.pre_quant_scale,
        workspace.hidden, workspace.hidden_scales, workspace.shared, workspace.shared_scales, rows,
        shared=up_bytes(weights.router.shape[1]),
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
    shared = weights.shared_proj
    launch_in_turn(
        turns, kernel(SOURCE, "experts_down", weights.macros), (residual.shape[1] // 16, -(-rows // COLUMNS)),
        32 * down_warps(residual.shape[1]), workspace.hidden, workspace.hidden_scales, workspace.shared, workspace.shared_scales,
        workspace.work, workspace.weights, weights.proj.codes, weights.proj.scales,
        None if shared is None else shared.codes, None if shared is None else shared.scales, residual, square_sums, rows,
    )  # fmt: skip


def _decode_row(
    residual: Tensor, norm: Norm, weights: MoEWeights, workspace: MoEWorkspace, turns: Turns | None
) -> None:
    """The layer of one row: kernels that overlap better, with the same bits."""
    experts, hidden = weights.router.shape
    fc, proj = weights.shared_fc, weights.shared_proj
    stream = (residual, norm.square_sums, norm.weight, norm.eps)
    launch_in_turn(
        turns, kernel(ROW_SOURCE, "route_row", weights.macros), (_router_blocks(experts, hidden),), 32 * _ROUTE_WARPS, *stream,
        weights.router, weights.fc.pre_quant_scale, workspace.logits, workspace.inputs, workspace.input_scales,
    )  # fmt: skip
    parts = weights.shared_width // weights.width
    launch_in_turn(
        turns, kernel(ROW_SOURCE, "experts_up_row", weights.macros), (weights.width // 16, parts + weights.routing.top_k),
        32 * _UP_WARPS, *stream, workspace.inputs, workspace.input_scales, workspace.logits, weights.correction_bias,
        weights.fc.codes, weights.fc.scales, weights.proj.pre_quant_scale, workspace.hidden,
        None if fc is None else fc.pre_quant_scale, None if fc is None else fc.codes, None if fc is None else fc.scales,
        None if proj is None else proj.pre_quant_scale, workspace.shared,
    )  # fmt: skip
    launch_in_turn(
        turns, kernel(ROW_SOURCE, "experts_down_row", weights.macros), (hidden // 16,), 32 * _ROW_DOWN_WARPS, workspace.hidden,
        workspace.shared, workspace.logits, weights.correction_bias, weights.proj.codes, weights.proj.scales,
        None if proj is None else proj.codes, None if proj is None else proj.scales, residual, norm.square_sums,
        shared=row_down_bytes(weights.width),
    )  # fmt: skip


def _router_blocks(experts: int, hidden: int) -> int:
    return -(-experts // _ROUTER_EXPERTS) + -(-hidden // _INPUT_VALUES)


def down_warps(hidden: int) -> int:
    """Warps of a block of `experts_down`: where an H200 has a multiprocessor for each block, as many as two blocks would have."""
    return 8 if hidden // 16 > 132 else 16


def up_bytes(hidden: int) -> int:
    """Dynamic shared memory of a block of `experts_up`: 8 rows' inputs, then its warps' partial sums in their place."""
    return max(COLUMNS * (2 * hidden + 64), shared_bytes(hidden, _BLOCK_WARPS, COLUMNS, tiles=4, normalised=False))


def row_down_bytes(width: int) -> int:
    """Dynamic shared memory of a block of `experts_down_row`: of each warp its weights and inputs."""
    groups = -(-(width // 64) // 2)
    return _ROW_DOWN_WARPS * (512 * min(groups, 8) + (32 + 128) * groups + -(-4 * groups // 16) * 16)
