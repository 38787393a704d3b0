"""The weights and numbers of a chain's operators, out of the quantized checkpoint."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from trtvlm.model.chain import OperatorStep
from trtvlm.plugins.int4_moe.reference import Int4MLP, Routing
from trtvlm.plugins.quantized_checkpoint import PREQUANT, SCALES


class Weights(Protocol):
    """Where an operator's weights come from: `trtvlm.plugins.quantized_checkpoint.QuantizedReader`."""

    def get(self, name: str) -> Tensor:
        """One tensor of rank0.safetensors."""
        ...

    def float_weight(self, name: str) -> Tensor:
        """The float32 weight of a linear layer, whatever it is stored as."""
        ...


def routing_of(step: OperatorStep) -> Routing:
    """How a step chooses experts."""
    return Routing(
        *(step.attributes[name] for name in ("top_k", "scoring", "normalise", "scaling", "groups", "top_groups"))
    )


def int4_experts(step: OperatorStep, weights: Weights) -> tuple[Int4MLP, Int4MLP | None]:
    """The routed experts of an int4_moe step, and its shared expert if it has one."""

    def part(name: str) -> tuple[Tensor, Tensor, Tensor]:
        found = [weights.get(step.weights[f"{name}.{suffix}"]) for suffix in ("weight", SCALES["int4"], PREQUANT)]
        return found[0], found[1], found[2]

    fc, proj = part("fc"), part("proj")
    # The pre-quant scales of a layer's experts are equal.
    experts = Int4MLP(fc[0], fc[1], proj[0], proj[1], fc[2][0].float(), proj[2][0].float())
    if "shared_expert.fc.weight" not in step.weights:
        return experts, None
    gate, up, down = (part(f"shared_expert.{name}") for name in ("fc", "gate", "proj"))
    both = torch.cat((up[0], gate[0])), torch.cat((up[1], gate[1]))
    return experts, Int4MLP(*both, down[0], down[1], gate[2].float(), down[2].float())
