"""A prompt through the language model on a GPU, many rows at a time, over the same packed weights that decoding reads.

INT4 products of many rows, experts grouped, causal attention over keys and values expanded from the cache; what stands
between is fused into few launches, nothing is read back to the host, and memory is bounded by a chunk of rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from trtvlm.model.cache import HeadCache, LatentCache, LayerCache
from trtvlm.plugins.cuda.tiles import half_rows
from trtvlm.plugins.int4_linear.gemm import gated_gemm, gemm
from trtvlm.plugins.int4_moe.grouped import experts
from trtvlm.plugins.prefill.cuda import add_norm, append_heads, append_latent, attend, route

if TYPE_CHECKING:
    from trtvlm.model.cache import KVCache
    from trtvlm.plugins.mla_attention.decode import MLAWeights
    from trtvlm.runtime.cuda.decode import DecodeProgram
    from trtvlm.runtime.cuda.weights import Experts, LanguageWeights, LayerWeights, Matrix

CHUNK = 1024
"""Rows at a time: at 1,024 each of 64 experts has some 96 of them, which fill a block of its product."""

# What layers gave that is not in the residual stream yet: in float32 and in half.
Parts = tuple[Tensor | None, Tensor | None]


class Prefill:
    """Appends prompts to the caches that a decode program reads (batch 1)."""

    def __init__(self, weights: LanguageWeights, cache: KVCache, chunk: int = CHUNK) -> None:
        if chunk < 1:
            raise ValueError(f"a prompt cannot be computed {chunk} rows at a time")
        self.weights, self.cache, self.chunk = weights, cache, chunk
        self._cursor = torch.zeros(1, dtype=torch.int32, device=weights.embedding.device)

    def run(self, embeds: Tensor) -> Tensor:
        """Append embeddings [T, hidden] at the cache's cursor, which moves on -> residual float32 [hidden] of the last row.

        ValueError: no rows, or no room for them.
        """
        if not len(embeds):
            raise ValueError("a prompt has at least one row")
        if self.cache.length + len(embeds) > self.cache.max_len:
            raise ValueError(f"{self.cache.length} + {len(embeds)} positions exceed the cache's {self.cache.max_len}")
        for rows in torch.split(embeds, self.chunk):
            last = self._chunk(rows)
        return last

    def _chunk(self, embeds: Tensor) -> Tensor:
        start, eps = self.cache.length, self.weights.eps
        end = start + len(embeds)
        self._cursor.fill_(start)
        residual = embeds.to(torch.float32, copy=True).contiguous()
        parts: Parts = (None, None)
        for layer, cache in zip(self.weights.layers, self.cache.layers, strict=False):
            attended = self._attention(layer, cache, residual, parts, end)
            parts = _mlp(layer, residual, matmul(attended, layer.dense), eps)
        self.cache.advance(len(embeds))
        last = residual[-1]
        for part in parts:
            if part is not None:
                last = last + part[-1]
        return last

    def _attention(self, layer: LayerWeights, cache: LayerCache, residual: Tensor, parts: Parts, end: int) -> Tensor:
        """Up to the input of the output projection, its pre_quant_scale applied: half [T, heads * v]."""
        config, rope, scale = self.weights.config, self.weights.rope, layer.qkv.pre_quant_scale
        heads, norm = config.num_attention_heads, (*parts, layer.input_norm, self.weights.eps)
        if isinstance(cache, HeadCache):
            (x,) = add_norm(residual, *norm, (scale,))
            qkv = matmul(x, layer.qkv).unflatten(1, (-1, config.head_dim))
            append_heads(qkv, heads, rope, self._cursor, cache.k[0], cache.v[0])
            keys, values = (part[0, :, :end].transpose(0, 1) for part in (cache.k, cache.v))
            return attend(qkv[:, :heads], keys, None, values, self._cursor, layer.dense.pre_quant_scale)
        assert layer.mla is not None
        assert layer.mla.norm is not None
        assert layer.fused_a is not None
        scaled, x = add_norm(residual, *norm, (scale, None))
        q = matmul(scaled, layer.qkv).unflatten(1, (heads, -1))
        kv = F.linear(x, half_rows(layer.fused_a))
        append_latent(q, kv, layer.mla.norm, rope, self._cursor, cache.latent[0], cache.k_pe[0])
        keys, values = expand(layer.mla, cache, end)
        return attend(q, keys, cache.k_pe[0, :end], values, self._cursor, layer.dense.pre_quant_scale)


def head_of(program: DecodeProgram, last: Tensor) -> None:
    """The head of a decode program after a prompt whose last residual is float32 [hidden]: logits and candidates of row 0."""
    program.residual[0] = last
    program.square_sums[0] = last.square().unflatten(0, (-1, 16)).sum(-1)
    program.launch_head(1, logits=True)


def expand(weights: MLAWeights, cache: LatentCache, end: int) -> tuple[Tensor, Tensor]:
    """Keys half [end, heads, nope] without their rotary part, and values half [end, heads, v], of the first positions.

    kv_b_proj is held in tiles only: a layer of it at a time is put back into rows, which costs less than the products.
    """
    latent = cache.latent[0, :end]
    keys = torch.bmm(latent.expand(weights.heads, -1, -1), half_rows(weights.keys))
    values = F.linear(latent, half_rows(weights.values).flatten(0, 1))
    return keys.transpose(0, 1)[..., : weights.nope], values.unflatten(1, (weights.heads, -1))


def matmul(x: Tensor, weight: Matrix) -> Tensor:
    """x half [M, in] @ weight^T -> half [M, out]; x has its pre_quant_scale already."""
    out = torch.empty(x.shape[0], weight.outputs, dtype=torch.half, device=x.device)
    gemm(x, weight.codes, weight.scales, out)
    return out


def _mlp(layer: LayerWeights, residual: Tensor, attended: Tensor, eps: float) -> Parts:
    """The second half of a layer: `attended` joins the residual stream; what comes out has yet to."""
    scale = None if layer.fc is None else layer.fc.pre_quant_scale
    norm = (None, attended, layer.post_norm, eps)
    if layer.moe is None:
        (x,) = add_norm(residual, *norm, (scale,))
        return None, _gated(x, layer.fc, layer.proj)
    x, own = add_norm(residual, *norm, (layer.moe.fc.pre_quant_scale, scale))
    routed = _experts(layer.moe, x, residual, layer.post_norm, eps)
    return routed, None if layer.fc is None else _gated(own, layer.fc, layer.proj)


def _experts(moe: Experts, x: Tensor, residual: Tensor, norm: Tensor, eps: float) -> Tensor:
    index, weight = route(residual, norm, eps, moe.router, moe.correction_bias, moe.routing)
    fc, proj = moe.fc, moe.proj
    return experts(
        x, index, weight, fc.codes, fc.scales, None, proj.codes, proj.scales, proj.pre_quant_scale, proj.inputs
    )


def _gated(x: Tensor, fc: Matrix | None, proj: Matrix | None) -> Tensor:
    assert fc is not None
    assert proj is not None
    inner = torch.empty(x.shape[0], proj.inputs, dtype=torch.half, device=x.device)
    gated_gemm(x, fc.codes, fc.scales, inner, None, proj.pre_quant_scale)
    return matmul(inner, proj)
