"""The decoder: pre-norm layers of attention and (dense or expert) MLP, the final norm and the LM head."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trtvlm.model.attention import MultiHeadAttention, MultiHeadLatentAttention, Rope, causal_mask
from trtvlm.model.cache import KVCache, LayerCache
from trtvlm.model.config import LanguageConfig
from trtvlm.model.moe import MLP, MoE
from trtvlm.model.norm import RMSNorm
from trtvlm.model.rope import rope_table


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); layer `index` decides whether the MLP is dense or experts."""

    def __init__(self, config: LanguageConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MultiHeadLatentAttention(config) if config.use_mla else MultiHeadAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config) if config.is_moe(index) else MLP(config.hidden_size, config.intermediate_size)

    def forward(
        self, x: Tensor, rope: Rope, mask: Tensor | None = None, cache: LayerCache | None = None, start: int = 0
    ) -> Tensor:
        """x [B, T, hidden], its rope, mask as `causal_mask` -> [B, T, hidden]; writes `cache` from `start` on."""
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache, start)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out

    def forward_train(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Causal from nothing; also the router's load-balancing loss (float32 scalar, 0 in a dense layer).

        The loss is experts * sum_e(share of tokens sent to e * mean score of e) / k (Switch Transformer,
        arXiv 2101.03961, equation 4): 1 when the load is even.
        """
        x = x + self.self_attn(self.input_layernorm(x), (cos, sin), None)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MLP):
            return x + self.mlp(normed), x.new_zeros((), dtype=torch.float32)
        out, scores, chosen = self.mlp.forward_dense(normed)
        mean_score = (scores / scores.sum(-1, keepdim=True)).mean(0)
        balance = scores.shape[1] * (chosen.mean(0) * mean_score).sum() / self.mlp.gate.top_k
        return x + out, balance


class Decoder(nn.Module):
    """Embedding, layers and final norm (`language.model` in the official checkpoint)."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class LanguageModel(nn.Module):
    """inputs_embeds in, logits out; with a KVCache, the positions given follow those the cache holds."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._rope: Rope | None = None

    def rope(self, positions: Tensor) -> Rope:
        """Cosines and sines of positions int64 [...]: each float32 [..., rope_dim / 2]."""
        if self._rope is None or self._rope[0].device != positions.device:
            config = self.config
            self._rope = rope_table(
                config.rope_dim, config.max_position_embeddings, config.rope_theta, positions.device
            )
        return self._rope[0][positions], self._rope[1][positions]

    def hidden_states(
        self,
        inputs_embeds: Tensor,
        cache: KVCache | None = None,
        attention_mask: Tensor | None = None,
        observe: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """inputs_embeds [B, T, hidden] -> the last layer's output after the final norm [B, T, hidden].

        attention_mask [B, cached + T] is 0 at left padding and moves positions with it. `observe(index, output)` sees
        every layer's output.
        """
        batch, length, _ = inputs_embeds.shape
        start = cache.length if cache is not None else 0
        if attention_mask is None:
            positions = torch.arange(start, start + length, device=inputs_embeds.device).expand(batch, -1)
        else:
            # Left padding does not count; padded rows get position 1 as in the official generation code.
            positions = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)[:, start:]
        rope = self.rope(positions)
        mask = causal_mask(length, start, attention_mask, inputs_embeds.device)
        x = inputs_embeds
        for index, layer in enumerate(self.model.layers):
            x = layer(x, rope, mask, cache.layers[index] if cache is not None else None, start)
            if observe is not None:
                observe(index, x)
        if cache is not None:
            cache.advance(length)
        out: Tensor = self.model.norm(x)
        return out

    def forward(
        self,
        inputs_embeds: Tensor,
        cache: KVCache | None = None,
        attention_mask: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """inputs_embeds [B, T, hidden] -> float32 logits [B, T, vocab], or of the last position only [B, 1, vocab]."""
        x = self.hidden_states(inputs_embeds, cache, attention_mask)
        logits: Tensor = self.lm_head(x[:, -1:] if last_only else x)
        return logits.float()

    def forward_train(self, inputs_embeds: Tensor) -> tuple[Tensor, Tensor]:
        """inputs_embeds [B, T, hidden], no padding -> hidden states after the final norm and the mean balance loss."""
        cos, sin = self.rope(torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0))
        x, losses = inputs_embeds, []
        for layer in self.model.layers:
            assert isinstance(layer, DecoderLayer)
            x, balance = layer.forward_train(x, cos, sin)
            losses.append(balance)
        experts = max(1, sum(self.config.is_moe(index) for index in range(self.config.num_hidden_layers)))
        return self.model.norm(x), torch.stack(losses).sum() / experts
