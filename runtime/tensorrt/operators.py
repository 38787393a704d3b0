"""The operators between segments, as their references define them: what a CPU runs, and what kernels are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from trtvlm.model.cache import KVCache, LatentCache
from trtvlm.model.chain import OperatorStep
from trtvlm.model.errors import UserError
from trtvlm.plugins.chain_weights import Weights, int4_experts, routing_of
from trtvlm.plugins.gqa_attention.reference import gqa_attention
from trtvlm.plugins.int4_moe.reference import int4_moe
from trtvlm.plugins.mla_attention.reference import mla_attention
from trtvlm.runtime.executor import MAX_DECODE_WIDTH

Launch = Callable[[int, int], None]
"""Runs an operator on the first `rows` rows of its buffers; the cache's cursor and they stay within `span` positions."""

_Compute = Callable[[Mapping[str, Tensor], Tensor, int], Tensor]
# Inputs by name, the cursor and the span -> the output.


class Operators(Protocol):
    """Binds the operators of a chain to its buffers."""

    def bind(self, step: OperatorStep, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Launch:
        """An operator over buffers [rows, width] by the step's own names. UserError: an operator nobody knows."""
        ...


def unknown(step: OperatorStep) -> UserError:
    """The error of a step with an operator that is not one of ours."""
    return UserError(
        f"chain.json has an operator '{step.operator}' that this trtvlm does not know: build the engine directory again."
    )


@dataclass(frozen=True)
class ReferenceOperators:
    """The references over the stored weights, computed in float32 and rounded to the buffers' type.

    Few rows, as a decode has, are computed one by one: so their bits do not depend on how many there are. cursor int32 [1]:
    where the rows of a pass go in the cache. It is read when an operator runs.
    """

    weights: Weights
    cache: KVCache
    cursor: Tensor

    def bind(self, step: OperatorStep, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Launch:
        """As `Operators.bind`."""
        makers = {
            "mla_attention": self._attention,
            "gqa_attention": self._attention,
            "int4_moe": self._int4_experts,
            "moe": self._float_experts,
        }
        if step.operator not in makers:
            raise unknown(step)
        (name,) = outputs
        out, compute = outputs[name], makers[step.operator](step)

        def launch(rows: int, span: int) -> None:
            each = 1 if rows <= MAX_DECODE_WIDTH else rows
            for first in range(0, rows, each):
                part = slice(first, first + each)
                values = {key: value[part].float() for key, value in inputs.items()}
                out[part] = compute(values, self.cursor + first, span)

        return launch

    def _attention(self, step: OperatorStep) -> _Compute:
        cache, numbers = self.cache.layers[step.layer], step.attributes
        common = (numbers["heads"], numbers["scale"], numbers["rope_theta"])
        # Positions past the span have no weight: they are left out, and the caches written through views.
        if isinstance(cache, LatentCache):
            latent, k_pe, kv_b = cache.latent[0], cache.k_pe[0], self.weights.get(step.weights["kv_b_proj"]).float()
            return lambda x, cursor, span: mla_attention(
                x["q"], x["latent"], x["k_pe"], kv_b, latent[:span], k_pe[:span], cursor, *common
            )
        k, v = cache.k[0], cache.v[0]
        return lambda x, cursor, span: gqa_attention(
            x["q"], x["k"], x["v"], k[:, :span], v[:, :span], cursor, *common
        )  # fmt: skip

    def _int4_experts(self, step: OperatorStep) -> _Compute:
        routing, bias = routing_of(step), self._optional(step, "e_score_correction_bias")
        experts, shared = int4_experts(step, self.weights)
        return lambda x, cursor, span: int4_moe(x["normed"], x["router_logits"], experts, routing, shared, bias)

    def _float_experts(self, step: OperatorStep) -> _Compute:
        routing, bias = routing_of(step), self._optional(step, "e_score_correction_bias")

        def weight(name: str) -> Tensor:
            return self.weights.float_weight(step.weights[f"{name}.weight"].removesuffix(".weight"))

        fc, proj = weight("fc"), weight("proj")
        has_shared = "shared_expert.fc.weight" in step.weights
        # As stored: a routed expert's fc is [up; gate], the shared one's fc is its gate and its gate its up.
        shared = [weight(f"shared_expert.{part}") for part in ("gate", "fc", "proj")] if has_shared else []

        def compute(inputs: Mapping[str, Tensor], cursor: Tensor, span: int) -> Tensor:
            x = inputs["normed"]
            index, share = routing(inputs["router_logits"], bias)
            total = torch.zeros_like(x)
            for expert in range(fc.shape[0]):
                rows, slot = (index == expert).nonzero(as_tuple=True)
                if rows.numel():
                    up, gate = fc[expert].chunk(2)
                    total.index_add_(0, rows, _mlp(x[rows], up, gate, proj[expert]) * share[rows, slot].unsqueeze(1))
            return total + _mlp(x, *shared) if shared else total

        return compute

    def _optional(self, step: OperatorStep, name: str) -> Tensor | None:
        return self.weights.get(step.weights[name]) if name in step.weights else None


def _mlp(x: Tensor, up: Tensor, gate: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
