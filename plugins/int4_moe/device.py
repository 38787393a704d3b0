"""`int4_moe` on the device: the decoding kernels for few rows, grouped products for more.

The decoding kernels' `route` makes logits, inputs and the shared expert's first product from the residual stream; the
operator is given the logits and the normalised input, so it fills in what `route` would have left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trtvlm.plugins.cuda.repacked import Repacked
from trtvlm.plugins.cuda.tiles import INPUTS, int4_tiles
from trtvlm.plugins.int4_linear import decode as linear
from trtvlm.plugins.int4_linear.decode import MOST_ROWS, LinearWeight
from trtvlm.plugins.int4_linear.device import half
from trtvlm.plugins.int4_linear.gemm import gated_gemm, gemm
from trtvlm.plugins.int4_moe.decode import experts_down, experts_up, fix_inputs
from trtvlm.plugins.int4_moe.grouped import MAX_EXPERTS, experts
from trtvlm.plugins.int4_moe.layer import MoEWeights, MoEWorkspace, Tiles
from trtvlm.plugins.int4_moe.reference import Int4MLP, Routing

_AT_ONCE = 8  # experts that are repacked together: codes take many times their size meanwhile


def _pack(
    fc: Tensor, fc_scales: Tensor, proj: Tensor, proj_scales: Tensor, fc_pre: Tensor | None, proj_pre: Tensor | None
) -> tuple[Tiles, Tiles]:
    return Tiles(*_tiles(fc, fc_scales), half(fc_pre)), Tiles(*_tiles(proj, proj_scales), half(proj_pre))


def _tiles(packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    if packed.dim() == 2:
        return int4_tiles(packed, scales)
    parts = [int4_tiles(*pair) for pair in zip(packed.split(_AT_ONCE), scales.split(_AT_ONCE), strict=True)]
    codes, scale = (torch.cat(part) for part in zip(*parts, strict=True))
    return codes, scale


_weights = Repacked(_pack)


def supports(x: Tensor, mlp: Int4MLP, shared: Int4MLP | None) -> bool:
    """Whether kernels take these: halves, and sizes and groups of 64."""
    if x.dtype != torch.half or mlp.fc.shape[0] > MAX_EXPERTS:
        return False
    for part in (mlp, shared):
        if part is not None:
            for codes, scales in ((part.fc, part.fc_scales), (part.proj, part.proj_scales)):
                if codes.shape[-1] != INPUTS * scales.shape[-1] or scales.shape[-2] % INPUTS:
                    return False
    return True


def int4_moe(
    x: Tensor,
    router_logits: Tensor,
    mlp: Int4MLP,
    routing: Routing,
    shared: Int4MLP | None = None,
    correction_bias: Tensor | None = None,
) -> Tensor:
    """`reference.int4_moe` of what `supports` allows: x half [M, H] -> half [M, H], rounded once after all sums."""
    rows = x.shape[0]
    if not rows:
        return torch.empty_like(x)
    fc, proj = _packed(mlp)
    beside = (None, None) if shared is None else _packed(shared)
    x, router_logits = x.contiguous(), router_logits.float().contiguous()
    bias = None if correction_bias is None else correction_bias.float().contiguous()
    if rows <= MOST_ROWS:
        try:
            # The kernels read no router here: its shape is all that matters.
            router = torch.empty(x.shape[1] // 16, fc.codes.shape[0], 16, device="meta")
            weights = MoEWeights(router, bias, _ungrouped(routing, bias), fc, proj, *beside)
        except ValueError:
            pass  # more experts, or groups: in parts, then
        else:
            return _few(x, router_logits, weights)
    index, weight = routing(router_logits, bias)
    width = 64 * proj.codes.shape[2]
    out = experts(
        x, index, weight, fc.codes, fc.scales, fc.pre_quant_scale, proj.codes, proj.scales, proj.pre_quant_scale, width
    )
    if beside[0] is not None and beside[1] is not None:
        out += _shared(x, *beside)
    return out.to(x.dtype)


def _packed(mlp: Int4MLP) -> tuple[Tiles, Tiles]:
    return _weights(mlp.fc, mlp.fc_scales, mlp.proj, mlp.proj_scales, mlp.fc_pre, mlp.proj_pre)


def _ungrouped(routing: Routing, bias: Tensor | None) -> Routing:
    """The same routing: groups count with a correction bias only (`Routing`)."""
    if bias is not None or routing.groups == 1:
        return routing
    return Routing(routing.top_k, routing.scoring, routing.normalise, routing.scaling)


def _few(x: Tensor, router_logits: Tensor, weights: MoEWeights) -> Tensor:
    rows, hidden = x.shape
    workspace = MoEWorkspace.allocate(weights, rows, x.device)
    workspace.logits.copy_(router_logits)
    fix_inputs(x, weights, workspace, rows)
    if weights.shared_fc is not None and weights.shared_proj is not None:
        first = weights.shared_fc
        weight = LinearWeight(first.codes, first.scales, first.pre_quant_scale)
        linear.gated_linear(x, weight, workspace.shared, rows, next_scale=weights.shared_proj.pre_quant_scale)
    residual = torch.zeros(rows, hidden, device=x.device)
    sums = torch.empty(rows, hidden // 16, device=x.device)
    experts_up(weights, workspace, rows)
    experts_down(residual, sums, weights, workspace, rows)
    return residual.to(x.dtype)


def _shared(x: Tensor, fc: Tiles, proj: Tiles) -> Tensor:
    inner = x.new_empty(x.shape[0], 64 * proj.codes.shape[1])
    gated_gemm(x, fc.codes, fc.scales, inner, fc.pre_quant_scale, proj.pre_quant_scale)
    out = torch.empty_like(x)
    gemm(inner, proj.codes, proj.scales, out)
    return out
