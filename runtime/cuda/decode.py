"""One decode step of a language model: a fixed sequence of launches for a number of rows, all buffers in place."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from trtvlm.model.cache import HeadCache, KVCache, LatentCache
from trtvlm.plugins.cuda.ahead import NOTHING, Ahead, ahead
from trtvlm.plugins.cuda.turns import Turns
from trtvlm.plugins.embedding.cuda import embed
from trtvlm.plugins.gqa_attention.decode import GQAWorkspace, gqa_decode
from trtvlm.plugins.int4_linear.decode import (
    LinearWeight,
    Norm,
    add_linear,
    check_rows,
    empty_half,
    gated_linear,
    linear,
)
from trtvlm.plugins.int4_moe.decode import moe_decode
from trtvlm.plugins.int4_moe.layer import DecodeWorkspace, MoEWeights, Tiles, router_tiles
from trtvlm.plugins.int4_moe.row import dense_row, experts_row, takes
from trtvlm.plugins.int8_linear.decode import candidates, head
from trtvlm.plugins.mla_attention.decode import MLAWeights, MLAWorkspace, mla_decode
from trtvlm.runtime.cuda.weights import LanguageWeights, LayerWeights, Matrix

Candidates = tuple[Tensor, Tensor]
_LAUNCHES = 8  # of a layer, at most
OVERLAP_VARIABLE = "TRTVLM_OVERLAP"
"""Of the environment: "0" keeps launches from overlapping, should a driver not run a graph's two branches at once."""
OVERLAPPING_ROWS = 2
"""Steps of more rows have more blocks than leave room for another launch, and gain more from weights fetched ahead."""


@dataclass(frozen=True)
class _Layer:
    """A decoder layer as its launches want it. coming: what its attention brings into L2 where launches do not overlap."""

    input_norm: Norm
    post_norm: Norm
    qkv: LinearWeight
    dense: LinearWeight
    mla: MLAWeights | None
    moe: MoEWeights | None
    fc: LinearWeight | None
    proj: LinearWeight | None
    coming: Ahead

    @property
    def has_row_kernels(self) -> bool:
        """Whether a lone row goes from attention to the experts' sum by `dense_row` and `experts_row`."""
        return self.moe is not None and takes(self.dense)


class DecodeProgram:
    """Launches steps of 1 to `max_rows` rows over caches of `positions` positions (batch 1).

    `logits` float32 [max_rows, V] is written when a step asks for it; `found` are the head's candidates, always.
    overlap: the launches of a step of few rows overlap (`trtvlm.plugins.cuda.turns`), unless $TRTVLM_OVERLAP is 0.
    """

    def __init__(
        self,
        weights: LanguageWeights,
        cache: KVCache,
        max_rows: int = 8,
        overlap: bool = True,
    ) -> None:
        check_rows(max_rows)
        self.weights, self.cache, self.max_rows = weights, cache, max_rows
        config, device = weights.config, weights.embedding.device
        hidden, heads, rows = config.hidden_size, config.num_attention_heads, max_rows
        self.residual = torch.zeros(rows, hidden, device=device)
        # Of the residual stream between layers, and within them: a lone row's experts read these while those are made.
        self.square_sums, self._inner_sums = (torch.zeros(rows, hidden // 16, device=device) for _ in range(2))
        self._layers = [self._pack(layer) for layer in weights.layers]
        self._norm = Norm(weights.norm, self.square_sums, weights.eps)
        launches = _LAUNCHES * len(self._layers) + 1
        overlap = overlap and os.environ.get(OVERLAP_VARIABLE) != "0"
        self._turns = Turns(launches, device) if overlap and device.type == "cuda" else None
        self.found = candidates(config.vocab_size, rows, device)
        self.logits = torch.zeros(rows, config.vocab_size, device=device)
        first = self._layers[0]
        self._q = empty_half(rows, 16 * first.qkv.int4_tiles, device)
        self._attended = empty_half(rows, first.dense.inputs, device)
        self._kv = empty_half(rows, 16 * first.qkv.half_tiles, device) if first.qkv.half_tiles else None
        self._attention: MLAWorkspace | GQAWorkspace
        if config.use_mla:
            rank, rope = config.kv_lora_rank or 0, config.qk_rope_head_dim
            self._attention = MLAWorkspace.allocate(rows, cache.max_len, heads, rank, rope, device)
        else:
            self._attention = GQAWorkspace.allocate(rows, cache.max_len, heads, config.head_dim, device)
        dense = [layer.proj.inputs for layer in self._layers if layer.proj is not None]
        self._inner = empty_half(rows, max(dense), device) if dense else None
        experts = [layer.moe for layer in self._layers if layer.moe is not None]
        self._moe = DecodeWorkspace.allocate(experts[0], rows, device) if experts else None

    def launch(
        self,
        tokens: Tensor,
        cursor: Tensor,
        rows: int,
        span: int,
        chosen_from: Candidates | None = None,
        logits: bool = False,
    ) -> None:
        """Decode tokens int32 [rows] at cursor int32 [1] (both on the device), which stays within `span` positions.

        chosen_from: another step's candidates (values [blocks], tokens [blocks]) that the last token is chosen from first.
        """
        turns = self._turns if rows <= OVERLAPPING_ROWS else None
        counters = None if turns is None else turns.counters
        embed(tokens, self.weights.embedding, self.residual, self.square_sums, rows, chosen_from, counters)
        if turns is not None:
            turns.begin()
        for index in range(len(self._layers)):
            self.launch_attention(index, cursor, rows, span, turns)
            self.launch_mlp(index, rows, turns)
        self.launch_head(rows, logits, turns)
        if turns is not None:
            turns.end()

    def launch_attention(self, index: int, cursor: Tensor, rows: int, span: int, turns: Turns | None = None) -> None:
        """The first half of layer `index`, up to its residual sum; for a lone row what its experts begin with, too."""
        layer = self._layers[index]
        linear(self.residual, layer.qkv, self._q, rows, layer.input_norm, self._kv, turns)
        self._attend(layer, self.cache.layers[index], cursor, rows, span, turns)
        if rows == 1 and layer.has_row_kernels:
            assert layer.moe is not None
            assert self._moe is not None
            dense_row(self._attended, layer.dense, self.residual, layer.post_norm, layer.moe, self._moe, turns)
            return
        add_linear(self._attended, layer.dense, self.residual, self._inner_sums, rows, turns)

    def launch_mlp(self, index: int, rows: int, turns: Turns | None = None) -> None:
        """The second half of layer `index`."""
        layer = self._layers[index]
        if layer.moe is not None:
            assert self._moe is not None
            if rows == 1 and layer.has_row_kernels:
                experts_row(self.residual, self.square_sums, layer.post_norm, layer.moe, self._moe, turns)
                return
            moe_decode(self.residual, self.square_sums, layer.post_norm, layer.moe, self._moe, rows, turns)
            return
        assert layer.fc is not None
        assert layer.proj is not None
        assert self._inner is not None
        gated_linear(self.residual, layer.fc, self._inner, rows, layer.post_norm, layer.proj.pre_quant_scale, turns)
        # Its scale was applied with the gate.
        plain = LinearWeight(layer.proj.codes, layer.proj.scales)
        add_linear(self._inner, plain, self.residual, self.square_sums, rows, turns)

    @property
    def router_logits(self) -> Tensor | None:
        """What the last layer with experts that was launched has written: float32 [max_rows, experts]; None: there is none."""
        return None if self._moe is None else self._moe.logits

    def launch_head(self, rows: int, logits: bool, turns: Turns | None = None) -> None:
        """The final norm and the LM head."""
        head(self.residual, self._norm, self.weights.head, self.found, rows, self.logits if logits else None, turns)

    def best(self, row: int) -> Candidates:
        """The candidates of one row."""
        return self.found[0][row], self.found[1][row]

    def _attend(
        self,
        layer: _Layer,
        cache: LatentCache | HeadCache,
        cursor: Tensor,
        rows: int,
        span: int,
        turns: Turns | None,
    ) -> None:
        rope = self.weights.rope
        if isinstance(cache, LatentCache):
            assert layer.mla is not None
            assert self._kv is not None
            assert isinstance(self._attention, MLAWorkspace)
            mla_decode(
                self._q, self._kv, layer.mla, rope, cache.latent[0], cache.k_pe[0], cursor, self._attended,
                self._attention, rows, span, layer.coming, turns,
                None if cache.scales is None else cache.scales[0],
            )  # fmt: skip
            return
        assert isinstance(self._attention, GQAWorkspace)
        heads = self.weights.config.num_attention_heads
        gqa_decode(
            self._q,
            heads,
            rope,
            cache.k[0],
            cache.v[0],
            cursor,
            self._attended,
            self._attention,
            rows,
            span,
            layer.coming,
            turns,
        )

    def _pack(self, layer: LayerWeights) -> _Layer:
        qkv = LinearWeight(
            layer.qkv.codes, layer.qkv.scales, layer.qkv.pre_quant_scale, layer.fused_a
        )  # fmt: skip
        moe = None
        if layer.moe is not None:
            shared = [None if part is None else _tiles(part) for part in (layer.fc, layer.proj)]
            moe = MoEWeights(
                router_tiles(layer.moe.router), layer.moe.correction_bias, layer.moe.routing, _tiles(layer.moe.fc),
                _tiles(layer.moe.proj), *shared,
            )  # fmt: skip
        dense = layer.moe is None
        coming = [layer.dense.codes, layer.dense.scales, *([] if moe is None else [moe.router, *moe.shared_expert])]
        return _Layer(
            Norm(layer.input_norm, self.square_sums, self.weights.eps),
            Norm(layer.post_norm, self._inner_sums, self.weights.eps),
            qkv,
            _linear(layer.dense),
            layer.mla,
            moe,
            _linear(layer.fc) if dense and layer.fc is not None else None,
            _linear(layer.proj) if dense and layer.proj is not None else None,
            ahead(coming) if layer.dense.codes.is_cuda else NOTHING,
        )


def _linear(matrix: Matrix) -> LinearWeight:
    return LinearWeight(matrix.codes, matrix.scales, matrix.pre_quant_scale)


def _tiles(matrix: Matrix) -> Tiles:
    return Tiles(matrix.codes, matrix.scales, matrix.pre_quant_scale)
