"""DeepSeekMoE (arXiv 2401.06066): routed experts, shared experts and the two routings of DeepSeek-VL2."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trtvlm.model.config import LanguageConfig


class MLP(nn.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> the same shape."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Router(nn.Module):
    """Chooses `top_k` experts a token and their weights, in float32."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        assert config.n_routed_experts is not None
        assert config.num_experts_per_tok is not None
        self.top_k = config.num_experts_per_tok
        self.sigmoid = config.scoring_func == "sigmoid"
        self.normalise = config.norm_topk_prob
        self.scaling = config.routed_scaling_factor
        self.groups, self.top_groups = config.n_group or 1, config.topk_group or 1
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        nn.init.normal_(self.weight, std=0.02)
        if config.topk_method == "noaux_tc":
            self.e_score_correction_bias = nn.Parameter(torch.zeros(config.n_routed_experts))

    def scores(self, x: Tensor) -> Tensor:
        """x [N, hidden] -> float32 scores [N, experts]: sigmoid or softmax of the gate's logits."""
        logits = F.linear(x.float(), self.weight.float())
        return logits.sigmoid() if self.sigmoid else logits.softmax(-1)

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [N, experts] -> expert indices int64 [N, k] and weights float32 [N, k].

        Without a bias: greedy top-k. With one (noaux_tc, DeepSeek-V3, arXiv 2412.19437): the choice is by score plus
        bias, the weights are without; groups outside the best are set to 0, not -inf, as the official gate does.
        """
        if hasattr(self, "e_score_correction_bias"):
            choice = scores + self.e_score_correction_bias.float()
            if self.groups > 1:
                grouped = choice.view(choice.shape[0], self.groups, -1)
                best = (
                    grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1).topk(self.top_groups, dim=-1).indices
                )
                keep = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=choice.device).scatter(1, best, True)
                choice = grouped.masked_fill(~keep.unsqueeze(-1), 0.0).flatten(1)
            index = choice.topk(self.top_k, dim=-1).indices
        else:
            index = scores.topk(self.top_k, dim=-1).indices
        return index, self.weigh(scores, index)

    def weigh(self, scores: Tensor, index: Tensor) -> Tensor:
        """Scores [N, experts] and chosen experts [N, k] -> their weights float32 [N, k]."""
        weight = scores.gather(1, index)
        if self.normalise and self.top_k > 1:
            weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
        return weight * self.scaling

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, hidden] -> expert indices int64 [N, k] and weights float32 [N, k]."""
        return self.choose(self.scores(x))


class MoE(nn.Module):
    """Weighted routed experts (summed in float32) plus shared experts, which every token goes through."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        assert config.n_routed_experts is not None
        width = config.moe_intermediate_size
        self.experts = nn.ModuleList(MLP(config.hidden_size, width) for _ in range(config.n_routed_experts))
        self.gate = Router(config)
        if config.n_shared_experts:
            self.shared_experts = MLP(config.hidden_size, width * config.n_shared_experts)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> the same shape."""
        tokens = x.reshape(-1, x.shape[-1])
        return self.mix(tokens, *self.gate(tokens)).view(x.shape)

    def mix(self, tokens: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """tokens [N, hidden] with their experts [N, k] and weights float32 [N, k] -> [N, hidden], shared experts included."""
        out = torch.zeros_like(tokens, dtype=torch.float32)
        for number, expert in enumerate(self.experts):
            rows, slot = (index == number).nonzero(as_tuple=True)
            if rows.numel():
                out.index_add_(0, rows, expert(tokens[rows]).float() * weight[rows, slot].unsqueeze(-1))
        return self._add_shared(out.to(tokens.dtype), tokens)

    def forward_dense(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same sum with every expert run on every token, for training: no data-dependent shape.

        x [..., hidden] -> (out [..., hidden], scores float32 [N, experts], chosen float32 [N, experts] of 0 and 1).
        """
        tokens = x.reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):  # routing stays float32 in mixed precision
            scores = self.gate.scores(tokens)
        index, weight = self.gate.choose(scores)
        share = torch.zeros_like(scores).scatter(1, index, weight)
        chosen = torch.zeros_like(scores).scatter(1, index, 1.0)
        gate, up = self._stacked("gate_proj"), self._stacked("up_proj")
        # One wide SwiGLU over all experts' channels: a token's unchosen channels are multiplied by zero.
        width = gate.shape[0] // len(self.experts)
        inner = F.silu(F.linear(tokens, gate)) * F.linear(tokens, up)
        inner = (inner.unflatten(1, (len(self.experts), width)) * share.to(inner.dtype).unsqueeze(-1)).flatten(1)
        down = torch.cat([expert.down_proj.weight for expert in self._mlps()], dim=1)
        out = F.linear(inner, down)
        return self._add_shared(out.to(x.dtype), tokens).view(x.shape), scores, chosen

    def _mlps(self) -> Sequence[MLP]:
        return [expert for expert in self.experts if isinstance(expert, MLP)]

    def _stacked(self, name: str) -> Tensor:
        return torch.cat([getattr(expert, name).weight for expert in self._mlps()], dim=0)

    def _add_shared(self, out: Tensor, tokens: Tensor) -> Tensor:
        return out + self.shared_experts(tokens) if hasattr(self, "shared_experts") else out
