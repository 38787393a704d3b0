"""INT4 products of many rows on the device (a prompt): launches, capturable in a CUDA graph."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from trtvlm.plugins.cuda.compiler import SHARED_LIMIT
from trtvlm.plugins.cuda.launch import Defines, defines, kernel

SOURCE = "int4_linear/gemm.cu"
TILE_ROWS, TILE_INPUTS, COLUMNS = 16, 64, 8
MAX_STAGES = 4


@dataclass(frozen=True)
class Shape:
    """How gemm.cuh cuts a product: a block has out_warps x row_warps warps of out_tiles x row_tiles tensor-core tiles.

    `blocks` run side by side on one multiprocessor. `speed` is how fast a full multiprocessor goes beside one of the
    first shape, and is only a guide for `best_shape`.
    """

    out_warps: int
    row_warps: int
    out_tiles: int
    row_tiles: int
    blocks: int
    speed: float

    @property
    def outputs(self) -> int:
        """Weight rows of a block."""
        return TILE_ROWS * self.out_warps * self.out_tiles

    @property
    def rows(self) -> int:
        """Activation rows of a block."""
        return COLUMNS * self.row_warps * self.row_tiles

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.out_warps * self.row_warps

    def shared(self, stages: int) -> int:
        """Bytes of shared memory a block takes: activations, codes and scales of each stage, and two tables of rows."""
        stage = 2 * TILE_INPUTS * self.rows + (TILE_INPUTS // 2 + 2) * self.outputs
        return stages * stage + 8 * self.rows

    def stages(self, shared_per_multiprocessor: int) -> int:
        """The most stages, 2 to 4, with which `blocks` blocks fit; a block also costs 1 KB (CUDA C++ guide, 16.2)."""
        share = min(SHARED_LIMIT, shared_per_multiprocessor // self.blocks - 1024)
        return max(2, min(MAX_STAGES, (share - 8 * self.rows) // (self.shared(1) - 8 * self.rows)))

    def macros(self, stages: int, step: int, *, gated: bool) -> Defines:
        """What gemm.cuh is compiled with. `step`: see there; the code grows with row_tiles / step."""
        return defines(
            OUT_WARPS=self.out_warps, ROW_WARPS=self.row_warps, OUT_TILES=self.out_tiles, ROW_TILES=self.row_tiles,
            BLOCKS=self.blocks, STAGES=stages, STEP=step, GATED=int(gated),
        )  # fmt: skip


WIDE = Shape(2, 2, 4, 8, 2, 1.0)
SHAPES = (WIDE, Shape(2, 2, 4, 4, 3, 0.85), Shape(2, 2, 2, 4, 4, 0.6))
_ALONE = 0.65  # the speed of a multiprocessor with one block, whose loads and products overlap less


def gemm(
    x: Tensor, codes: Tensor, scales: Tensor, out: Tensor, pqs: Tensor | None = None, shape: Shape | None = None
) -> None:
    """`out` half [M, N] = (x * pqs) @ weight^T, for x half [M, K] and the INT4 row tiles of the weight.

    codes int32 [N / 16, K / 64, 32, 4], scales half [N / 16, K / 64, 8, 2] (`int4_tiles`), pqs half [K] or none. A row's
    bits depend neither on M nor on `shape` (None: the one that suits the sizes). ValueError: tensors that do not fit.
    """
    _launch(x, codes, scales, out, pqs, None, shape, gated=False)


def gated_gemm(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    out: Tensor,
    pqs: Tensor | None = None,
    next_scale: Tensor | None = None,
    shape: Shape | None = None,
) -> None:
    """`out` half [M, N / 2] = up * silu(gate) * next_scale, for up and gate the halves of (x * pqs) @ weight^T.

    As `gemm`; next_scale half [N / 2] is the pre_quant_scale of the weight that follows.
    """
    _launch(x, codes, scales, out, pqs, next_scale, shape, gated=True)


def _launch(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    out: Tensor,
    pqs: Tensor | None,
    next_scale: Tensor | None,
    shape: Shape | None,
    *,
    gated: bool,
) -> None:
    tiles, groups = check_weight(codes, scales, lead=0, gated=gated)
    rows, outputs = x.shape[0], tiles * TILE_ROWS // (2 if gated else 1)
    check_half(x, (rows, groups * TILE_INPUTS), "the activations")
    check_half(out, (rows, outputs), "the result")
    check_half(next_scale, (outputs,), "the next pre_quant_scale")
    if rows == 0:
        return
    x = scaled(x, pqs)
    multiprocessors, shared = _device(x.device)
    shape = shape or best_shape(rows, tiles * TILE_ROWS, multiprocessors)
    stages = shape.stages(shared)
    grid = (_ceil(tiles * TILE_ROWS, shape.outputs), _ceil(rows, shape.rows))
    kernel(SOURCE, "gemm", shape.macros(stages, shape.row_tiles // 4, gated=gated))(
        grid, shape.threads, x, codes, scales, out, next_scale, rows, groups, outputs // TILE_ROWS,
        shared=shape.shared(stages),
    )  # fmt: skip


def best_shape(rows: int, outputs: int, multiprocessors: int) -> Shape:
    """The shape whose blocks keep the device busiest: large tiles read least, small ones are enough for all."""

    def time(shape: Shape) -> float:
        each = _ceil(_ceil(rows, shape.rows) * _ceil(outputs, shape.outputs), multiprocessors)
        # A block of fewer rows has less to do, in steps of a row tile a warp.
        height = min(shape.rows, _ceil(rows, COLUMNS * shape.row_warps) * COLUMNS * shape.row_warps)
        return each * height * shape.outputs / (shape.speed * (_ALONE if each == 1 else 1.0))

    return min(SHAPES, key=time)


def scaled(x: Tensor, pqs: Tensor | None) -> Tensor:
    """X half [M, K] * pqs half [K], rounded to half as the decoding kernels do; x itself without one."""
    check_half(pqs, (x.shape[-1],), "the pre_quant_scale")
    return x if pqs is None else x * pqs


def stages_on(device: torch.device, shape: Shape) -> int:
    """Stages of `shape` that suit a device."""
    return shape.stages(_device(device)[1])


def check_half(tensor: Tensor | None, shape: tuple[int, ...], name: str) -> None:
    """ValueError unless the tensor is none, or contiguous halves of a shape."""
    if tensor is not None and (
        tensor.dtype != torch.half or tuple(tensor.shape) != shape or not tensor.is_contiguous()
    ):
        raise ValueError(f"{name} must be contiguous halves {list(shape)}, not {tensor.dtype} {list(tensor.shape)}")


def check_weight(codes: Tensor, scales: Tensor, *, lead: int, gated: bool) -> tuple[int, int]:
    """Row tiles and groups of an INT4 weight with `lead` leading dimensions; ValueError if it is none."""
    fits = (
        codes.dim() == lead + 4
        and tuple(codes.shape[-2:]) == (32, 4)
        and tuple(scales.shape) == (*codes.shape[:-2], 8, 2)
        and (codes.dtype, scales.dtype) == (torch.int32, torch.half)
        and codes.is_contiguous()
        and scales.is_contiguous()
    )
    if not fits:
        raise ValueError(f"codes {list(codes.shape)} and scales {list(scales.shape)} are no INT4 tiles of one weight")
    tiles, groups = codes.shape[-4:-2]
    if gated and tiles % 2:
        raise ValueError(f"{tiles} row tiles do not divide into up and gate")
    return tiles, groups


@cache
def _device(device: torch.device) -> tuple[int, int]:
    """Multiprocessors of a device, and bytes of shared memory of each."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_multiprocessor


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
