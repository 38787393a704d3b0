"""A whole language model as one ONNX graph: the chain's segments joined by plugin nodes, for a TensorRT that takes plugins.

The segments are those of the chain, exported as for TensorRT-RTX. Between them an operator is one node of the domain
`trtvlm`, whose weights are constants in the order its kernels read them. Its caches go in and come out, one over the other.
Weights lie beside the graph in one file, written as they are made: a model is larger than a protobuf may be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from trtvlm.builder.export import OPSET, ROWS
from trtvlm.model.chain import CURSOR, WANTED, Chain, EngineStep, OperatorStep, cache_name
from trtvlm.model.config import LanguageConfig
from trtvlm.model.errors import UserError
from trtvlm.model.rope import rope_table
from trtvlm.plugins.chain_weights import Weights, int4_experts, routing_of
from trtvlm.plugins.int4_moe.boundary import MoEBoundary
from trtvlm.plugins.mla_attention.decode import MLAWeights
from trtvlm.plugins.onnx_nodes import DOMAIN, VERSION

if TYPE_CHECKING:
    import onnx

NAMESPACE = "trtvlm"
"""Of the plugins, in TensorRT's registry."""

_ALIGNMENT = 4096


@dataclass
class PluginGraph:
    """A graph under construction, and the file its weights go to."""

    chain: Chain
    config: LanguageConfig
    weights: Weights
    positions: int
    data: BinaryIO
    data_name: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    named: set[str] = field(default_factory=set)

    def segment(self, step: EngineStep, graph: onnx.GraphProto) -> None:
        """Take in a segment's nodes and weights: its inputs and outputs get the chain's names, all else its own in front."""
        outside = step.inputs | step.outputs
        if step.rows == "last":
            # Only the wanted rows reach the head.
            outside |= {name: self._gathered(source) for name, source in step.inputs.items()}

        def rename(name: str) -> str:
            return outside.get(name, f"{step.name}/{name}") if name else name

        for tensor in graph.initializer:
            tensor.name = rename(tensor.name)
            self._store(tensor)
        for node in graph.node:
            node.name = f"{step.name}/{node.name}"
            for names in (node.input, node.output):
                names[:] = [rename(name) for name in names]
            self.nodes.append(node)

    def operator(self, step: OperatorStep) -> None:
        """Add an operator's node. UserError: one that is no plugin."""
        makers = {
            "mla_attention": self._latent_attention,
            "gqa_attention": self._head_attention,
            "int4_moe": self._experts,
        }
        if step.operator not in makers:
            raise UserError(
                f"One engine with plugins runs INT4 experts only, and layer {step.layer} has others: build with --quant "
                "int4_awq, or with --flavour tensorrt-rtx."
            )
        makers[step.operator](step)

    def model(self) -> onnx.ModelProto:
        """The whole graph."""
        from onnx import helper

        chain = self.chain
        inputs = [self._value(chain.hidden), self._info(CURSOR, "int32", [1]), self._info(WANTED, "int32", [WANTED])]
        outputs = [
            self._info(chain.output, chain.tensors[chain.output].dtype, [WANTED, chain.tensors[chain.output].shape[1]])
        ]
        for name, out, spec in chain.caches():
            shape = [self.positions if size == "max_seq_len" else size for size in spec.shape]
            inputs.append(self._info(name, spec.dtype, shape))
            outputs.append(self._info(out, spec.dtype, shape))
        graph = helper.make_graph(self.nodes, "language", inputs, outputs, self.constants)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=11, producer_name="trtvlm")

    def _latent_attention(self, step: OperatorStep) -> None:
        config = self.config
        heads, nope, rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
        kv_b = self.weights.get(step.weights["kv_b_proj"])
        packed = MLAWeights.pack(kv_b, None, heads, nope, rope)
        numbers = {
            "heads": heads, "nope": nope, "rope": rope, "value": packed.value, "rank": packed.rank,
            "positions": self.positions,
        }  # fmt: skip
        constants = {"keys": packed.keys, "values": packed.values}
        self._attention(step, ("q", "latent", "k_pe"), constants, numbers)

    def _head_attention(self, step: OperatorStep) -> None:
        config = self.config
        numbers = {
            "heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads, "width": config.head_dim,
            "positions": self.positions,
        }  # fmt: skip
        self._attention(step, ("q", "k", "v"), {}, numbers)

    def _attention(
        self, step: OperatorStep, taken: tuple[str, ...], constants: dict[str, Tensor], numbers: dict[str, int]
    ) -> None:
        inputs = [step.inputs[name] for name in taken]
        inputs += [self._constant(f"{step.operator}.{step.layer}/{name}", value) for name, value in constants.items()]
        inputs += self._tables()
        caches = [cache_name(name, step.layer) for name in self.chain.cache]
        outputs = [*step.outputs.values(), *(f"{name}.out" for name in caches)]
        self._node(step, [*inputs, *caches, CURSOR], outputs, numbers)

    def _experts(self, step: OperatorStep) -> None:
        experts, shared = int4_experts(step, self.weights)
        bias = (
            self.weights.get(step.weights["e_score_correction_bias"])
            if "e_score_correction_bias" in step.weights
            else None
        )
        routing = routing_of(step)
        try:
            packed = MoEBoundary.pack(experts, routing, shared, bias).weights
        except ValueError as error:
            raise UserError(
                f"The plugins cannot run layer {step.layer}: {error}; use --flavour tensorrt-rtx."
            ) from None
        inputs = [step.inputs["normed"], step.inputs["router_logits"]]
        for part in ("fc", "proj", "shared_fc", "shared_proj"):
            tiles = getattr(packed, part)
            for name in ("codes", "scales", "pre_quant_scale") if tiles is not None else ():
                inputs.append(self._constant(f"int4_moe.{step.layer}/{part}.{name}", getattr(tiles, name)))
        if bias is not None:
            inputs.append(self._constant(f"int4_moe.{step.layer}/correction_bias", bias))
        numbers = {
            "experts": packed.experts, "hidden": packed.hidden, "width": packed.width,
            "shared": packed.shared_width, "top_k": routing.top_k, "sigmoid": int(routing.scoring == "sigmoid"),
            "normalise": int(routing.normalise), "biased": int(bias is not None), "scaling": float(routing.scaling),
        }  # fmt: skip
        self._node(step, inputs, list(step.outputs.values()), numbers)

    def _node(
        self,
        step: OperatorStep,
        inputs: list[str],
        outputs: list[str],
        numbers: dict[str, int] | dict[str, int | float],
    ) -> None:
        from onnx import helper

        # The parser finds a plugin by the node's type, version and namespace, and hands it all attributes.
        node = helper.make_node(step.operator, inputs, outputs, name=f"{step.operator}.{step.layer}", domain=DOMAIN)
        attributes = {"plugin_version": "1", "plugin_namespace": NAMESPACE, **numbers}
        node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
        self.nodes.append(node)

    def _gathered(self, source: str) -> str:
        from onnx import helper

        self.nodes.append(
            helper.make_node("Gather", [source, WANTED], [f"{source}.wanted"], name=f"{source}/Gather", axis=0)
        )
        return f"{source}.wanted"

    def _tables(self) -> list[str]:
        tables = rope_table(self.config.rope_dim, self.positions, self.config.rope_theta)
        return [self._constant(name, table) for name, table in zip(("rope.cosines", "rope.sines"), tables, strict=True)]

    def _constant(self, name: str, value: Tensor) -> str:
        """A weight of the graph, once -> its name."""
        from onnx import TensorProto, helper

        if name not in self.named:
            kinds = {torch.half: TensorProto.FLOAT16, torch.float32: TensorProto.FLOAT, torch.int32: TensorProto.INT32}
            raw = value.contiguous().numpy().tobytes()
            self._store(helper.make_tensor(name, kinds[value.dtype], list(value.shape), raw, raw=True))
        return name

    def _store(self, tensor: onnx.TensorProto) -> None:
        """Move what is large to the file."""
        from onnx import TensorProto

        self.named.add(tensor.name)
        self.constants.append(tensor)
        if not tensor.HasField("raw_data") or len(tensor.raw_data) < 1024:
            return
        self.data.write(bytes(-self.data.tell() % _ALIGNMENT))
        where = {"location": self.data_name, "offset": self.data.tell(), "length": len(tensor.raw_data)}
        self.data.write(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in where.items():
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)

    def _value(self, name: str) -> onnx.ValueInfoProto:
        spec = self.chain.tensors[name]
        return self._info(name, spec.dtype, [ROWS if size == "rows" else size for size in spec.shape])

    @staticmethod
    def _info(name: str, dtype: str, shape: list[Any]) -> onnx.ValueInfoProto:
        from onnx import TensorProto, helper

        kinds = {"float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT, "int32": TensorProto.INT32}
        return helper.make_tensor_value_info(name, kinds[dtype], shape)


def write_plugin_graph(
    path: Path,
    chain: Chain,
    config: LanguageConfig,
    weights: Weights,
    positions: int,
    segment: Callable[[EngineStep], onnx.ModelProto],
) -> None:
    """Write `path` and, beside it, `path`.data. `segment` exports one; the embedding stays outside.

    positions: of the cache, as the operators are made for. UserError: a model that the plugins do not run.
    """
    data = path.with_name(f"{path.name}.data")
    with data.open("wb") as file:
        graph = PluginGraph(chain, config, weights, positions, file, data.name)
        for step in _after_embedding(chain):
            if isinstance(step, EngineStep):
                graph.segment(step, segment(step).graph)
            else:
                graph.operator(step)
        path.write_bytes(graph.model().SerializeToString(deterministic=True))


def _after_embedding(chain: Chain) -> Iterator[EngineStep | OperatorStep]:
    begun = False
    for step in chain.steps:
        if begun:
            yield step
        begun = begun or chain.hidden in step.outputs.values()
