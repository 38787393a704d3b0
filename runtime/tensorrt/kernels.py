"""The operators between segments as the project's CUDA kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trtvlm.model.cache import KVCache, LatentCache
from trtvlm.model.chain import OperatorStep
from trtvlm.model.config import LanguageConfig
from trtvlm.model.errors import UserError
from trtvlm.model.rope import rope_table
from trtvlm.plugins.chain_weights import Weights, int4_experts, routing_of
from trtvlm.plugins.gqa_attention.boundary import GQABoundary
from trtvlm.plugins.int4_moe.boundary import MoEBoundary
from trtvlm.plugins.int4_moe.reference import Int4MLP
from trtvlm.plugins.mla_attention.boundary import MLABoundary
from trtvlm.plugins.mla_attention.decode import MLAWeights
from trtvlm.runtime.tensorrt.operators import Launch, unknown


@dataclass
class KernelOperators:
    """`Operators` on the cache's device. Layers share their workspace, as they run one after the other.

    cursor int32 [1] on the device: where the rows of a pass go in the cache. UserError: what the kernels do not run.
    """

    weights: Weights
    cache: KVCache
    cursor: Tensor
    config: LanguageConfig
    _workspaces: dict[str, Tensor] = field(default_factory=dict)
    _table: tuple[Tensor, Tensor] | None = None

    def bind(self, step: OperatorStep, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Launch:
        """As `Operators.bind`."""
        binders: dict[str, Callable[[OperatorStep, Mapping[str, Tensor], Tensor], Launch]] = {
            "mla_attention": self._latent_attention,
            "gqa_attention": self._head_attention,
            "int4_moe": self._experts,
        }
        if step.operator == "moe":
            raise UserError("The CUDA kernels run INT4 experts: build with --quant int4_awq, or use --executor torch.")
        if step.operator not in binders:
            raise unknown(step)
        (out,) = outputs.values()
        try:
            return binders[step.operator](step, inputs, out)
        except ValueError as error:
            raise UserError(f"The CUDA kernels cannot run layer {step.layer}: {error}; use --executor torch.") from None

    def _latent_attention(self, step: OperatorStep, x: Mapping[str, Tensor], out: Tensor) -> Launch:
        cache, config = self.cache.layers[step.layer], self.config
        assert isinstance(cache, LatentCache)
        kv_b = self.weights.get(step.weights["kv_b_proj"]).to(out.device)
        sizes = (config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim)
        run = MLABoundary(MLAWeights.pack(kv_b, None, *sizes), self._rope(out.device), self.cache.max_len)
        memory = self._workspace("attention", run.workspace_bytes, out.device)
        latents, rotated = cache.latent[0], cache.k_pe[0]

        def launch(rows: int, span: int) -> None:
            q, latent, k_pe = (x[name][:rows] for name in ("q", "latent", "k_pe"))
            run(q, latent, k_pe, latents, rotated, self.cursor, out[:rows], memory, span)

        return launch

    def _head_attention(self, step: OperatorStep, x: Mapping[str, Tensor], out: Tensor) -> Launch:
        cache, config = self.cache.layers[step.layer], self.config
        assert not isinstance(cache, LatentCache)
        heads, width = config.num_attention_heads, config.head_dim
        run = GQABoundary(heads, width, self._rope(out.device), self.cache.max_len)
        memory = self._workspace("attention", run.workspace_bytes, out.device)
        keys, values = cache.k[0], cache.v[0]

        def launch(rows: int, span: int) -> None:
            q, k, v = (x[name][:rows] for name in ("q", "k", "v"))
            run(q, k, v, keys, values, self.cursor, out[:rows], memory, span)

        return launch

    def _experts(self, step: OperatorStep, x: Mapping[str, Tensor], out: Tensor) -> Launch:
        experts, shared = int4_experts(step, self.weights)
        name = step.weights.get("e_score_correction_bias")
        bias = None if name is None else self.weights.get(name).to(out.device)
        there = None if shared is None else _to(shared, out.device)
        run = MoEBoundary.pack(_to(experts, out.device), routing_of(step), there, bias)
        memory = self._workspace("experts", run.workspace_bytes, out.device)
        return lambda rows, span: run(x["normed"][:rows], x["router_logits"][:rows], out[:rows], memory)

    def _rope(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._table is None:
            self._table = rope_table(self.config.rope_dim, self.cache.max_len, self.config.rope_theta, device)
        return self._table

    def _workspace(self, kind: str, size: int, device: torch.device) -> Tensor:
        held = self._workspaces.get(kind)
        if held is None or held.numel() < size:
            # A smaller one stays with the layers that were bound to it.
            held = self._workspaces[kind] = torch.zeros(size, dtype=torch.uint8, device=device)
        return held


def _to(mlp: Int4MLP, device: torch.device) -> Int4MLP:
    moved: dict[str, Any] = {name: None if value is None else value.to(device) for name, value in vars(mlp).items()}
    return Int4MLP(**moved)
