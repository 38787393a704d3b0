"""The whole chain on the CPU, onnxruntime for segments and reference operators between, against the language model."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trtvlm.builder.check_onnx import difference, widened
from trtvlm.model.attention import MultiHeadLatentAttention
from trtvlm.model.cache import KVCache, LatentCache
from trtvlm.model.chain import Chain, EngineStep, OperatorStep
from trtvlm.model.errors import GraphError
from trtvlm.model.language import DecoderLayer, LanguageModel
from trtvlm.model.moe import MoE
from trtvlm.plugins.gqa_attention.reference import gqa_attention
from trtvlm.plugins.int4_moe.module import Int4MoE
from trtvlm.plugins.int4_moe.reference import Int4MLP, int4_moe
from trtvlm.plugins.mla_attention.reference import mla_attention
from trtvlm.plugins.onnx_runner import OnnxRunner

if TYPE_CHECKING:
    import onnx

# Relative L2 error a row of logits may have when everything is float32: a few hundred sums in another order. Measured
# chains stay under 1e-6; a tensor wired wrongly gives 0.1 and more.
EXACT = 1e-3

# The same as compiled, of the median row. Rounding alone makes about sqrt(480) * 2^-11 = 1% of 60 segments and operators
# with 8 roundings each. But where a token's last chosen and first refused expert score the same to within rounding, one
# may stand in for the other: a few percent of that layer's output each time, in a deep model in every row. What this
# catches is float16 overflowing or losing its small values; wiring is the exact comparison's.
ROUNDED = 2.0**-4


@dataclass(frozen=True)
class ChainDifference:
    """How the chain as compiled compares with the language model, over a prefill's last row and some decodes.

    `rel_l2` is the median row's, because a rounding that swaps two nearly equal experts moves a single row far;
    `agreement` is the share of rows with the same best token, 0..1.
    """

    rel_l2: float
    max_abs: float
    agreement: float


class ReferenceOperators:
    """The plugins' reference operators over a packed language model, in one dtype, with empty caches of their own."""

    def __init__(self, language: LanguageModel, exact: LanguageModel, dtype: torch.dtype, longest: int) -> None:
        """Float experts are rounded to float16 in `language` already: in float32 they are taken from `exact`."""
        self._caches = KVCache(language.config, 1, longest, dtype).layers
        self._layers = [layer for layer in language.model.layers if isinstance(layer, DecoderLayer)]
        floats = exact if dtype == torch.float32 else language
        # Packed experts stay as they are: their operators take the activation's dtype.
        self._experts: list[nn.Module] = [
            layer.mlp if isinstance(layer.mlp, Int4MoE) else other.get_submodule("mlp")
            for layer, other in zip(self._layers, floats.model.layers, strict=True)
        ]

    def __call__(self, step: OperatorStep, inputs: Mapping[str, Tensor], start: int) -> dict[str, Tensor]:
        """Run `step` for rows at positions `start`, `start` + 1, ...: inputs by name -> outputs by name."""
        (output,) = step.outputs
        if step.operator.endswith("moe"):
            return {output: after_router(self._experts[step.layer], inputs["normed"], inputs["router_logits"])}
        cache, cursor = self._caches[step.layer], torch.tensor([start])
        common = (step.attributes[name] for name in ("heads", "scale", "rope_theta"))
        if isinstance(cache, LatentCache):
            attention = self._layers[step.layer].self_attn
            assert isinstance(attention, MultiHeadLatentAttention)
            weight = attention.kv_b_proj.weight
            parts = inputs["q"], inputs["latent"], inputs["k_pe"], weight, cache.latent[0], cache.k_pe[0]
            return {output: mla_attention(*parts, cursor, *common)}
        heads = inputs["q"], inputs["k"], inputs["v"], cache.k[0], cache.v[0]
        return {output: gqa_attention(*heads, cursor, *common)}


def after_router(experts: nn.Module, x: Tensor, logits: Tensor) -> Tensor:
    """A MoE layer from its input [rows, hidden] and its router's logits float32 [rows, experts] -> [rows, hidden]."""
    if isinstance(experts, Int4MoE):
        held = dict(experts.named_buffers())
        parts = [field.name for field in dataclasses.fields(Int4MLP)]
        routed, shared = ({part: held.get(prefix + part) for part in parts} for prefix in ("", "shared_"))
        return int4_moe(
            x,
            logits,
            Int4MLP(**routed),  # type: ignore[arg-type]
            experts.routing,
            Int4MLP(**shared) if shared["fc"] is not None else None,  # type: ignore[arg-type]
            experts.correction_bias,
        )
    assert isinstance(experts, MoE)
    index, weight = experts.gate.choose(logits.sigmoid() if experts.gate.sigmoid else logits.softmax(-1))
    total = torch.zeros_like(x, dtype=torch.float32)
    for number, expert in enumerate(experts.experts):
        rows, slot = (index == number).nonzero(as_tuple=True)
        if rows.numel():
            total.index_add_(0, rows, expert(x[rows]).float() * weight[rows, slot].unsqueeze(-1))
    out = total.to(x.dtype)
    if hasattr(experts, "shared_experts"):
        out = out + experts.shared_experts(x)
    return out


class ChainRunner:
    """A whole language model on the CPU: tokens of one sequence in, logits out, with the cache in the operators."""

    def __init__(self, chain: Chain, graphs: Mapping[str, OnnxRunner], operators: ReferenceOperators) -> None:
        self._chain, self._graphs, self._operators = chain, graphs, operators

    def __call__(self, tokens: Tensor, start: int, last_only: bool = False) -> Tensor:
        """Token ids int64 [rows] at positions from `start` on -> logits float32 [rows or 1, vocab]."""
        tensors = {self._chain.input: tokens}
        for step in self._chain.steps:
            inputs = {name: tensors[source] for name, source in step.inputs.items()}
            if isinstance(step, EngineStep):
                if step.rows == "last" and last_only:
                    inputs = {name: value[-1:] for name, value in inputs.items()}
                outputs = self._graphs[step.name](inputs)
            else:
                outputs = self._operators(step, inputs, start)
            tensors |= {target: outputs[name] for name, target in step.outputs.items()}
        return tensors[self._chain.output]


@torch.no_grad()
def check_chain(
    part: str,
    chain: Chain,
    graphs: Mapping[str, "onnx.ModelProto"],
    packed: LanguageModel,
    language: LanguageModel,
    *,
    exact: float = EXACT,
    rounded: float = ROUNDED,
) -> ChainDifference:
    """Run the whole chain, a prefill and decodes of several widths with a rollback, against `language` in float32.

    `packed` is the model that was cut, with the operators' weights; `language` the same one in float32. First every
    graph is widened to float32 and every row must agree within `exact`, which finds any tensor wired wrongly; then as
    compiled, where the median row must agree within `rounded`. Raises GraphError naming the part.
    """
    width, longest = chain.profiles["decode"][2], chain.profiles["prefill"][2]
    prefill = max(1, min(24, longest - width - 1))
    # (start, rows): the last pass overwrites what the third wrote, as a step does whose draft was refused.
    passes = [(0, prefill), (prefill, 1), (prefill + 1, width), (prefill + 2, min(2, width))]
    passes = [(start, rows) for start, rows in passes if start + rows <= longest]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, language.config.vocab_size, (sum(passes[-1]) + width,), generator=generator)[:longest]
    logits = language(language.model.embed_tokens(tokens).unsqueeze(0))[0]
    expected = torch.cat([logits[start + (rows - 1 if not start else 0) : start + rows] for start, rows in passes])

    def run(dtype: torch.dtype) -> Tensor:
        wide = dtype == torch.float32
        runners = {name: OnnxRunner(name, widened(graph) if wide else graph) for name, graph in graphs.items()}
        runner = ChainRunner(chain, runners, ReferenceOperators(packed, language, dtype, longest))
        return torch.cat([runner(tokens[start : start + rows], start, last_only=not start) for start, rows in passes])

    wide_error = _rows_rel_l2(run(torch.float32), expected).max().item()
    if not wide_error <= exact:
        raise GraphError(
            f"The {part}'s segments and operators together (float32) give logits with a relative error of "
            f"{wide_error:.2e} against PyTorch, over the {exact:.2e} allowed: the chain is wired wrongly."
        )
    found = run(torch.float16)
    error = _rows_rel_l2(found, expected).median().item()
    if not error <= rounded:
        raise GraphError(
            f"The {part}'s segments and operators together give logits with a relative error of {error:.2e} against "
            f"PyTorch, over the {rounded:.2e} allowed."
        )
    agreement = (found.argmax(-1) == expected.argmax(-1)).float().mean().item()
    return ChainDifference(error, difference(found, expected).max_abs, agreement)


def _rows_rel_l2(found: Tensor, expected: Tensor) -> Tensor:
    errors: Tensor = (found - expected).double().norm(dim=-1) / expected.double().norm(dim=-1)
    return errors
