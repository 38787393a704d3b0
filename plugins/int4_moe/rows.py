"""The experts of 1 to 8 rows in one launch, with the bits of a row alone."""

from __future__ import annotations

import torch
from torch import Tensor

from trtvlm.plugins.cuda.launch import kernel
from trtvlm.plugins.cuda.turns import Turns, launch_in_turn
from trtvlm.plugins.int4_linear.decode import COLUMNS
from trtvlm.plugins.int4_moe.layer import DecodeWorkspace, MoEWeights, parts
from trtvlm.plugins.int4_moe.row import EXPERT_WARPS, MERGED, expert_bytes

SOURCE = "int4_moe/rows.cu"
SLOTS = 4


def experts_rows(
    residual: Tensor,
    square_sums: Tensor,
    weights: MoEWeights,
    workspace: DecodeWorkspace,
    rows: int,
    turns: Turns | None = None,
) -> None:
    """residual float32 [rows, hidden] += what the experts give, after `route`; square_sums are renewed. rows: at most 8."""
    experts, hidden = weights.experts, weights.hidden
    groups = weights.width // 64
    entries = min(rows * weights.routing.top_k, experts * (1 if rows <= SLOTS else COLUMNS // SLOTS))
    routed, summing = min(groups * entries, _at_once(residual)), -(-rows // SLOTS) * (hidden // MERGED)
    _, proj_codes, proj_scales = parts(weights.shared_proj)
    launch_in_turn(
        turns, kernel(SOURCE, "experts_rows", weights.macros), (routed + summing,), 32 * EXPERT_WARPS,
        workspace.inputs, workspace.input_scales, workspace.logits, weights.correction_bias,
        weights.fc.codes, weights.fc.scales, weights.proj.pre_quant_scale, weights.proj.codes, weights.proj.scales,
        workspace.given, proj_codes, proj_scales, workspace.shared, residual, square_sums, workspace.done, rows, routed,
        shared=expert_bytes(weights, SLOTS), counted=summing,
    )  # fmt: skip


def _at_once(tensor: Tensor) -> int:
    """How many blocks are there at once, two to a multiprocessor; a few where kernels are emulated."""
    if not tensor.is_cuda:
        return 4
    count: int = torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return 2 * count
