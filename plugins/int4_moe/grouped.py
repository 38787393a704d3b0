"""Routed experts over many rows on the device (a prompt): rows grouped by expert, nothing read back to the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trtvlm.plugins.cuda.launch import defines, kernel
from trtvlm.plugins.int4_linear.gemm import TILE_INPUTS, TILE_ROWS, WIDE, check_half, check_weight, scaled, stages_on

SOURCE, PLAN_SOURCE = "int4_moe/grouped.cu", "int4_moe/plan.cu"
SHAPE = WIDE
MAX_EXPERTS = 256  # plan.cu counts them for each of 32 warps in shared memory
_COMBINE_THREADS = 256


@dataclass(frozen=True)
class Plan:
    """Which (row, slot) pairs each block of the products takes; a slot's number is row * k + slot.

    order int32 [M * k]: slot numbers sorted by expert, stable. entries int32 [T, 4]: expert, first place in the order,
    rows (at most SHAPE.rows), 0; all zeros past the last. T depends on the sizes only, so a CUDA graph may hold it.
    """

    order: Tensor
    entries: Tensor


def entry_count(slots: int, experts: int) -> int:
    """The most entries a plan can need: each expert that is chosen may leave one block unfilled."""
    chosen = min(slots, experts)
    return (slots + chosen * (SHAPE.rows - 1)) // SHAPE.rows


def plan_groups(index: Tensor, experts: int) -> Plan:
    """Group the chosen experts int64 [M, k], each in 0..experts - 1. On a CUDA device one launch, else `reference_plan`.

    ValueError: an index of another type, or too many experts.
    """
    if index.dtype != torch.int64 or index.dim() != 2:
        raise ValueError(f"the chosen experts must be int64 [M, k], not {index.dtype} {list(index.shape)}")
    if not 0 < experts <= MAX_EXPERTS:
        raise ValueError(f"1 to {MAX_EXPERTS} experts can be grouped, not {experts}")
    if not index.is_cuda:
        return reference_plan(index, experts)
    slots = index.numel()
    count = entry_count(slots, experts)
    plan = Plan(*(torch.empty(shape, dtype=torch.int32, device=index.device) for shape in ((slots,), (count, 4))))
    macros = defines(EXPERTS=experts, TOP_K=index.shape[1], BLOCK_ROWS=SHAPE.rows)
    launch = kernel(PLAN_SOURCE, "plan_groups", macros)
    launch((1,), 1024, index.contiguous(), plan.order, plan.entries, slots, count)
    return plan


def reference_plan(index: Tensor, experts: int) -> Plan:
    """`plan_groups` in torch."""
    flat = index.flatten()
    counts = torch.bincount(flat, minlength=experts)
    starts = counts.cumsum(0) - counts
    entries = torch.zeros(entry_count(flat.numel(), experts), 4, dtype=torch.int32)
    used = [
        (expert, start + row, min(SHAPE.rows, count - row), 0)
        for expert, (start, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True))
        for row in range(0, count, SHAPE.rows)
    ]
    if used:
        entries[: len(used)] = torch.tensor(used, dtype=torch.int32)
    return Plan(flat.argsort(stable=True).to(torch.int32), entries)


def experts(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    fc: Tensor,
    fc_scales: Tensor,
    fc_pqs: Tensor | None,
    proj: Tensor,
    proj_scales: Tensor,
    proj_pqs: Tensor | None,
    width: int,
) -> Tensor:
    """Weighted sum, in slot order, of the chosen experts' down(up * silu(gate) * proj_pqs) -> float32 [M, H].

    x half [M, H], index int64 [M, k], weight float32 [M, k]; fc and proj are INT4 row tiles (`int4_tiles`) of E experts:
    fc [up; gate] of 2 * width rows by H, proj of H rows by width. Each result is rounded to half before the sum, which
    is float32. A row's bits do not depend on the other rows. ValueError: tensors that do not fit.
    """
    rows, top_k = index.shape
    fc_tiles, groups = check_weight(fc, fc_scales, lead=1, gated=True)
    proj_tiles, proj_groups = check_weight(proj, proj_scales, lead=1, gated=False)
    hidden = groups * TILE_INPUTS
    if (fc_tiles * TILE_ROWS, proj_tiles * TILE_ROWS, proj_groups * TILE_INPUTS) != (2 * width, hidden, width):
        raise ValueError(f"fc {list(fc.shape)} and proj {list(proj.shape)} are not of experts {width} wide")
    check_half(x, (rows, hidden), "the activations")
    check_half(proj_pqs, (width,), "the second pre_quant_scale")
    if weight.dtype != torch.float32 or weight.shape != index.shape:
        raise ValueError(f"the experts' weights must be float32 {list(index.shape)}, not {weight.dtype}")
    out = torch.empty(rows, hidden, dtype=torch.float32, device=x.device)
    if rows == 0:
        return out
    plan = plan_groups(index, fc.shape[0])
    slots = rows * top_k
    inner = torch.empty(slots, width, dtype=torch.half, device=x.device)
    results = torch.empty(slots, hidden, dtype=torch.half, device=x.device)
    product(scaled(x, fc_pqs), fc, fc_scales, inner, proj_pqs, plan, top_k, gated=True)
    product(inner, proj, proj_scales, results, None, plan, top_k, gated=False)
    macros = defines(EXPERTS=fc.shape[0], TOP_K=top_k, BLOCK_ROWS=SHAPE.rows)
    words = rows * hidden // 8
    kernel(PLAN_SOURCE, "combine", macros)(
        (-(-words // _COMBINE_THREADS),), _COMBINE_THREADS, results, weight.contiguous(), out, hidden // 8, words
    )
    return out


def product(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    out: Tensor,
    next_scale: Tensor | None,
    plan: Plan,
    top_k: int,
    *,
    gated: bool,
) -> None:
    """One product of the experts, half to half.

    Gated: x [M, H] by rows -> out [M * k, width] in the plan's order; else x in that order -> out [M * k, H] by slot.
    """
    tiles, groups = codes.shape[1:3]
    stages = stages_on(x.device, SHAPE)
    grid = (-(-tiles * TILE_ROWS // SHAPE.outputs), plan.entries.shape[0])
    kernel(SOURCE, "grouped", SHAPE.macros(stages, 1, gated=gated))(
        grid, SHAPE.threads, x, codes, scales, out, next_scale, plan.entries, plan.order, top_k, groups,
        tiles // 2 if gated else tiles, shared=SHAPE.shared(stages),
    )  # fmt: skip
