"""Linear layers of 1 to 16 rows on the device, fused with what stands before and after them: launches, capturable."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trtvlm.plugins.cuda.launch import Defines, defines, kernel
from trtvlm.plugins.cuda.turns import Turns, launch_in_turn

SOURCE = "int4_linear/decode.cu"
COLUMNS = 8
MOST_ROWS = 2 * COLUMNS
"""Rows a decode kernel takes: two tiles of columns."""
_HALF_OUT, _RESIDUAL, _GATED = 0, 1, 2


@dataclass(frozen=True)
class Norm:
    """RMSNorm ahead of a product: weight half [in], and the sums of 16 squares of the residual, float32 [rows, in / 16]."""

    weight: Tensor
    square_sums: Tensor
    eps: float


@dataclass(frozen=True)
class LinearWeight:
    """A weight as the kernel reads it: INT4 row tiles, then row tiles of halves.

    codes int32 [tiles, in / 64, 32, 4] and scales half [tiles, in / 64, 8, 2] (`int4_tiles`), halves half [tiles, in / 64,
    4, 32, 8] (`half_tiles`); pre_quant_scale half [in] multiplies the inputs of the INT4 part. ValueError: neither part,
    or parts that do not fit.
    """

    codes: Tensor | None = None
    scales: Tensor | None = None
    pre_quant_scale: Tensor | None = None
    halves: Tensor | None = None

    def __post_init__(self) -> None:
        parts = [part for part in (self.codes, self.halves) if part is not None]
        if not parts or len({part.shape[1] for part in parts}) != 1:
            raise ValueError("a linear weight needs INT4 or half tiles, of as many inputs")

    @property
    def inputs(self) -> int:
        """Inputs of the layer."""
        part = self.codes if self.codes is not None else self.halves
        assert part is not None
        return 64 * part.shape[1]

    @property
    def int4_tiles(self) -> int:
        """Tiles of 16 INT4 outputs."""
        return 0 if self.codes is None else self.codes.shape[0]

    @property
    def half_tiles(self) -> int:
        """Tiles of 16 half outputs."""
        return 0 if self.halves is None else self.halves.shape[0]


def linear(
    x: Tensor,
    weight: LinearWeight,
    out: Tensor,
    rows: int,
    norm: Norm | None = None,
    half_out: Tensor | None = None,
    turns: Turns | None = None,
) -> None:
    """out half [rows, INT4 outputs] and half_out half [rows, half outputs] = x @ weight^T; a half weight alone goes to `out`.

    x half [rows, in], or with `norm` the residual stream float32 [rows, in]. `turns`: of the step, if its
    launches overlap. ValueError here and below: more rows than 16.
    """
    if not weight.int4_tiles:
        half_out = out
    _launch(x, weight, rows, norm, _HALF_OUT, turns, out=out, half_out=half_out)


def add_linear(
    x: Tensor, weight: LinearWeight, residual: Tensor, square_sums: Tensor, rows: int, turns: Turns | None = None
) -> None:
    """residual float32 [rows, outputs] += x @ weight^T in place, and square_sums float32 [rows, outputs / 16] of it."""
    _launch(x, weight, rows, None, _RESIDUAL, turns, residual=residual, square_sums=square_sums)


def gated_linear(
    x: Tensor,
    weight: LinearWeight,
    out: Tensor,
    rows: int,
    norm: Norm | None = None,
    next_scale: Tensor | None = None,
    turns: Turns | None = None,
) -> None:
    """out half [rows, outputs / 2] = silu(gate) * up * next_scale of a weight [up; gate]."""
    _launch(x, weight, rows, norm, _GATED, turns, out=out, next_scale=next_scale)


def macros(
    inputs: int, int4_tiles: int, half_tiles: int, *, epilogue: int, normalised: bool, scaled: bool, one_row: bool
) -> tuple[Defines, int, int]:
    """The kernel's macros, its blocks in x and its warps; but for ONE_ROW they follow from the layer's sizes alone."""
    pair = 2 if epilogue == _GATED else 1
    groups = inputs // 64
    warps = 8 if groups <= 64 else 16
    count, halves = int4_tiles // pair, half_tiles // pair
    # With nothing to normalise a block is cheap, and small ones spread better.
    block = max(1, min(4, count // 96)) if normalised and epilogue != _GATED else 1
    values = defines(
        IN_FEATURES=inputs, BLOCK_WARPS=warps, INT4_TILES=int4_tiles, HALF_TILES=half_tiles, INT4_BLOCK=block, HALF_BLOCK=1,
        NORMALISED=int(normalised), PRE_SCALED=int(scaled), EPILOGUE=epilogue, ONE_ROW=int(one_row),
    )  # fmt: skip
    return values, -(-count // block) + halves, warps


def shared_bytes(inputs: int, warps: int, rows: int, *, tiles: int, staged: bool, factors: int = 0) -> int:
    """Shared memory of a block: of each warp its activations, if they are staged there, and later its partial sums.

    factors: how many vectors of a factor for each input are beside them.
    """
    steps = -(-(inputs // 64) // warps)
    activations = (rows * (steps * 64 + 8) + factors * steps * 64) * 2 if staged else 0
    return warps * max(tiles * COLUMNS * 20 * 4, activations)


def norm_factors(scaled: bool) -> int:
    """What several rows' inputs are multiplied with: a norm's weight, and pre_quant_scale if there is one."""
    return 1 + scaled


def _launch(
    x: Tensor,
    weight: LinearWeight,
    rows: int,
    norm: Norm | None,
    epilogue: int,
    turns: Turns | None,
    *,
    out: Tensor | None = None,
    half_out: Tensor | None = None,
    residual: Tensor | None = None,
    square_sums: Tensor | None = None,
    next_scale: Tensor | None = None,
) -> None:
    check_rows(rows)
    scale = weight.pre_quant_scale
    values, blocks, warps = macros(
        weight.inputs, weight.int4_tiles, weight.half_tiles, epilogue=epilogue, normalised=norm is not None,
        scaled=scale is not None, one_row=rows == 1,
    )  # fmt: skip
    parameters = dict(values)
    tiles = int(parameters["INT4_BLOCK"]) * (2 if epilogue == _GATED else 1)
    shared = shared_bytes(
        weight.inputs, warps, min(rows, COLUMNS), tiles=tiles, staged=norm is not None or rows == 1,
        factors=norm_factors(scale is not None) if norm is not None and rows > 1 else 0,
    )  # fmt: skip
    launch_in_turn(
        turns,
        kernel(SOURCE, "linear", values),
        (blocks, -(-rows // COLUMNS)),
        32 * warps,
        x,
        None if norm is None else norm.square_sums,
        None if norm is None else norm.weight,
        0.0 if norm is None else norm.eps,
        scale,
        weight.codes,
        weight.scales,
        weight.halves,
        out,
        0 if out is None else out.shape[-1],
        half_out,
        0 if half_out is None else half_out.shape[-1],
        residual,
        square_sums,
        next_scale,
        rows,
        shared=shared,
    )


def check_rows(rows: int) -> None:
    """ValueError unless the kernels take so many rows."""
    if not 1 <= rows <= MOST_ROWS:
        raise ValueError(f"the decode kernels take 1 to {MOST_ROWS} rows, not {rows}")


def empty_half(rows: int, width: int, device: torch.device | str = "cuda") -> Tensor:
    """A buffer for activations: half [rows, width]."""
    return torch.empty(rows, width, dtype=torch.half, device=device)
