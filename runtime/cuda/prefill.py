"""A prompt through the language model on a GPU, many rows at a time, over the same packed weights that decoding reads.

INT4 products of many rows, experts grouped, causal attention over keys and values expanded from the cache; what stands
between is fused into few launches, nothing is read back to the host, and memory is bounded by a chunk of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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

BUCKETS = (16, 32, 64, 128, 192, 256)
"""So few rows take longer to launch than to compute: they are filled up to one of these, and replayed as a CUDA graph."""
SPAN = 256
"""Graphs are captured for caches filled up to a multiple of this."""

# What layers gave that is not in the residual stream yet: in float32 and in half.
Parts = tuple[Tensor | None, Tensor | None]
Step = Callable[[], None]


class _Capture:
    """Captures steps as CUDA graphs that share one piece of memory: a replay's results last until the next one."""

    def __init__(self) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        step()  # compiles and loads; what it appends is appended again by the replay
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            step()
        return graph.replay


@dataclass
class _Bucket:
    """A graph of some rows: what it reads, and the residual stream and the parts it leaves."""

    inputs: Tensor
    out: tuple[Tensor, Parts] | None = None
    replay: Step | None = None


class Prefill:
    """Appends prompts to the caches that a decode program reads (batch 1)."""

    def __init__(
        self,
        weights: LanguageWeights,
        cache: KVCache,
        chunk: int = CHUNK,
        capture: Callable[[Step], Step] | None = None,
    ) -> None:
        """chunk: rows at a time. capture: makes a replay of a step of few rows; by default a CUDA graph where there is CUDA."""
        if chunk < 1:
            raise ValueError(f"a prompt cannot be computed {chunk} rows at a time")
        self.weights, self.cache, self.chunk = weights, cache, chunk
        device = weights.embedding.device
        self._cursor = torch.zeros(1, dtype=torch.int32, device=device)
        self._capture = capture or (_Capture() if device.type == "cuda" else None)
        self._buckets: dict[tuple[int, int], _Bucket] = {}

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
        start, rows, room = self.cache.length, len(embeds), self.cache.max_len
        self._cursor.fill_(start)
        size = next((size for size in BUCKETS if rows <= size), None)
        if self._capture is None or size is None or start + size > room:
            residual, parts = self._layers(embeds, start + rows)
        else:
            # The rows past the last are filled with whatever was there; the positions they take are written again later.
            residual, parts = self._replayed(embeds, size, min(-(-(start + size) // SPAN) * SPAN, room))
        self.cache.advance(rows)
        last = residual[rows - 1]
        for part in parts:
            if part is not None:
                last = last + part[rows - 1]
        return last

    def _replayed(self, embeds: Tensor, size: int, end: int) -> tuple[Tensor, Parts]:
        """The graph of `size` rows over `end` positions, captured when it is first wanted; results always are a replay's."""
        if (size, end) not in self._buckets:
            self._buckets[size, end] = bucket = _Bucket(embeds.new_zeros(size, embeds.shape[1]))
            assert self._capture is not None

            def step() -> None:
                bucket.out = self._layers(bucket.inputs, end)

            bucket.replay = self._capture(step)
        bucket = self._buckets[size, end]
        bucket.inputs[: len(embeds)] = embeds
        assert bucket.replay is not None
        bucket.replay()
        assert bucket.out is not None
        return bucket.out

    def _layers(self, embeds: Tensor, end: int) -> tuple[Tensor, Parts]:
        """All layers of rows at the device's cursor; the cache's first `end` positions hold them and all before them."""
        residual = embeds.to(torch.float32, copy=True).contiguous()
        parts: Parts = (None, None)
        for layer, cache in zip(self.weights.layers, self.cache.layers, strict=False):
            attended = self._attention(layer, cache, residual, parts, end)
            parts = _mlp(layer, residual, matmul(attended, layer.dense), self.weights.eps)
        return residual, parts

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
        append_latent(q, kv, layer.mla.norm, rope, self._cursor, *(part[0] for part in cache.tensors()))
        keys, values = expand(layer.mla, cache, end)
        return attend(q, keys, cache.k_pe[0, :end], values, self._cursor, layer.dense.pre_quant_scale)


def head_of(program: DecodeProgram, last: Tensor) -> None:
    """The head of a decode program after a prompt whose last residual is float32 [hidden]: logits and candidates of row 0."""
    program.residual[0] = last
    program.square_sums[0] = last.square().unflatten(0, (-1, 16)).sum(-1)
    program.launch_head(1, logits=True)


def expand(weights: MLAWeights, cache: LatentCache, end: int) -> tuple[Tensor, Tensor]:
    """Keys half [end, heads, nope] without their rotary part, and values half [end, heads, v], of the first positions.

    kv_b_proj is held in tiles only: a layer of it at a time is put back into rows, which costs less than the products. Latents
    held as codes become halves for the layer.
    """
    latent = cache.read(end)[0][0]
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
