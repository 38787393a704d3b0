"""Cuts a language model into a chain of segments and operators."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

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
from trtvlm.model.chain import Chain, EngineStep, OperatorStep, Step, TensorSpec
from trtvlm.model.config import LanguageConfig
from trtvlm.model.language import DecoderLayer, LanguageModel
from trtvlm.plugins.int4_moe.module import Int4MoE
from trtvlm.plugins.quantized_checkpoint import layer_prefix


def cut(
    language: LanguageModel, weights: Collection[str] = (), *, max_rows: int, max_width: int
) -> tuple[Chain, dict[str, Segment | Embed]]:
    """Cut a language model -> the chain, and each segment's module by name.

    The modules share the model's weights and dtype. `weights` are the names in rank0.safetensors, `max_width` is the
    most rows of a decode pass, `max_rows` of a prefill.
    """
    config = language.config
    links = _Links(config, str(language.model.norm.weight.dtype).removeprefix("torch."), weights)
    links.start(language)
    for index, layer in enumerate(language.model.layers):
        assert isinstance(layer, DecoderLayer)
        links.attention(layer, index)
        if config.is_moe(index):
            links.experts(layer, index)
        else:
            links.dense = DenseMLP(layer)
    links.close("head", Head(language.model.norm, language.lm_head), ["logits"], rows="last")
    best = max(1, max_rows // 2)
    profiles = {"decode": (1, min(5, max_width), max_width), "prefill": (1, best, max_rows)}
    return Chain(links.tensors, tuple(links.steps), _cache(config, links.dtype), profiles), links.modules


@dataclass
class _Links:
    """The chain under construction: what is finished, and the segment that the last operator opened."""

    config: LanguageConfig
    dtype: str
    weights: Collection[str]
    tensors: dict[str, TensorSpec] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    modules: dict[str, Segment | Embed] = field(default_factory=dict)

    opening: Opening = field(default_factory=Stream)
    opened: str = ""
    inputs: tuple[str, ...] = ("hidden.0",)
    dense: DenseMLP | None = None

    def start(self, language: LanguageModel) -> None:
        self.tensors["tokens"] = TensorSpec("int64", ("rows",))
        self._tensor("hidden.0", self.config.hidden_size)
        self._engine("embed", Embed(language.model.embed_tokens), ["tokens"], ["hidden.0"])

    def attention(self, layer: DecoderLayer, index: int) -> None:
        config = self.config
        closing = LatentAttentionIn(layer) if config.use_mla else HeadAttentionIn(layer)
        names = [f"{name}.{index}" for name in closing.outputs]
        for name, width in zip(names, _attention_widths(config), strict=True):
            self._tensor(name, width)
        stream = self.close(f"attention{index}_in", closing, names, f"hidden.{index}")
        attention = self._tensor(f"attention.{index}", config.num_attention_heads * config.value_head_dim)
        # Of the attention's weights only kv_b_proj is the operator's; the others are in segments.
        name = f"{layer_prefix(index)}attention.kv_b_proj.weight"
        weights = {"kv_b_proj": name} if config.use_mla else {}
        numbers = {"heads": config.num_attention_heads, "scale": config.head_dim**-0.5, "rope_theta": config.rope_theta}
        operator = "mla_attention" if config.use_mla else "gqa_attention"
        inputs = dict(zip(closing.outputs, names, strict=True))
        self.steps.append(OperatorStep(operator, index, inputs, {"attention": attention}, weights, numbers))
        self._open(AttentionOut(layer), f"attention{index}_out_", (stream, attention))

    def experts(self, layer: DecoderLayer, index: int) -> None:
        config = self.config
        closing = ExpertsIn(layer)
        names = [f"{name}.{index}" for name in closing.outputs]
        self._tensor(names[0], config.hidden_size)
        self._tensor(names[1], closing.router.shape[0], "float32")
        stream = self.close(f"experts{index}_in", closing, names, f"between.{index}")
        experts = self._tensor(f"experts.{index}", config.hidden_size)
        prefix = f"{layer_prefix(index)}mlp."
        below = {name.removeprefix(prefix): name for name in self.weights if name.startswith(prefix)}
        # The router is in the segment before.
        weights = {key: name for key, name in below.items() if not key.startswith("router.")}
        numbers = {
            "top_k": config.num_experts_per_tok,
            "scoring": config.scoring_func,
            "normalise": config.norm_topk_prob,
            "scaling": config.routed_scaling_factor,
            "groups": config.n_group or 1,
            "top_groups": config.topk_group or 1,
        }
        operator = "int4_moe" if isinstance(layer.mlp, Int4MoE) else "moe"
        inputs = dict(zip(closing.outputs, names, strict=True))
        self.steps.append(OperatorStep(operator, index, inputs, {"experts": experts}, weights, numbers))
        self._open(ExpertsOut(), f"experts{index}_out_", (stream, experts))

    def close(
        self,
        what: str,
        closing: LatentAttentionIn | HeadAttentionIn | ExpertsIn | Head,
        names: Sequence[str],
        stream: str = "",
        rows: Literal["all", "last"] = "all",
    ) -> str:
        """Finish the open segment; its outputs get `names`, and the residual stream `stream` -> the stream's name."""
        if isinstance(closing, Head):
            self._tensor(names[0], self.config.vocab_size, "float32")
        segment = Segment(self.opening, closing, self.dense)
        outputs = [*names]
        if segment.passes_residual:
            outputs.insert(0, self._tensor(stream, self.config.hidden_size))
        self._engine(self.opened + what, segment, self.inputs, outputs, rows)
        return outputs[0] if segment.passes_residual else self.inputs[0]

    def _open(self, opening: Opening, opened: str, inputs: tuple[str, ...]) -> None:
        self.opening, self.opened, self.inputs, self.dense = opening, opened, inputs, None

    def _tensor(self, name: str, width: int, dtype: str | None = None) -> str:
        self.tensors[name] = TensorSpec(dtype or self.dtype, ("rows", width))
        return name

    def _engine(
        self,
        what: str,
        module: Segment | Embed,
        inputs: Sequence[str],
        outputs: Sequence[str],
        rows: Literal["all", "last"] = "all",
    ) -> None:
        name = f"{len(self.modules):02d}_{what}"
        self.modules[name] = module
        taken, made = dict(zip(module.inputs, inputs, strict=True)), dict(zip(module.outputs, outputs, strict=True))
        self.steps.append(EngineStep(name, taken, made, rows))


def _attention_widths(config: LanguageConfig) -> tuple[int, int, int]:
    """Widths of what an attention operator takes, in the order of the closing segment's outputs."""
    if config.use_mla:
        assert config.kv_lora_rank is not None
        return config.num_attention_heads * config.head_dim, config.kv_lora_rank, config.qk_rope_head_dim
    head = config.head_dim
    return config.num_attention_heads * head, config.num_key_value_heads * head, config.num_key_value_heads * head


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
