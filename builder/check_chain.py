"""The whole chain on the CPU, onnxruntime for segments and reference operators between, against the language model."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trtvlm.builder.check_onnx import difference, only_moves, runner
from trtvlm.builder.layers import Layers
from trtvlm.model.attention import MultiHeadLatentAttention, causal_mask
from trtvlm.model.cache import KVCache, LatentCache
from trtvlm.model.chain import Chain, EngineStep, OperatorStep
from trtvlm.model.config import LanguageConfig
from trtvlm.model.errors import GraphError
from trtvlm.model.language import DecoderLayer
from trtvlm.model.moe import MoE
from trtvlm.model.rope import rope_table
from trtvlm.plugins.gqa_attention.reference import gqa_attention
from trtvlm.plugins.int4_moe.module import Int4MoE
from trtvlm.plugins.int4_moe.reference import Int4MLP, int4_moe
from trtvlm.plugins.mla_attention.reference import mla_attention

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
    return experts.mix(x, *experts.gate.choose(logits.sigmoid() if experts.gate.sigmoid else logits.softmax(-1)))


Pass = tuple[int, int]
"""A pass over the model: the position of its first row, and its rows."""


def passes_of(width: int, longest: int) -> list[Pass]:
    """A prefill and decodes of several widths; the last overwrites what the third wrote, as when a draft was refused."""
    prefill = max(1, min(24, longest - width - 1))
    found = [(0, prefill), (prefill, 1), (prefill + 1, width), (prefill + 2, min(2, width))]
    return [(start, rows) for start, rows in found if start + rows <= longest]


class ChainRun:
    """A chain's tensors in one dtype, pass by pass; steps are run in order, each for all passes, and then forgotten."""

    def __init__(self, chain: Chain, tokens: Tensor, passes: Sequence[Pass], dtype: torch.dtype) -> None:
        """Token ids int64 [positions]; `dtype` float32 is for widened graphs."""
        self._chain, self._passes, self._dtype = chain, passes, dtype
        self._tensors = [{chain.input: tokens[start : start + rows]} for start, rows in passes]

    def engine(self, step: EngineStep, graph: "onnx.ModelProto") -> None:
        """Run a segment's graph."""
        wide = self._dtype == torch.float32
        run = runner(step.name, graph, wide=wide and not only_moves(graph))
        for (start, _), inputs, tensors in zip(self._passes, self._inputs(step), self._tensors, strict=True):
            if step.rows == "last" and not start:
                inputs = {name: value[-1:] for name, value in inputs.items()}
            outputs = run(inputs)
            # Copies: what the runtime gave lies in memory of its own, all of which lives as long as a part of it.
            copies = {
                name: value.to(torch.float32 if wide else value.dtype, copy=True) for name, value in outputs.items()
            }
            tensors.update({target: copies[name] for name, target in step.outputs.items()})

    def attention(self, step: OperatorStep, layer: DecoderLayer, config: LanguageConfig) -> None:
        """Run an attention operator of `layer`, with an empty cache of its own."""
        longest = max(start + rows for start, rows in self._passes)
        cache = KVCache(dataclasses.replace(config, num_hidden_layers=1), 1, longest, self._dtype).layers[0]
        (output,) = step.outputs
        common = [step.attributes[name] for name in ("heads", "scale", "rope_theta")]
        for (start, _), inputs, tensors in zip(self._passes, self._inputs(step), self._tensors, strict=True):
            cursor = torch.tensor([start])
            if isinstance(cache, LatentCache):
                assert isinstance(layer.self_attn, MultiHeadLatentAttention)
                weight = layer.self_attn.kv_b_proj.weight
                parts = inputs["q"], inputs["latent"], inputs["k_pe"], weight, cache.latent[0], cache.k_pe[0]
                found = mla_attention(*parts, cursor, *common)
            else:
                found = gqa_attention(inputs["q"], inputs["k"], inputs["v"], cache.k[0], cache.v[0], cursor, *common)
            tensors[step.outputs[output]] = found

    def experts(self, step: OperatorStep, experts: nn.Module) -> None:
        """Run an experts operator, on the rows of all passes at once: each expert is unpacked only once."""
        inputs = self._inputs(step)
        x, logits = (torch.cat([each[name] for each in inputs]) for name in ("normed", "router_logits"))
        (output,) = step.outputs
        found = after_router(experts, x, logits).split([each["normed"].shape[0] for each in inputs])
        for tensors, rows in zip(self._tensors, found, strict=True):
            tensors[step.outputs[output]] = rows

    def logits(self) -> Tensor:
        """Float32 [1 + the decodes' rows, vocab]: of a prefill only the last row has any."""
        return torch.cat([tensors[self._chain.output] for tensors in self._tensors])

    def _inputs(self, step: EngineStep | OperatorStep) -> list[dict[str, Tensor]]:
        return [{name: tensors[source] for name, source in step.inputs.items()} for tensors in self._tensors]


class Reference:
    """The language model in float32 on the same tokens, a layer at a time."""

    def __init__(self, layers: Layers, tokens: Tensor) -> None:
        """Token ids int64 [positions]."""
        config = layers.config
        table = rope_table(config.rope_dim, config.max_position_embeddings, config.rope_theta)
        self._rope = (table[0][: tokens.numel()].unsqueeze(0), table[1][: tokens.numel()].unsqueeze(0))
        self._mask = causal_mask(tokens.numel(), 0, None, tokens.device)
        self._layers = layers
        self._x = layers.embed_tokens()(tokens).unsqueeze(0)

    def through(self, index: int) -> None:
        """Run decoder layer `index`."""
        self._x = self._layers.layer(index)(self._x, self._rope, self._mask)

    def logits(self, rows: Tensor) -> Tensor:
        """Float32 [rows, vocab] at the positions `rows`."""
        out: Tensor = self._layers.lm_head()(self._layers.norm()(self._x[0, rows]))
        return out.float()


@torch.no_grad()
def check_chain(
    part: str,
    chain: Chain,
    graph: Callable[[str], "onnx.ModelProto"],
    packed: Layers,
    language: Layers,
    *,
    exact: float = EXACT,
    rounded: float = ROUNDED,
) -> ChainDifference:
    """Run the whole chain, a prefill and decodes of several widths with a rollback, against `language` in float32.

    `graph` gives a segment's graph by name; `packed` has the operators' weights as they are stored, `language` the same
    model in float32. Steps are run one after the other, each for every pass, so no more than a layer need be in memory.
    Widened to float32 every row must agree within `exact`, which finds any tensor wired wrongly; as compiled, the median
    row within `rounded`. Raises GraphError naming the part.
    """
    config = language.config
    passes = passes_of(chain.profiles["decode"][2], min(chain.profiles["prefill"][2], config.max_position_embeddings))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (max(sum(each) for each in passes),), generator=generator)
    reference = Reference(language, tokens)
    wide, narrow = (ChainRun(chain, tokens, passes, dtype) for dtype in (torch.float32, torch.float16))
    for step in chain.steps:
        if isinstance(step, EngineStep):
            found = graph(step.name)
            for run in (wide, narrow):
                run.engine(step, found)
        elif step.operator.endswith("attention"):
            reference.through(step.layer)
            for run in (wide, narrow):
                run.attention(step, packed.layer(step.layer), config)
        else:
            stored = packed.layer(step.layer).mlp
            # Float experts are rounded to float16 in `packed`; packed ones take the activation's dtype.
            wide.experts(step, stored if isinstance(stored, Int4MoE) else language.layer(step.layer).mlp)
            narrow.experts(step, stored)
    rows = [range(start + (rows - 1 if not start else 0), start + rows) for start, rows in passes]
    expected = reference.logits(torch.tensor([row for each in rows for row in each]))
    wide_error = _rows_rel_l2(wide.logits(), expected).max().item()
    if not wide_error <= exact:
        raise GraphError(
            f"The {part}'s segments and operators together (float32) give logits with a relative error of "
            f"{wide_error:.2e} against PyTorch, over the {exact:.2e} allowed: the chain is wired wrongly."
        )
    error = _rows_rel_l2(narrow.logits(), expected).median().item()
    if not error <= rounded:
        raise GraphError(
            f"The {part}'s segments and operators together give logits with a relative error of {error:.2e} against "
            f"PyTorch, over the {rounded:.2e} allowed."
        )
    agreement = (narrow.logits().argmax(-1) == expected.argmax(-1)).float().mean().item()
    return ChainDifference(error, difference(narrow.logits(), expected).max_abs, agreement)


def _rows_rel_l2(found: Tensor, expected: Tensor) -> Tensor:
    errors: Tensor = (found - expected).double().norm(dim=-1) / expected.double().norm(dim=-1)
    return errors
