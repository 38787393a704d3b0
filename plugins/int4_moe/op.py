"""torch.ops.trtvlm.int4_moe; CUDA has kernels, other devices and what these do not take run the reference."""

from typing import Any

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
    return reference.int4_moe(
        *_arguments(
            x,
            router_logits,
            fc,
            fc_scales,
            proj,
            proj_scales,
            fc_pre,
            proj_pre,
            shared_fc,
            shared_fc_scales,
            shared_proj,
            shared_proj_scales,
            shared_fc_pre,
            shared_proj_pre,
            correction_bias,
            top_k,
            scoring,
            normalise,
            scaling,
            groups,
            top_groups,
        )
    )


@int4_moe.register_kernel("cuda")
def _(*flat: Any) -> Tensor:
    from trtvlm.plugins.int4_moe import device

    x, router_logits, experts, routing, shared, correction_bias = _arguments(*flat)
    run = device.int4_moe if device.supports(x, experts, shared) else reference.int4_moe
    return run(x, router_logits, experts, routing, shared, correction_bias)


Arguments = tuple[Tensor, Tensor, Int4MLP, Routing, Int4MLP | None, Tensor | None]


def _arguments(x: Tensor, router_logits: Tensor, *flat: Any) -> Arguments:
    """The operator's arguments as `reference.int4_moe` takes them."""
    fc, fc_scales, proj, proj_scales, fc_pre, proj_pre, *rest = flat
    shared_fc, shared_fc_scales, shared_proj, shared_proj_scales, shared_fc_pre, shared_proj_pre, bias, *numbers = rest
    experts, shared = Int4MLP(fc, fc_scales, proj, proj_scales, fc_pre, proj_pre), None
    if shared_fc is not None:
        weights = (shared_fc, shared_fc_scales, shared_proj, shared_proj_scales)
        shared = Int4MLP(*weights, shared_fc_pre, shared_proj_pre)
    return x, router_logits, experts, Routing(*numbers), shared, bias


@int4_moe.register_fake
def _(x: Tensor, router_logits: Tensor, fc: Tensor, *_rest: object) -> Tensor:
    require(x.dim() == 2, f"x has {x.dim()} dimensions, not 2")
    require(x.shape[1] == fc.shape[2], f"x is {x.shape[1]} wide, the experts {fc.shape[2]}")
    require(router_logits.shape[1] == fc.shape[0], "one router logit an expert")
    return torch.empty_like(x)
