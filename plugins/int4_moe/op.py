"""torch.ops.trtvlm.int4_moe; every device runs the reference until it has a kernel."""

import torch
from torch import Tensor

from trtvlm.plugins.int4_moe import reference
from trtvlm.plugins.int4_moe.reference import Int4MLP, Routing
from trtvlm.plugins.shapes import require


@torch.library.custom_op("trtvlm::int4_moe", mutates_args=())
def int4_moe(
    x: Tensor,
    router_logits: Tensor,
    fc: Tensor,
    fc_scales: Tensor,
    proj: Tensor,
    proj_scales: Tensor,
    fc_pre: Tensor | None,
    proj_pre: Tensor | None,
    shared_fc: Tensor | None,
    shared_fc_scales: Tensor | None,
    shared_proj: Tensor | None,
    shared_proj_scales: Tensor | None,
    shared_fc_pre: Tensor | None,
    shared_proj_pre: Tensor | None,
    correction_bias: Tensor | None,
    top_k: int,
    scoring: str,
    normalise: bool,
    scaling: float,
    groups: int,
    top_groups: int,
) -> Tensor:
    """`reference.int4_moe` with its weights flat: x [M, H], router_logits float32 [M, E] -> [M, H].

    Tensors as `reference.Int4MLP` (stacked over experts; `shared_*` one MLP, all or none), numbers as
    `reference.Routing`.
    """
    experts = Int4MLP(fc, fc_scales, proj, proj_scales, fc_pre, proj_pre)
    shared = None
    if shared_fc is not None:
        assert shared_fc_scales is not None
        assert shared_proj is not None
        assert shared_proj_scales is not None
        weights = (shared_fc, shared_fc_scales, shared_proj, shared_proj_scales)
        shared = Int4MLP(*weights, shared_fc_pre, shared_proj_pre)
    routing = Routing(top_k, scoring, normalise, scaling, groups, top_groups)
    return reference.int4_moe(x, router_logits, experts, routing, shared, correction_bias)


@int4_moe.register_fake
def _(x: Tensor, router_logits: Tensor, fc: Tensor, *_rest: object) -> Tensor:
    require(x.dim() == 2, f"x has {x.dim()} dimensions, not 2")
    require(x.shape[1] == fc.shape[2], f"x is {x.shape[1]} wide, the experts {fc.shape[2]}")
    require(router_logits.shape[1] == fc.shape[0], "one router logit an expert")
    return torch.empty_like(x)
