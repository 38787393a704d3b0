"""The layer that stands where a float MoE layer stood."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trtvlm.model.moe import MLP, MoE
from trtvlm.plugins.int4_linear import packing
from trtvlm.plugins.int4_moe.op import int4_moe
from trtvlm.plugins.int4_moe.reference import Int4MLP, Routing

_PARTS = ("fc", "fc_scales", "proj", "proj_scales", "fc_pre", "proj_pre")


class Int4MoE(nn.Module):
    """Router, INT4 routed experts and INT4 shared expert; buffers as `Int4MLP` (`shared_*` for the shared one).

    router float32 [E, H], never quantized and float32 whatever the model's dtype; correction_bias float32 [E] or none.
    """

    router: Tensor
    correction_bias: Tensor | None

    def __init__(
        self,
        router: Tensor,
        experts: Int4MLP,
        routing: Routing,
        shared: Int4MLP | None = None,
        correction_bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.routing = routing
        self.register_buffer("router", router)
        self.register_buffer("correction_bias", correction_bias)
        for part in _PARTS:
            self.register_buffer(part, getattr(experts, part))
            self.register_buffer(f"shared_{part}", getattr(shared, part, None))

    @classmethod
    def from_float(cls, moe: MoE, group: int = packing.GROUP_SIZE) -> "Int4MoE":
        """Round a float layer to nearest, without calibration."""
        gate = moe.gate
        scoring = "sigmoid" if gate.sigmoid else "softmax"
        routing = Routing(gate.top_k, scoring, gate.normalise, gate.scaling, gate.groups, gate.top_groups)
        bias = gate.e_score_correction_bias.detach().float() if hasattr(gate, "e_score_correction_bias") else None
        rounded = [_rounded(cast(MLP, expert), group) for expert in moe.experts]
        experts = Int4MLP(*(torch.stack([getattr(expert, part) for expert in rounded]) for part in _PARTS[:4]))
        shared = _rounded(moe.shared_experts, group) if hasattr(moe, "shared_experts") else None
        return cls(gate.weight.detach().float(), experts, routing, shared, bias)

    def forward(self, x: Tensor) -> Tensor:
        """X [..., H] -> the same shape and dtype."""
        tokens = x.reshape(-1, x.shape[-1])
        logits = F.linear(tokens.float(), self.router.float())
        weights = [getattr(self, f"{prefix}{part}") for prefix in ("", "shared_") for part in _PARTS]
        choice = self.routing
        numbers = (choice.top_k, choice.scoring, choice.normalise, choice.scaling, choice.groups, choice.top_groups)
        return cast(Tensor, int4_moe(tokens, logits, *weights, self.correction_bias, *numbers)).view(x.shape)


def _rounded(mlp: MLP, group: int) -> Int4MLP:
    fc, proj = torch.cat((mlp.up_proj.weight, mlp.gate_proj.weight)).detach(), mlp.down_proj.weight.detach()
    scales = packing.group_scales(fc, group), packing.group_scales(proj, group)
    codes = packing.quantize_int4(fc, scales[0]), packing.quantize_int4(proj, scales[1])
    return Int4MLP(packing.pack(codes[0]), scales[0], packing.pack(codes[1]), scales[1])
