"""Cuts a language model into a chain of segments and operators."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from trtvlm.builder.layers import Layers, WholeModel
from trtvlm.builder.segments import (
    AttentionOut,
    Closing,
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
from trtvlm.model.language import LanguageModel
from trtvlm.plugins.int4_moe.module import Int4MoE
from trtvlm.plugins.quantized_checkpoint import Kind, layer_prefix


@dataclass(frozen=True)
class Recipe:
    """What a segment is made of: the end of layer `opened`'s attention or experts, perhaps its MLP, and what follows.

    Without `closing` it is the embedding.
    """

    opening: type[Opening] = Stream
    opened: int = 0
    dense: bool = False
    closing: type[Closing] | None = None
    closed: int = 0

    @property
    def kind(self) -> str:
        """All that is the same for segments that differ only in their weights."""
        closing = self.closing.__name__ if self.closing else ""
        return f"{self.opening.__name__} {'dense ' if self.dense else ''}{closing}"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the module's inputs, in order."""
        return self.opening.inputs if self.closing else Embed.inputs

    @property
    def passes_residual(self) -> bool:
        """Whether the first output is the residual stream."""
        return self.closing is not None and Segment.passes(self.opening, self.closing)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the module's outputs, in order."""
        if self.closing is None:
            return Embed.outputs
        return (("residual_out",) if self.passes_residual else ()) + self.closing.outputs

    def module(self, layers: Layers) -> Segment | Embed:
        """The module, over the weights of `layers`."""
        if self.closing is None:
            return Embed(layers.embed_tokens())
        opening = AttentionOut(layers.layer(self.opened)) if issubclass(self.opening, AttentionOut) else self.opening()
        dense = DenseMLP(layers.layer(self.opened)) if self.dense else None
        if self.closing is Head:
            return Segment(opening, Head(layers.norm(), layers.lm_head()), dense)
        return Segment(opening, self.closing(layers.layer(self.closed)), dense)  # type: ignore[arg-type, call-arg]


def cut(
    language: LanguageModel, weights: Collection[str] = (), *, max_rows: int, max_width: int
) -> tuple[Chain, dict[str, Segment | Embed]]:
    """Cut a language model in memory -> the chain, and each segment's module by name.

    The modules share the model's weights and dtype. `weights` are the names in rank0.safetensors, `max_width` is the
    most rows of a decode pass, `max_rows` of a prefill.
    """
    dtype = str(language.model.norm.weight.dtype).removeprefix("torch.")
    packed = any(isinstance(module, Int4MoE) for module in language.modules())
    kind: Kind = "int4" if packed else "fp16"
    chain, recipes = cut_config(language.config, kind, weights, dtype=dtype, max_rows=max_rows, max_width=max_width)
    layers = WholeModel(language)
    return chain, {name: recipe.module(layers) for name, recipe in recipes.items()}


def cut_config(
    config: LanguageConfig,
    kind: Kind,
    weights: Collection[str] = (),
    *,
    dtype: str = "float16",
    max_rows: int,
    max_width: int,
) -> tuple[Chain, dict[str, Recipe]]:
    """`cut` without a model: the chain, and how each segment is made. `kind` is how linear layers are stored."""
    links = _Links(config, kind, dtype, weights)
    links.start()
    for index in range(config.num_hidden_layers):
        links.attention(index)
        if config.is_moe(index):
            links.experts(index)
        else:
            links.dense = True
    links.close("head", Head, 0, ["logits"], rows="last")
    best = max(1, max_rows // 2)
    profiles = {"decode": (1, min(5, max_width), max_width), "prefill": (1, best, max_rows)}
    return Chain(links.tensors, tuple(links.steps), _cache(config, links.dtype), profiles), links.recipes


@dataclass
class _Links:
    """The chain under construction: what is finished, and the segment that the last operator opened."""

    config: LanguageConfig
    kind: Kind
    dtype: str
    weights: Collection[str]
    tensors: dict[str, TensorSpec] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    recipes: dict[str, Recipe] = field(default_factory=dict)

    opening: type[Opening] = Stream
    layer: int = 0
    opened: str = ""
    inputs: tuple[str, ...] = ("hidden.0",)
    dense: bool = False

    def start(self) -> None:
        self.tensors["tokens"] = TensorSpec("int64", ("rows",))
        self._tensor("hidden.0", self.config.hidden_size)
        self._engine("embed", Recipe(), ["tokens"], ["hidden.0"])

    def attention(self, index: int) -> None:
        config = self.config
        closing = LatentAttentionIn if config.use_mla else HeadAttentionIn
        names = [f"{name}.{index}" for name in closing.outputs]
        for name, width in zip(names, _attention_widths(config), strict=True):
            self._tensor(name, width)
        stream = self.close(f"attention{index}_in", closing, index, names, f"hidden.{index}")
        attention = self._tensor(f"attention.{index}", config.num_attention_heads * config.value_head_dim)
        # Of the attention's weights only kv_b_proj is the operator's; the others are in segments.
        name = f"{layer_prefix(index)}attention.kv_b_proj.weight"
        weights = {"kv_b_proj": name} if config.use_mla else {}
        numbers = {"heads": config.num_attention_heads, "scale": config.head_dim**-0.5, "rope_theta": config.rope_theta}
        operator = "mla_attention" if config.use_mla else "gqa_attention"
        inputs = dict(zip(closing.outputs, names, strict=True))
        self.steps.append(OperatorStep(operator, index, inputs, {"attention": attention}, weights, numbers))
        self._open(AttentionOut, index, f"attention{index}_out_", (stream, attention))

    def experts(self, index: int) -> None:
        config = self.config
        names = [f"{name}.{index}" for name in ExpertsIn.outputs]
        self._tensor(names[0], config.hidden_size)
        self._tensor(names[1], config.n_routed_experts or 0, "float32")
        stream = self.close(f"experts{index}_in", ExpertsIn, index, names, f"between.{index}")
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
        operator = "int4_moe" if self.kind == "int4" else "moe"
        inputs = dict(zip(ExpertsIn.outputs, names, strict=True))
        self.steps.append(OperatorStep(operator, index, inputs, {"experts": experts}, weights, numbers))
        self._open(ExpertsOut, index, f"experts{index}_out_", (stream, experts))

    def close(
        self,
        what: str,
        closing: type[Closing],
        layer: int,
        names: Sequence[str],
        stream: str = "",
        rows: Literal["all", "last"] = "all",
    ) -> str:
        """Finish the open segment; its outputs get `names`, and the residual stream `stream` -> the stream's name."""
        if closing is Head:
            self._tensor(names[0], self.config.vocab_size, "float32")
        recipe = Recipe(self.opening, self.layer, self.dense, closing, layer)
        outputs = [*names]
        if recipe.passes_residual:
            outputs.insert(0, self._tensor(stream, self.config.hidden_size))
        self._engine(self.opened + what, recipe, self.inputs, outputs, rows)
        return outputs[0] if recipe.passes_residual else self.inputs[0]

    def _open(self, opening: type[Opening], layer: int, opened: str, inputs: tuple[str, ...]) -> None:
        self.opening, self.layer, self.opened, self.inputs, self.dense = opening, layer, opened, inputs, False

    def _tensor(self, name: str, width: int, dtype: str | None = None) -> str:
        self.tensors[name] = TensorSpec(dtype or self.dtype, ("rows", width))
        return name

    def _engine(
        self,
        what: str,
        recipe: Recipe,
        inputs: Sequence[str],
        outputs: Sequence[str],
        rows: Literal["all", "last"] = "all",
    ) -> None:
        name = f"{len(self.recipes):02d}_{what}"
        self.recipes[name] = recipe
        taken, made = dict(zip(recipe.inputs, inputs, strict=True)), dict(zip(recipe.outputs, outputs, strict=True))
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
