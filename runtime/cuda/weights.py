"""The quantized language model on a GPU: every weight once, in the order its kernels read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trtvlm.model.config import LanguageConfig
from trtvlm.model.errors import UserError
from trtvlm.model.rope import rope_table
from trtvlm.plugins.cuda.tiles import half_tiles, int4_tiles
from trtvlm.plugins.int4_moe.reference import Routing
from trtvlm.plugins.int8_linear.decode import HeadWeight
from trtvlm.plugins.mla_attention.decode import MLAWeights
from trtvlm.plugins.quantized_checkpoint import PREQUANT, SCALES, QuantizedWeights, layer_prefix


@dataclass(frozen=True)
class Matrix:
    """An INT4 weight as `trtvlm.plugins.cuda.tiles.int4_tiles` packs it, of one layer or stacked over experts.

    codes int32 [..., outputs / 16, inputs / 64, 32, 4], scales half [..., outputs / 16, inputs / 64, 8, 2],
    pre_quant_scale half [inputs] or none.
    """

    codes: Tensor
    scales: Tensor
    pre_quant_scale: Tensor | None

    @property
    def outputs(self) -> int:
        """Rows of the weight."""
        return 16 * self.codes.shape[-4]

    @property
    def inputs(self) -> int:
        """Columns of the weight."""
        return 64 * self.codes.shape[-3]


@dataclass(frozen=True)
class Experts:
    """Router float32 [E, hidden] and the routed experts; fc is [up; gate]. correction_bias float32 [E] or none."""

    router: Tensor
    correction_bias: Tensor | None
    routing: Routing
    fc: Matrix
    proj: Matrix


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. `qkv` is q_proj alone with latent attention, which has fused_a and mla (kv_b_proj) besides.

    fused_a [(rank + rope) / 16, hidden / 64, 4, 32, 8] is in `half_tiles`, as mla's weights are. `fc` ([up; gate]) and `proj`
    are the dense MLP's, or the shared expert's where there is `moe`. Norms are half [hidden].
    """

    input_norm: Tensor
    post_norm: Tensor
    qkv: Matrix
    dense: Matrix
    fused_a: Tensor | None
    mla: MLAWeights | None
    fc: Matrix | None
    proj: Matrix | None
    moe: Experts | None


@dataclass(frozen=True)
class LanguageWeights:
    """All of the language model; rope: cosines and sines float32 [positions, rope dim / 2]."""

    config: LanguageConfig
    eps: float
    embedding: Tensor
    layers: list[LayerWeights]
    norm: Tensor
    head: HeadWeight
    rope: tuple[Tensor, Tensor]


def load_weights(
    checkpoint: QuantizedWeights, device: torch.device | str = "cuda", layers: int | None = None
) -> LanguageWeights:
    """Bring a checkpoint to the device, layer by layer: at most one layer is there in both orders.

    layers: only the first so many. UserError for what the kernels do not run.
    """
    config = checkpoint.config
    if checkpoint.kind != "int4":
        raise UserError(
            "The CUDA kernels run INT4 engines: build with --quant int4_awq, or run this one with --device cpu."
        )
    if config.q_lora_rank is not None:
        raise UserError(
            "The CUDA kernels do not run models with a low-rank query projection (q_lora_rank): use --device cpu."
        )
    if config.use_mla and (config.n_group or 1) > 1:
        raise UserError("The CUDA kernels do not run routing in groups (n_group > 1): use --device cpu.")
    if checkpoint.optional(f"lm_head.{PREQUANT}") is not None:
        raise UserError("The CUDA kernels do not scale the LM head's input: build again, or use --device cpu.")
    loader = _Loader(checkpoint, torch.device(device))
    head_scale = None if checkpoint.lm_head == "fp16" else loader.get(f"lm_head.{SCALES[checkpoint.lm_head]}")
    return LanguageWeights(
        config,
        config.rms_norm_eps,
        loader.get("transformer.vocab_embedding.weight"),
        [loader.layer(index) for index in range(layers or config.num_hidden_layers)],
        loader.get("transformer.ln_f.weight"),
        HeadWeight.pack(checkpoint.lm_head, loader.get("lm_head.weight"), head_scale),
        rope_table(config.rope_dim, config.max_position_embeddings, config.rope_theta, device),
    )


class _Loader:
    def __init__(self, checkpoint: QuantizedWeights, device: torch.device) -> None:
        self.checkpoint, self.device = checkpoint, device
        self.config = checkpoint.config

    def get(self, name: str) -> Tensor:
        return self.checkpoint.get(name).to(self.device)

    def layer(self, index: int) -> LayerWeights:
        at, config = layer_prefix(index), self.config
        attention = f"{at}attention."
        common = (self.get(f"{at}input_layernorm.weight"), self.get(f"{at}post_layernorm.weight"))
        moe = None
        if config.is_moe(index):
            moe = self.experts(f"{at}mlp.")
            mlp = f"{at}mlp.shared_expert." if config.n_shared_experts else None
        else:
            mlp = f"{at}mlp."
        return LayerWeights(
            *common,
            self.matrix(f"{attention}{'q_proj' if config.use_mla else 'qkv'}"),
            self.matrix(f"{attention}dense"),
            half_tiles(self.get(f"{attention}fused_a.weight")) if config.use_mla else None,
            self.latent(attention) if config.use_mla else None,
            None if mlp is None else self.matrix(f"{mlp}gate", f"{mlp}fc"),
            None if mlp is None else self.matrix(f"{mlp}proj"),
            moe,
        )

    def latent(self, at: str) -> MLAWeights:
        config = self.config
        return MLAWeights.pack(
            self.get(f"{at}kv_b_proj.weight"),
            self.get(f"{at}kv_a_layernorm.weight"),
            config.num_attention_heads,
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
        )

    def experts(self, at: str) -> Experts:
        config = self.config
        bias = self.checkpoint.optional(f"{at}e_score_correction_bias")
        routing = Routing(
            config.num_experts_per_tok or 1,
            config.scoring_func,
            config.norm_topk_prob,
            config.routed_scaling_factor,
            config.n_group or 1,
            config.topk_group or 1,
        )
        return Experts(
            self.get(f"{at}router.weight"),
            None if bias is None else bias.to(self.device),
            routing,
            self.matrix(f"{at}fc"),
            self.matrix(f"{at}proj"),
        )

    def matrix(self, *names: str) -> Matrix:
        """One INT4 weight; several are stacked on their outputs (they share their inputs and so their scale)."""
        codes, scales = [], []
        for name in names:
            packed, scale = self.get(f"{name}.weight"), self.get(f"{name}.{SCALES['int4']}")
            if packed.dim() == 3:  # experts, a few at a time: unpacking takes eight times their size
                parts = [int4_tiles(*pair) for pair in zip(packed.split(4), scale.split(4), strict=True)]
                tiles = tuple(torch.cat(part) for part in zip(*parts, strict=True))
            else:
                tiles = int4_tiles(packed, scale)
            codes.append(tiles[0])
            scales.append(tiles[1])
        pre_quant = self.checkpoint.optional(f"{names[0]}.{PREQUANT}")
        if pre_quant is not None:
            # One for all experts of a layer.
            pre_quant = (pre_quant if pre_quant.dim() == 1 else pre_quant[0]).contiguous().to(self.device)
        return Matrix(torch.cat(codes), torch.cat(scales), pre_quant)
