"""The language model in float32 over the very same quantized weights: what the kernels are compared with."""

from __future__ import annotations

import torch

from trtvlm.model.language import DecoderLayer, LanguageModel
from trtvlm.model.moe import MoE
from trtvlm.plugins.int4_linear import packing as int4
from trtvlm.plugins.int8_linear import packing as int8
from trtvlm.plugins.quantized_checkpoint import PREQUANT, SCALES, layer_prefix, linears, pieces, plain_tensors
from trtvlm.runtime.cuda.weights import Checkpoint


@torch.no_grad()
def reference_model(checkpoint: Checkpoint, device: torch.device | str = "cuda") -> LanguageModel:
    """A LanguageModel in float32 with the checkpoint's weights dequantized, on the device."""
    config = checkpoint.config
    with torch.device("meta"):
        model = LanguageModel(config)
    model = model.to_empty(device=device)
    model.model.embed_tokens.weight.copy_(checkpoint.get("transformer.vocab_embedding.weight"))
    model.model.norm.weight.copy_(checkpoint.get("transformer.ln_f.weight"))
    model.lm_head.weight.copy_(float_weight(checkpoint, "lm_head"))
    for index, layer in enumerate(model.model.layers):
        assert isinstance(layer, DecoderLayer)
        at = layer_prefix(index)
        for name, (sources, _, _) in plain_tensors(config, index).items():
            tensor, start = checkpoint.get(at + name), 0
            for source in sources:
                parameter = layer.get_parameter(source)
                parameter.copy_(tensor[start : start + parameter.shape[0]])
                start += parameter.shape[0]
        for fused in linears(config, index):
            for number in range(fused.experts or 1):
                whole = float_weight(checkpoint, at + fused.name, None if fused.experts is None else number)
                for source, rows in pieces(config, fused):
                    layer.get_parameter(source.format(number) + ".weight").copy_(whole[rows])
        assert isinstance(layer.mlp, MoE) == config.is_moe(index)
    return model.eval().requires_grad_(False)


def float_weight(checkpoint: Checkpoint, name: str, expert: int | None = None) -> torch.Tensor:
    """The float32 weight [out, in] that a linear layer multiplies by (of one of its experts)."""

    def part(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return tensor if tensor is None or expert is None else tensor[expert]

    weight = part(checkpoint.get(f"{name}.weight"))
    assert weight is not None
    scales = part(checkpoint.optional(f"{name}.{SCALES['int4']}"))
    if scales is not None:
        return int4.dequantize(weight, scales, part(checkpoint.optional(f"{name}.{PREQUANT}")))
    rows = part(checkpoint.optional(f"{name}.{SCALES['int8']}"))
    return weight.float() if rows is None else int8.dequantize(weight, rows)
