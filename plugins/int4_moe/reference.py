"""What int4_moe means."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trtvlm.plugins.int4_linear.reference import int4_linear


@dataclass(frozen=True)
class Int4MLP:
    """SwiGLU weights, of one expert or stacked over experts (leading dimension E), as TensorRT-LLM lays experts out.

    fc int8 [I, H] is [up; gate] (2I rows, packed in pairs) with scales [2I, H / group] and pre_quant_scale [H];
    proj int8 [H / 2, I] is down, with scales [H, I / group] and pre_quant_scale [I]. The pre-quant scales are one for
    all experts.
    """

    fc: Tensor
    fc_scales: Tensor
    proj: Tensor
    proj_scales: Tensor
    fc_pre: Tensor | None = None
    proj_pre: Tensor | None = None

    def __call__(self, x: Tensor, expert: int | None = None) -> Tensor:
        """down(silu(gate(x)) * up(x)) of x [M, H], by expert number `expert` if stacked -> [M, H]."""
        fc, fc_scales, proj, proj_scales = (
            part if expert is None else part[expert] for part in (self.fc, self.fc_scales, self.proj, self.proj_scales)
        )
        up, gate = int4_linear(x, fc, fc_scales, self.fc_pre).chunk(2, dim=-1)
        return int4_linear(F.silu(gate) * up, proj, proj_scales, self.proj_pre)


@dataclass(frozen=True)
class Routing:
    """How experts are chosen; names as in the checkpoint's config.

    `scoring` "softmax" or "sigmoid"; with a correction bias the choice is by score plus bias (noaux_tc, DeepSeek-V3,
    arXiv 2412.19437), among the best `top_groups` of `groups`.
    """

    top_k: int
    scoring: str = "softmax"
    normalise: bool = False
    scaling: float = 1.0
    groups: int = 1
    top_groups: int = 1

    def __call__(self, logits: Tensor, correction_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Router logits [M, E] -> chosen experts int64 [M, k] and their weights float32 [M, k]."""
        logits = logits.float()
        scores = logits.sigmoid() if self.scoring == "sigmoid" else logits.softmax(-1)
        choice = scores if correction_bias is None else scores + correction_bias.float()
        if correction_bias is not None and self.groups > 1:
            grouped = choice.view(choice.shape[0], self.groups, -1)
            strength = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
            keep = torch.zeros_like(strength, dtype=torch.bool)
            keep.scatter_(1, strength.topk(self.top_groups, dim=-1).indices, True)
            # 0 and not -inf, as the official gate: a kept expert with a negative score can lose to a dropped one.
            choice = torch.where(keep.unsqueeze(-1), grouped, 0.0).flatten(1)
        index = choice.topk(self.top_k, dim=-1).indices
        weight = scores.gather(1, index)
        if self.normalise and self.top_k > 1:
            weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
        return index, weight * self.scaling


def int4_experts(x: Tensor, index: Tensor, weight: Tensor, experts: Int4MLP, shared: Int4MLP | None = None) -> Tensor:
    """Weighted sum of the chosen experts' outputs, in float32, rounded to x's dtype; then the shared expert's is added.

    x [M, H], index int64 [M, k], weight float32 [M, k] -> [M, H].
    """
    total = torch.zeros_like(x, dtype=torch.float32)
    for expert in range(experts.fc.shape[0]):
        rows, slot = (index == expert).nonzero(as_tuple=True)
        if rows.numel():
            total.index_add_(0, rows, experts(x[rows], expert).float() * weight[rows, slot].unsqueeze(1))
    out = total.to(x.dtype)
    return out if shared is None else out + shared(x)


def int4_moe(
    x: Tensor,
    router_logits: Tensor,
    experts: Int4MLP,
    routing: Routing,
    shared: Int4MLP | None = None,
    correction_bias: Tensor | None = None,
) -> Tensor:
    """The whole layer after its router's product: x [M, H], router_logits float32 [M, E] -> [M, H]."""
    index, weight = routing(router_logits, correction_bias)
    return int4_experts(x, index, weight, experts, shared)
