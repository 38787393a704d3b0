"""The language model as a chain: TensorRT segments and plugin operators in order, and the tensors that join them.

`language/chain.json` is this, written out: enough for a runtime to allocate every buffer once and wire everything up.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from trtvlm.builder.segments import (
    AttentionOut,
    DenseMLP,
    Embed,
    ExpertsIn,
    ExpertsOut,
    Head,
    HeadAttentionIn,
    LatentAttentionIn,
    Opening,
    Segment,
    Stream,
)
from trtvlm.model.config import LanguageConfig
from trtvlm.model.language import LanguageModel

VERSION = 1

Size = int | str


@dataclass(frozen=True)
class TensorSpec:
    """A tensor between steps: its type and shape, where "rows" is the number of tokens of the pass."""

    dtype: str
    shape: tuple[Size, ...]


@dataclass(frozen=True)
class EngineStep:
    """A segment: files NAME.onnx and NAME.engine, and which tensor of the chain each of its own inputs and outputs is.

    `rows` "last" means that a prefill runs it on the last row of its inputs only; it has no prefill profile.
    """

    name: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    rows: Literal["all", "last"] = "all"
    kind: Literal["engine"] = "engine"


@dataclass(frozen=True)
class OperatorStep:
    """A plugin operator: its inputs and outputs in the chain, its weights' names in rank0.safetensors, its attributes."""

    operator: str
    layer: int
    inputs: dict[str, str]
    outputs: dict[str, str]
    weights: dict[str, str]
    attributes: dict[str, Any]
    kind: Literal["operator"] = "operator"


Step = EngineStep | OperatorStep


@dataclass(frozen=True)
class Chain:
    """The steps in order. `input` takes the tokens and `output` holds the logits; `hidden` is where images are put in."""

    tensors: dict[str, TensorSpec]
    steps: tuple[Step, ...]
    cache: dict[str, TensorSpec]
    profiles: dict[str, tuple[int, int, int]]
    input: str = "tokens"
    hidden: str = "hidden.0"
    output: str = "logits"
    version: int = VERSION

    def to_json(self) -> str:
        """The text of chain.json; the same chain gives the same bytes."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Chain":
        """Read `to_json`'s text. ValueError for another version."""
        raw = json.loads(text)
        if raw["version"] != VERSION:
            raise ValueError(f"chain.json has version {raw['version']}, not {VERSION}")
        tensors, cache = (
            {name: TensorSpec(spec["dtype"], tuple(spec["shape"])) for name, spec in raw[key].items()}
            for key in ("tensors", "cache")
        )
        steps = tuple(EngineStep(**step) if step["kind"] == "engine" else OperatorStep(**step) for step in raw["steps"])
        profiles = {name: (sizes[0], sizes[1], sizes[2]) for name, sizes in raw["profiles"].items()}
        return cls(tensors, steps, cache, profiles, raw["input"], raw["hidden"], raw["output"])

    def engines(self) -> Iterator[EngineStep]:
        """The segments, in order."""
        return (step for step in self.steps if isinstance(step, EngineStep))


@dataclass
class _Links:
    """The chain under construction."""

    config: LanguageConfig
    dtype: str
    tensors: dict[str, TensorSpec] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    modules: dict[str, Segment | Embed] = field(default_factory=dict)
    cache: dict[str, TensorSpec] = field(default_factory=dict)

    def tensor(self, name: str, width: int, dtype: str | None = None) -> str:
        self.tensors[name] = TensorSpec(dtype or self.dtype, ("rows", width))
        return name

    def segment(
        self,
        what: str,
        module: Segment | Embed,
        inputs: Sequence[str],
        outputs: Sequence[str],
        rows: Literal["all", "last"] = "all",
    ) -> None:
        name = f"{len(self.modules):02d}_{what}"
        self.modules[name] = module
        wired = dict(zip(module.inputs, inputs, strict=True)), dict(zip(module.outputs, outputs, strict=True))
        self.steps.append(EngineStep(name, *wired, rows=rows))


def build_chain(
    language: LanguageModel, *, max_rows: int, max_width: int, dtype: torch.dtype = torch.float16
) -> tuple[Chain, dict[str, Segment | Embed]]:
    """Cut a language model into segments -> the chain, and each segment's module by name.

    The modules share the model's weights. `max_width` is the most tokens of a decode pass (1..8), `max_rows` of a
    prefill.
    """
    config = language.config
    links = _Links(config, str(dtype).removeprefix("torch."))
    hidden = config.hidden_size
    links.tensors["tokens"] = TensorSpec("int64", ("rows",))
    stream = links.tensor("hidden.0", hidden)
    links.segment("embed", Embed(language.model.embed_tokens), ["tokens"], [stream])
    opening: Opening = Stream()
    inputs, opened, dense = [stream], "", None
    for index, layer in enumerate(language.model.layers):
        closing = LatentAttentionIn(layer) if config.use_mla else HeadAttentionIn(layer)
        segment = Segment(opening, closing, dense)
        dense = None
        prepared = [
            links.tensor(f"{name}.{index}", width)
            for name, width in zip(closing.outputs, _attention_widths(config), strict=True)
        ]
        outputs = list(prepared)
        if segment.passes_residual:
            stream = links.tensor(f"hidden.{index}", hidden)
            outputs.insert(0, stream)
        links.segment(f"{opened}attention{index}_in", segment, inputs, outputs)
        attention = links.tensor(f"attention.{index}", config.num_attention_heads * _value_width(config))
        links.steps.append(_attention_step(config, index, dict(zip(closing.outputs, prepared, strict=True)), attention))
        opening, inputs, opened = AttentionOut(layer), [stream, attention], f"attention{index}_out_"
        if not config.is_moe(index):
            dense = DenseMLP(layer)
            continue
        experts_in = ExpertsIn(layer)
        assert config.n_routed_experts is not None
        between = links.tensor(f"between.{index}", hidden)
        normed = links.tensor(f"normed.{index}", hidden)
        logits = links.tensor(f"router_logits.{index}", config.n_routed_experts, "float32")
        links.segment(f"{opened}experts{index}_in", Segment(opening, experts_in), inputs, [between, normed, logits])
        experts = links.tensor(f"experts.{index}", hidden)
        links.steps.append(
            _experts_step(config, index, dict(zip(experts_in.outputs, (normed, logits), strict=True)), experts)
        )
        opening, inputs, opened, stream = ExpertsOut(), [between, experts], f"experts{index}_out_", between
    head = Segment(opening, Head(language.model.norm, language.lm_head), dense)
    links.segment(f"{opened}head", head, inputs, [links.tensor("logits", config.vocab_size, "float32")], rows="last")
    profiles = {"decode": (1, min(5, max_width), max_width), "prefill": (1, max(1, max_rows // 2), max_rows)}
    return Chain(links.tensors, tuple(links.steps), _cache(config, links.dtype), profiles), links.modules


def _value_width(config: LanguageConfig) -> int:
    return config.v_head_dim if config.use_mla else config.head_dim


def _attention_widths(config: LanguageConfig) -> tuple[int, int, int]:
    """Widths of what an attention operator takes, in the order of the closing segment's outputs."""
    if config.use_mla:
        assert config.kv_lora_rank is not None
        return config.num_attention_heads * config.head_dim, config.kv_lora_rank, config.qk_rope_head_dim
    head = config.head_dim
    return config.num_attention_heads * head, config.num_key_value_heads * head, config.num_key_value_heads * head


def _attention_step(config: LanguageConfig, index: int, inputs: dict[str, str], output: str) -> OperatorStep:
    common = {"heads": config.num_attention_heads, "rope_theta": config.rope_theta, "scale": config.head_dim**-0.5}
    if config.use_mla:
        weights = {"kv_b_proj": f"transformer.layers.{index}.attention.kv_b_proj.weight"}
        sizes = {
            "kv_lora_rank": config.kv_lora_rank,
            "qk_nope_head_dim": config.qk_nope_head_dim,
            "qk_rope_head_dim": config.qk_rope_head_dim,
            "v_head_dim": config.v_head_dim,
        }
        return OperatorStep("mla_attention", index, inputs, {"attention": output}, weights, common | sizes)
    sizes = {"kv_heads": config.num_key_value_heads, "head_dim": config.head_dim}
    return OperatorStep("gqa_attention", index, inputs, {"attention": output}, {}, common | sizes)


def _experts_step(config: LanguageConfig, index: int, inputs: dict[str, str], output: str) -> OperatorStep:
    attributes = {
        "experts": config.n_routed_experts,
        "top_k": config.num_experts_per_tok,
        "width": config.moe_intermediate_size,
        "shared_width": config.moe_intermediate_size * (config.n_shared_experts or 0),
        "scoring": config.scoring_func,
        "normalise": config.norm_topk_prob,
        "scaling": config.routed_scaling_factor,
        "groups": config.n_group or 1,
        "top_groups": config.topk_group or 1,
    }
    return OperatorStep("int4_moe", index, inputs, {"experts": output}, {}, attributes)


def _cache(config: LanguageConfig, dtype: str) -> dict[str, TensorSpec]:
    """What one layer's attention keeps; "max_seq_len" is the engine directory's."""
    if config.use_mla:
        assert config.kv_lora_rank is not None
        return {
            "latent": TensorSpec(dtype, ("max_seq_len", config.kv_lora_rank)),
            "k_pe": TensorSpec(dtype, ("max_seq_len", config.qk_rope_head_dim)),
        }
    spec = TensorSpec(dtype, (config.num_key_value_heads, "max_seq_len", config.head_dim))
    return {"k": spec, "v": spec}
