"""Swaps a float language model for one that decodes a few rows at a time on a CPU: the only place that knows both.

The promise: decoding M rows at once gives, bit for bit, the logits of M decodes of one row. Greedy speculative decoding
then gives the tokens of plain decoding.
"""

import copy

import torch
from torch import Tensor, nn

from trtvlm.model.attention import MultiHeadAttention, MultiHeadLatentAttention
from trtvlm.model.cache import HeadCache, KVCache, LatentCache, LayerCache
from trtvlm.model.config import LanguageConfig
from trtvlm.model.language import DecoderLayer, LanguageModel
from trtvlm.model.moe import MLP, MoE
from trtvlm.model.norm import RMSNorm
from trtvlm.model.rope import rope_table
from trtvlm.model.vlm import DeepseekVL2
from trtvlm.plugins.rows.attention import LatentAttention, bucket_end, head_attention
from trtvlm.plugins.rows.elementwise import by_rows, rms_norm, rotate
from trtvlm.plugins.rows.experts import MLPWeights, RowwiseExperts, RowwiseMLP
from trtvlm.plugins.rows.linear import MAX_ROWS, RowwiseLinear


@torch.no_grad()
def for_cpu(model: DeepseekVL2, dtype: torch.dtype = torch.float16) -> DeepseekVL2:
    """A model whose `language` decodes up to MAX_ROWS rows with bits that do not depend on their number.

    `model` is float32, on the CPU, in evaluation mode; it is not changed, and the result shares its weights: the vision
    tower is the same, and so are prefill (more rows, batches, padding), embeddings and training. `dtype` float16 rounds
    the decoding weights as an engine does; float32 keeps them and is about three times slower.
    """
    swapped = copy.copy(model)
    swapped._modules = dict(model._modules)
    swapped.language = RowwiseLanguage(model.language, dtype)  # type: ignore[assignment]
    return swapped


class RowwiseLanguage(nn.Module):
    """`LanguageModel` with a second way through: few rows of one sequence over a cache."""

    def __init__(self, language: LanguageModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = language.config
        self.float_language = language
        attend = _latent_attention(language.config)
        self.layers = nn.ModuleList(_Layer(layer, dtype, attend) for layer in language.model.layers)  # type: ignore[arg-type]
        self.final_norm = _Norm(language.model.norm)
        self.head = RowwiseLinear(language.lm_head.weight, dtype)
        config = language.config
        cos, sin = rope_table(config.rope_dim, config.max_position_embeddings, config.rope_theta)
        self.cos, self.sin = torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)

    @property
    def model(self) -> nn.Module:
        """Embedding, layers and norm as the float model has them."""
        return self.float_language.model

    @property
    def lm_head(self) -> nn.Module:
        """The float model's head."""
        return self.float_language.lm_head

    def forward(
        self,
        inputs_embeds: Tensor,
        cache: KVCache | None = None,
        attention_mask: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """As `LanguageModel.forward`: inputs_embeds [B, T, hidden] -> float32 logits [B, T or 1, vocab]."""
        batch, rows, _ = inputs_embeds.shape
        if cache is None or attention_mask is not None or batch > 1 or rows > MAX_ROWS:
            logits: Tensor = self.float_language(inputs_embeds, cache, attention_mask, last_only)
            return logits
        return self.decode(inputs_embeds[0], cache, last_only).unsqueeze(0)

    @torch.inference_mode()
    def decode(self, x: Tensor, cache: KVCache, last_only: bool = False) -> Tensor:
        """Append embeddings [M, hidden], M up to MAX_ROWS, to the cache of one sequence -> logits [M or 1, vocab]."""
        start, rows = cache.length, x.shape[0]
        if start + rows > cache.max_len:
            raise ValueError(f"{start} + {rows} positions exceed the cache's {cache.max_len}")
        rope = self.cos[start : start + rows, None], self.sin[start : start + rows, None]
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x = layer(x, rope, layer_cache, start)
        cache.advance(rows)
        out: Tensor = self.head(self.final_norm(x[-1:] if last_only else x))
        return out


Rope = tuple[Tensor, Tensor]


def _latent_attention(config: LanguageConfig) -> LatentAttention | None:
    if not config.use_mla:
        return None
    assert config.kv_lora_rank is not None
    heads, rank, rope = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    return LatentAttention(heads, rank, rope, config.head_dim**-0.5)


class _Norm:
    def __init__(self, norm: RMSNorm) -> None:
        self.weight, self.eps = norm.weight.detach(), norm.eps

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class _Layer(nn.Module):
    def __init__(self, layer: DecoderLayer, dtype: torch.dtype, attend: LatentAttention | None) -> None:
        super().__init__()
        self.norms = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        attention, mlp = layer.self_attn, layer.mlp
        self.attention: nn.Module
        if isinstance(attention, MultiHeadLatentAttention):
            assert attend is not None
            self.attention = _LatentLayer(attention, dtype, attend)
        else:
            self.attention = _HeadLayer(attention, dtype)
        self.mlp = RowwiseMLP(_weights(mlp), dtype) if isinstance(mlp, MLP) else _ExpertLayer(mlp, dtype)

    def forward(self, x: Tensor, rope: Rope, cache: LayerCache, start: int) -> Tensor:
        x = x + self.attention(self.norms[0](x), rope, cache, start)
        out: Tensor = x + self.mlp(self.norms[1](x))
        return out


class _LatentLayer(nn.Module):
    """Multi-head latent attention with absorbed weights; one product makes the queries, k_pe and the latent.

    The key half of kv_b_proj is multiplied into the query's weight and the value half into the output's, once, here
    (DeepSeek-V2, arXiv 2405.04434, section 2.1.2); rows that are rotated are put in half-split order, the cache's.
    """

    def __init__(self, attention: MultiHeadLatentAttention, dtype: torch.dtype, attend: LatentAttention) -> None:
        super().__init__()
        heads, rank, rope, nope = attention.heads, attention.rank, attention.rope, attention.nope
        self.rope, self.attend = rope, attend
        half_split = torch.cat((torch.arange(0, rope, 2), torch.arange(1, rope, 2)))
        key, value = attention.kv_b_halves()
        lora = attention.q_lora_rank is not None
        query = (attention.q_b_proj if lora else attention.q_proj).weight.view(heads, nope + rope, -1)
        q_nope, q_pe = torch.split(query, [nope, rope], dim=1)
        queries = torch.cat(
            (torch.einsum("hnr,hni->hri", key, q_nope).flatten(0, 1), q_pe[:, half_split].flatten(0, 1))
        )
        latent, k_pe = torch.split(attention.kv_a_proj_with_mqa.weight, [rank, rope])
        # With a low rank the queries are made of a normalised q_a and not of x.
        first = attention.q_a_proj.weight if lora else queries
        self.project = RowwiseLinear(torch.cat((first, k_pe[half_split], latent)), dtype)
        self.sizes = first.shape[0], rope, rank
        self.query_sizes = heads * rank, heads * rope
        self.query = RowwiseLinear(queries, dtype) if lora else None
        self.query_norm = _Norm(attention.q_a_layernorm) if lora else None
        self.latent_norm = _Norm(attention.kv_a_layernorm)
        output = attention.o_proj.weight.view(-1, heads, attention.v_dim)
        self.output = RowwiseLinear(torch.einsum("ohv,hvr->ohr", output, value).flatten(1), dtype)

    def forward(self, x: Tensor, rope: Rope, cache: LayerCache, start: int) -> Tensor:
        assert isinstance(cache, LatentCache)
        rows = x.shape[0]
        queries, k_pe, latent = self.project(x).split(self.sizes, dim=1)
        if self.query is not None and self.query_norm is not None:
            queries = self.query(self.query_norm(queries))
        q_latent, q_pe = queries.split(self.query_sizes, dim=1)
        rotated = rotate(torch.cat((q_pe, k_pe), dim=1).view(rows, -1, self.rope), *rope)
        q_pe, k_pe = rotated[:, :-1], rotated[:, -1]
        cache.write(start, self.latent_norm(latent).unsqueeze(0), k_pe.unsqueeze(0))
        latents, keys = cache.read(bucket_end(start + rows - 1))
        out: Tensor = self.output(self.attend(q_latent, q_pe, latents[0], keys[0], start))
        return out


class _HeadLayer(nn.Module):
    """Plain attention; one product makes queries, keys and values."""

    def __init__(self, attention: MultiHeadAttention, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = attention.heads, attention.kv_heads, attention.head_dim
        parts = attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight
        self.project = RowwiseLinear(torch.cat(parts), dtype)
        self.output = RowwiseLinear(attention.o_proj.weight, dtype)

    def forward(self, x: Tensor, rope: Rope, cache: LayerCache, start: int) -> Tensor:
        assert isinstance(cache, HeadCache)
        end = start + x.shape[0]
        parts = self.project(x).view(x.shape[0], -1, self.width)
        rotated = rotate(parts[:, : self.heads + self.kv_heads], *rope)
        q, k = torch.split(rotated, [self.heads, self.kv_heads], dim=1)
        cache.k[0, :, start:end] = k.transpose(0, 1)
        cache.v[0, :, start:end] = parts[:, self.heads + self.kv_heads :].transpose(0, 1)
        out: Tensor = self.output(head_attention(q, cache.k[0], cache.v[0], start, self.width**-0.5))
        return out


class _ExpertLayer(nn.Module):
    """The float model's routing, which works row by row, over row-invariant logits and experts."""

    def __init__(self, moe: MoE, dtype: torch.dtype) -> None:
        super().__init__()
        self.router = moe.gate
        # Routing is discrete: a logit rounded to float16 may choose another expert, so its weight is never rounded.
        self.logits = RowwiseLinear(moe.gate.weight, torch.float32)
        experts = [_weights(expert) for expert in moe.experts]  # type: ignore[arg-type]
        shared = _weights(moe.shared_experts) if hasattr(moe, "shared_experts") else None
        self.experts = RowwiseExperts(experts, shared, dtype)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.logits(x)
        scores = by_rows(torch.sigmoid, logits) if self.router.sigmoid else logits.softmax(-1)
        out: Tensor = self.experts(x, *self.router.choose(scores))
        return out


def _weights(mlp: MLP) -> MLPWeights:
    return mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
