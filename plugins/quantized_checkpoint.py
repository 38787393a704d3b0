"""The quantized language checkpoint: TensorRT-LLM's names, shapes and layout, and modules made of it.

One table, `linears`, says which of our linear layers becomes which of TensorRT-LLM's tensors; writing (builder), reading
and sizing all go through it. INT4 has `weights_scaling_factor` beside the weight, INT8 `per_channel_scale`, 16 bit
neither. TensorRT-LLM has no INT4 form of MLA's query projection; ours stands under `attention.q_proj`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trtvlm.model.artifacts import EngineDir
from trtvlm.model.config import LanguageConfig
from trtvlm.model.errors import UserError
from trtvlm.model.language import DecoderLayer, LanguageModel
from trtvlm.model.moe import MLP, MoE
from trtvlm.model.vlm import DeepseekVL2
from trtvlm.plugins.int4_linear import packing as int4
from trtvlm.plugins.int4_linear.module import Int4Linear
from trtvlm.plugins.int4_moe.module import Int4MoE
from trtvlm.plugins.int4_moe.reference import Int4MLP, Routing
from trtvlm.plugins.int8_linear import packing as int8
from trtvlm.plugins.int8_linear.module import Int8Linear

Kind = Literal["fp16", "int8", "int4"]
QUANTIZATIONS: dict[str, Kind] = {"none": "fp16", "int8_wo": "int8", "int4_awq": "int4"}
# TensorRT-LLM's names for them.
ALGORITHMS: dict[str, str | None] = {"none": None, "int8_wo": "W8A16", "int4_awq": "W4A16_AWQ"}

SCALES: dict[Kind, str] = {"int4": "weights_scaling_factor", "int8": "per_channel_scale"}
PREQUANT = "prequant_scaling_factor"

Spec = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class Fused:
    """One of TensorRT-LLM's linear layers: `sources` (below the decoder layer) stacked on their outputs.

    In a MoE layer `experts` is their number, and each source has "{}" where the expert's number goes.
    """

    name: str
    sources: tuple[str, ...]
    outputs: int
    inputs: int
    experts: int | None = None


def linears(config: LanguageConfig, layer: int) -> list[Fused]:
    """The linear layers of decoder layer `layer` that are quantized, in order."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    if config.use_mla:
        low_rank = config.q_lora_rank is not None
        source, width = ("self_attn.q_b_proj", config.q_lora_rank) if low_rank else ("self_attn.q_proj", hidden)
        assert width is not None
        found = [Fused("attention.q_proj", (source,), heads * config.head_dim, width)]
    else:
        parts = tuple(f"self_attn.{part}_proj" for part in "qkv")
        found = [Fused("attention.qkv", parts, (heads + 2 * config.num_key_value_heads) * config.head_dim, hidden)]
    found.append(Fused("attention.dense", ("self_attn.o_proj",), hidden, heads * config.value_head_dim))
    if not config.is_moe(layer):
        return found + _mlp("mlp", "mlp", hidden, config.intermediate_size)
    width, experts = config.moe_intermediate_size, config.n_routed_experts
    routed = ("mlp.experts.{}.up_proj", "mlp.experts.{}.gate_proj")
    found.append(Fused("mlp.fc", routed, 2 * width, hidden, experts))
    found.append(Fused("mlp.proj", ("mlp.experts.{}.down_proj",), hidden, width, experts))
    if config.n_shared_experts:
        found += _mlp("mlp.shared_expert", "mlp.shared_experts", hidden, width * config.n_shared_experts)
    return found


def _mlp(name: str, source: str, hidden: int, width: int) -> list[Fused]:
    """A dense MLP; TensorRT-LLM's `fc` is the activated side, our gate_proj, and its `gate` our up_proj."""
    return [
        Fused(f"{name}.fc", (f"{source}.gate_proj",), width, hidden),
        Fused(f"{name}.gate", (f"{source}.up_proj",), width, hidden),
        Fused(f"{name}.proj", (f"{source}.down_proj",), hidden, width),
    ]


def plain_tensors(
    config: LanguageConfig, layer: int
) -> dict[str, tuple[tuple[str, ...], torch.dtype, tuple[int, ...]]]:
    """What stays as it is in a decoder layer: name -> (our parameters, stacked on dimension 0; dtype; shape)."""
    half, hidden = torch.float16, config.hidden_size
    found: dict[str, tuple[tuple[str, ...], torch.dtype, tuple[int, ...]]] = {
        "input_layernorm.weight": (("input_layernorm.weight",), half, (hidden,)),
        "post_layernorm.weight": (("post_attention_layernorm.weight",), half, (hidden,)),
    }
    if config.use_mla:
        rank, rope = config.kv_lora_rank or 0, config.qk_rope_head_dim
        first: tuple[str, ...] = () if config.q_lora_rank is None else ("self_attn.q_a_proj.weight",)
        rows = (config.q_lora_rank or 0) + rank + rope
        found["attention.fused_a.weight"] = ((*first, "self_attn.kv_a_proj_with_mqa.weight"), half, (rows, hidden))
        found["attention.kv_a_layernorm.weight"] = (("self_attn.kv_a_layernorm.weight",), half, (rank,))
        if config.q_lora_rank is not None:
            found["attention.q_a_layernorm.weight"] = (("self_attn.q_a_layernorm.weight",), half, (config.q_lora_rank,))
        kv_b = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)
        found["attention.kv_b_proj.weight"] = (("self_attn.kv_b_proj.weight",), half, (kv_b, rank))
    if config.is_moe(layer):
        experts = config.n_routed_experts or 0
        found["mlp.router.weight"] = (("mlp.gate.weight",), torch.float32, (experts, hidden))
        if config.topk_method == "noaux_tc":
            bias = ("mlp.gate.e_score_correction_bias",)
            found["mlp.e_score_correction_bias"] = (bias, torch.float32, (experts,))
    return found


def specs(kind: Kind, name: str, outputs: int, inputs: int, experts: int | None = None) -> dict[str, Spec]:
    """The tensors of one linear layer of `kind`: name -> (dtype, shape)."""
    lead = () if experts is None else (experts,)
    if kind == "fp16":
        return {f"{name}.weight": (torch.float16, (*lead, outputs, inputs))}
    if kind == "int8":
        return {
            f"{name}.weight": (torch.int8, (*lead, outputs, inputs)),
            f"{name}.{SCALES['int8']}": (torch.float32, (*lead, outputs)),
        }
    return {
        f"{name}.weight": (torch.int8, (*lead, outputs // 2, inputs)),
        f"{name}.{SCALES['int4']}": (torch.float32, (*lead, outputs, inputs // int4.GROUP_SIZE)),
        f"{name}.{PREQUANT}": (torch.float16, (*lead, inputs)),
    }


def layer_prefix(layer: int) -> str:
    """Where the tensors of a decoder layer are."""
    return f"transformer.layers.{layer}."


def layout(config: LanguageConfig, kind: Kind, lm_head: Kind) -> dict[str, Spec]:
    """Every tensor of the checkpoint: name -> (dtype, shape), from the configuration alone."""
    vocabulary = (config.vocab_size, config.hidden_size)
    found: dict[str, Spec] = {"transformer.vocab_embedding.weight": (torch.float16, vocabulary)}
    for layer in range(config.num_hidden_layers):
        for name, (_, dtype, shape) in plain_tensors(config, layer).items():
            found[layer_prefix(layer) + name] = (dtype, shape)
        for linear in linears(config, layer):
            found |= specs(kind, layer_prefix(layer) + linear.name, linear.outputs, linear.inputs, linear.experts)
    found["transformer.ln_f.weight"] = (torch.float16, (config.hidden_size,))
    return found | {name: spec for name, spec in specs(lm_head, "lm_head", *vocabulary).items() if PREQUANT not in name}


class QuantizedWeights(ABC):
    """A language model's tensors under TensorRT-LLM's names, and layers made of them; `get` says where they come from."""

    config: LanguageConfig
    kind: Kind
    lm_head: Kind
    layout: dict[str, Spec]

    @abstractmethod
    def get(self, name: str) -> Tensor:
        """One tensor, of the layout's dtype and shape."""

    def optional(self, name: str) -> Tensor | None:
        """The tensor if the layout has it."""
        return self.get(name) if name in self.layout else None

    def float_weight(self, name: str) -> Tensor:
        """The float32 weight [..., out, in] a linear layer `name` multiplies by, whatever it is stored as."""
        weight = self.get(f"{name}.weight")
        if f"{name}.{SCALES['int4']}" in self.layout:
            return int4.dequantize(weight, self.get(f"{name}.{SCALES['int4']}"), self.optional(f"{name}.{PREQUANT}"))
        if f"{name}.{SCALES['int8']}" in self.layout:
            return int8.dequantize(weight, self.get(f"{name}.{SCALES['int8']}"))
        return weight.float()

    def float_weights(self, name: str) -> Iterator[Tensor]:
        """`float_weight` [out, in] of each expert of a layer, or of the one there is; no more than one is made at a time."""
        weight = self.get(f"{name}.weight")
        if weight.dim() == 2:
            yield self.float_weight(name)
            return
        scales = {kind: self.optional(f"{name}.{scale}") for kind, scale in SCALES.items()}
        before = self.optional(f"{name}.{PREQUANT}")
        for number, part in enumerate(weight):
            if (groups := scales["int4"]) is not None:
                yield int4.dequantize(part, groups[number], None if before is None else before[number])
            elif (rows := scales["int8"]) is not None:
                yield int8.dequantize(part, rows[number])
            else:
                yield part.float()

    def module(self, name: str, rows: slice = slice(None)) -> nn.Module:
        """A layer over the stored weight (its output rows `rows`): Int4Linear, Int8Linear or a float16 nn.Linear."""
        weight = self.get(f"{name}.weight")
        if f"{name}.{SCALES['int4']}" in self.layout:
            packed = slice(
                None if rows.start is None else rows.start // 2, None if rows.stop is None else rows.stop // 2
            )
            scales = self.get(f"{name}.{SCALES['int4']}")
            return Int4Linear(
                weight[packed].contiguous(), scales[rows].contiguous(), self.optional(f"{name}.{PREQUANT}")
            )
        if f"{name}.{SCALES['int8']}" in self.layout:
            return Int8Linear(weight[rows].contiguous(), self.get(f"{name}.{SCALES['int8']}")[rows].contiguous())
        linear = nn.Linear(weight.shape[1], weight[rows].shape[0], bias=False, dtype=weight.dtype)
        linear.weight = nn.Parameter(weight[rows].contiguous(), requires_grad=False)
        return linear


class QuantizedReader(QuantizedWeights):
    """Reads an engine directory's language checkpoint; every tensor's dtype and shape is checked against `layout`."""

    def __init__(self, engine: EngineDir) -> None:
        self.config = engine.model_config().language
        config = engine.config()
        kinds = {ALGORITHMS[quant]: kind for quant, kind in QUANTIZATIONS.items()}
        try:
            self.kind: Kind = kinds[config["pretrained_config"]["quantization"]["quant_algo"]]
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{engine.config_file} has no usable quantization ({error}): build the engine again."
            ) from None
        self.path = engine.weights
        try:
            self.file: Any = safe_open(str(self.path), framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.path} is not a whole safetensors file ({error}): build the engine again.") from None
        stored = set(self.file.keys())
        scaled = [kind for kind, scale in SCALES.items() if f"lm_head.{scale}" in stored]
        self.lm_head: Kind = scaled[0] if scaled else "fp16"
        self.layout = layout(self.config, self.kind, self.lm_head)

    def get(self, name: str) -> Tensor:
        """One tensor. Raises UserError naming it when it is missing or not as config.json says."""
        try:
            tensor: Tensor = self.file.get_tensor(name)
        except SafetensorError:
            raise UserError(f"{self.path} has no whole tensor {name}: build the engine again.") from None
        dtype, shape = self.layout[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise UserError(
                f"{self.path} has {name} as {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}: build it again."
            )
        return tensor


def pieces(config: LanguageConfig, fused: Fused) -> Iterator[tuple[str, slice]]:
    """The sources of a layer without experts, each with its output rows."""
    if len(fused.sources) == 1:
        yield fused.sources[0], slice(0, fused.outputs)
        return
    sizes = [fused.outputs // len(fused.sources)] * len(fused.sources)
    if fused.name == "attention.qkv":
        sizes = [n * config.head_dim for n in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
    start = 0
    for source, size in zip(fused.sources, sizes, strict=True):
        yield source, slice(start, start + size)
        start += size


def load_quantized(folder: str | Path) -> DeepseekVL2:
    """The whole model of an engine directory in float32, its weights dequantized: what a CPU runs.

    Raises UserError naming what is missing or does not fit.
    """
    engine = EngineDir(Path(folder))
    reader = QuantizedReader(engine)
    with torch.device("meta"):
        model = DeepseekVL2(engine.model_config())
    model = model.to_empty(device="cpu")
    _load_vision(model, engine)
    fill_language(reader, model.language)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def fill_language(reader: QuantizedWeights, language: LanguageModel) -> None:
    """Give a float language model, in place, the weights that its linear layers multiply by, dequantized."""
    language.model.embed_tokens.weight.copy_(reader.get("transformer.vocab_embedding.weight"))
    language.model.norm.weight.copy_(reader.get("transformer.ln_f.weight"))
    language.lm_head.weight.copy_(reader.float_weight("lm_head"))
    for index, layer in enumerate(language.model.layers):
        assert isinstance(layer, DecoderLayer)
        _fill_float(reader, layer, index)


@torch.no_grad()
def float_layer(reader: QuantizedWeights, index: int) -> DecoderLayer:
    """Decoder layer `index` alone, as in `load_quantized`."""
    with torch.device("meta"):
        layer = DecoderLayer(reader.config, index)
    layer = layer.to_empty(device="cpu")
    _fill_float(reader, layer, index)
    return layer.eval().requires_grad_(False)


def _fill_float(reader: QuantizedWeights, layer: DecoderLayer, index: int) -> None:
    _load_plain(reader, layer, index)
    for fused in linears(reader.config, index):
        for number, whole in enumerate(reader.float_weights(layer_prefix(index) + fused.name)):
            for source, rows in pieces(reader.config, fused):
                layer.get_parameter(source.format(number) + ".weight").copy_(whole[rows])


def load_quantized_packed(folder: str | Path) -> DeepseekVL2:
    """The whole model in float16 with its weights as they are stored: what is exported.

    Linear layers are Int4Linear, Int8Linear or float16 nn.Linear; routed experts Int4MoE, or, when they are not INT4,
    a float16 MoE. A layer's `mlp.gate` is its router either way.
    """
    engine = EngineDir(Path(folder))
    reader = QuantizedReader(engine)
    with torch.device("meta"):
        model = DeepseekVL2(engine.model_config())
    model = model.half().to_empty(device="cpu")
    _load_vision(model, engine)
    language = model.language
    with torch.no_grad():
        language.model.embed_tokens.weight.copy_(reader.get("transformer.vocab_embedding.weight"))
        language.model.norm.weight.copy_(reader.get("transformer.ln_f.weight"))
        language.lm_head = reader.module("lm_head")  # type: ignore[assignment]
        for index, layer in enumerate(language.model.layers):
            assert isinstance(layer, DecoderLayer)
            _fill_packed(reader, layer, index)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def packed_layer(reader: QuantizedWeights, index: int) -> DecoderLayer:
    """Decoder layer `index` alone, as in `load_quantized_packed`."""
    with torch.device("meta"):
        layer = DecoderLayer(reader.config, index).half()
        if reader.kind == "int4" and isinstance(layer.mlp, MoE):
            # They stay packed: their place need not be found first.
            layer.mlp.experts = nn.ModuleList()
    layer = layer.to_empty(device="cpu")
    _fill_packed(reader, layer, index)
    return layer.eval().requires_grad_(False)


def _fill_packed(reader: QuantizedWeights, layer: DecoderLayer, index: int) -> None:
    _load_plain(reader, layer, index)
    for fused in linears(reader.config, index):
        name = layer_prefix(index) + fused.name
        if fused.experts is not None:
            _load_experts(reader, layer, fused, name)
            continue
        for source, rows in pieces(reader.config, fused):
            _replace(layer, source, reader.module(name, rows))
    if isinstance(layer.mlp, MoE) and reader.kind == "int4":
        layer.mlp = _packed_experts(reader, layer.mlp, layer_prefix(index))  # type: ignore[assignment]


def load_vision(engine: EngineDir) -> DeepseekVL2:
    """The model without its language part, in float16: what turns tiles into image tokens. UserError: it is not whole."""
    with torch.device("meta"):
        model = DeepseekVL2(engine.model_config())
    model.language = nn.Identity()  # type: ignore[assignment]
    model = model.half().to_empty(device="cpu")
    _load_vision(model, engine)
    return model.eval().requires_grad_(False)


def _load_vision(model: DeepseekVL2, engine: EngineDir) -> None:
    try:
        with safe_open(str(engine.vision_weights), framework="pt") as file, torch.no_grad():
            for name, parameter in model.named_parameters():
                if not name.startswith("language."):
                    parameter.copy_(file.get_tensor(name))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise UserError(
            f"{engine.vision_weights} is not the whole vision part ({error}): build the engine again."
        ) from None


def _load_plain(reader: QuantizedWeights, layer: nn.Module, index: int) -> None:
    for name, (sources, dtype, _) in plain_tensors(reader.config, index).items():
        tensor = reader.get(layer_prefix(index) + name)
        start = 0
        for source in sources:
            parameter = layer.get_parameter(source)
            parameter.data = parameter.data.to(dtype if dtype == torch.float32 else parameter.dtype)
            parameter.copy_(tensor[start : start + parameter.shape[0]])
            start += parameter.shape[0]


def _load_experts(reader: QuantizedWeights, layer: DecoderLayer, fused: Fused, name: str) -> None:
    """Float experts in place, unless they stay packed."""
    if reader.kind == "int4":
        return
    weight = reader.float_weight(name)
    for number in range(fused.experts or 0):
        for source, rows in pieces(reader.config, fused):
            layer.get_parameter(source.format(number) + ".weight").copy_(weight[number, rows])


def _packed_experts(reader: QuantizedWeights, moe: MoE, prefix: str) -> Int4MoE:
    gate = moe.gate
    routing = Routing(
        gate.top_k, "sigmoid" if gate.sigmoid else "softmax", gate.normalise, gate.scaling, gate.groups, gate.top_groups
    )

    def tensors(name: str) -> tuple[Tensor, Tensor, Tensor]:
        stored: Any = tuple(reader.get(f"{prefix}{name}.{part}") for part in ("weight", SCALES["int4"], PREQUANT))
        return stored  # type: ignore[no-any-return]

    fc, proj = tensors("mlp.fc"), tensors("mlp.proj")
    experts = Int4MLP(fc[0], fc[1], proj[0], proj[1], fc[2][0], proj[2][0])
    shared = None
    if hasattr(moe, "shared_experts"):
        gated, up, down = (tensors(f"mlp.shared_expert.{part}") for part in ("fc", "gate", "proj"))
        both = (torch.cat((up[0], gated[0])), torch.cat((up[1], gated[1])))
        shared = Int4MLP(*both, down[0], down[1], gated[2], down[2])
    packed = Int4MoE(
        gate.weight.detach().float(), experts, routing, shared, reader.optional(f"{prefix}mlp.e_score_correction_bias")
    )
    packed.gate = gate
    return packed


def _replace(layer: nn.Module, source: str, module: nn.Module) -> None:
    parent, _, name = source.rpartition(".")
    setattr(layer.get_submodule(parent), name, module)


__all__ = [
    "MLP",
    "QUANTIZATIONS",
    "Fused",
    "Kind",
    "LanguageModel",
    "QuantizedReader",
    "QuantizedWeights",
    "fill_language",
    "float_layer",
    "layer_prefix",
    "layout",
    "linears",
    "load_quantized",
    "load_quantized_packed",
    "packed_layer",
    "pieces",
    "plain_tensors",
    "specs",
]
