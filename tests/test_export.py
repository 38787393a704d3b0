"""Graphs against modules: vision, every segment, and the chain of segments and operators."""

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.tiny import tiny_model
from trtvlm.builder.check_chain import ChainDifference, check_chain
from trtvlm.builder.check_onnx import check_graph, difference, only_moves, widened
from trtvlm.builder.cut import cut
from trtvlm.builder.engines import inputs
from trtvlm.builder.export import (
    ROWS,
    VIEWS,
    VisionEncoder,
    dynamic_dimensions,
    export_onnx,
    export_vision,
    max_views,
)
from trtvlm.builder.layers import WholeModel
from trtvlm.builder.segments import Norm
from trtvlm.model.chain import Chain, EngineStep, OperatorStep
from trtvlm.model.errors import GraphError
from trtvlm.model.language import LanguageModel
from trtvlm.model.moe import MoE
from trtvlm.model.norm import RMSNorm
from trtvlm.plugins.int4_linear.module import Int4Linear
from trtvlm.plugins.int4_moe.module import Int4MoE
from trtvlm.plugins.int8_linear.module import Int8Linear
from trtvlm.plugins.onnx_runner import OnnxRunner

MAX_ROWS, MAX_WIDTH = 64, 8


@dataclass(frozen=True)
class Built:
    """A tiny language model of two layers (dense, experts), cut and exported."""

    chain: Chain
    graphs: dict[str, onnx.ModelProto]
    modules: dict[str, nn.Module]
    packed: LanguageModel
    exact: LanguageModel


def _shortened(kind: str) -> LanguageModel:
    """One dense layer and one with experts have every kind of segment there is."""
    language = tiny_model(kind).language
    language.config = dataclasses.replace(language.config, num_hidden_layers=2)
    language.model.layers = language.model.layers[:2]
    return language.half()


def _pack(packed: nn.Module, exact: nn.Module) -> None:
    """Quantize the linear layers of `packed` as a build does, and give `exact` the weights they then stand for."""
    for name, layer in packed.named_children():
        other = getattr(exact, name)
        if isinstance(layer, MoE):
            experts = Int4MoE.from_float(layer)
            setattr(packed, name, experts)
            for number, expert in enumerate(other.experts):
                for projection, weight in _expert_weights(experts, "", number).items():
                    getattr(expert, projection).weight.data = weight
            for projection, weight in _expert_weights(experts, "shared_", None).items():
                getattr(other.shared_experts, projection).weight.data = weight
        elif isinstance(layer, nn.Linear) and name == "lm_head":
            head = Int8Linear.from_float(layer.weight)
            head.scales = head.scales.half()
            other.weight.data = head.dequantized()
            setattr(packed, name, head)
        elif isinstance(layer, nn.Linear) and not name.startswith("kv_"):
            rounded = Int4Linear.from_float(layer.weight)
            linear = Int4Linear(rounded.weight, rounded.scales.half(), (torch.rand(layer.in_features) + 0.5).half())
            other.weight.data = linear.dequantized()
            setattr(packed, name, linear)
        else:
            _pack(layer, other)


def _expert_weights(experts: Int4MoE, prefix: str, number: int | None) -> dict[str, Tensor]:
    def weight(part: str) -> Tensor:
        stored = getattr(experts, f"{prefix}{part}"), getattr(experts, f"{prefix}{part}_scales")
        packed, scales = stored if number is None else (stored[0][number], stored[1][number])
        return Int4Linear(packed, scales).dequantized()

    up, gate = weight("fc").chunk(2)
    return {"up_proj": up, "gate_proj": gate, "down_proj": weight("proj")}


def _build(kind: str, quantized: bool) -> Built:
    packed, exact = _shortened(kind), _shortened(kind).float()
    if quantized:
        _pack(packed, exact)
    chain, modules = cut(packed, max_rows=MAX_ROWS, max_width=MAX_WIDTH)
    graphs = {}
    for step in chain.engines():
        most = MAX_ROWS if step.rows == "all" else MAX_WIDTH
        graphs[step.name] = export_onnx(
            step.name, modules[step.name], inputs(chain, step, 2), list(step.outputs), dynamic=ROWS, largest=most
        )
    return Built(chain, graphs, dict(modules), packed, exact)


@pytest.fixture(scope="module", params=["mla int4", "mha none"])
def built(request: pytest.FixtureRequest) -> Built:
    kind, quant = request.param.split()
    return _build(kind, quant == "int4")


@pytest.fixture(scope="module")
def vision() -> tuple[onnx.ModelProto, VisionEncoder]:
    model = tiny_model("mla").half()
    return export_vision(model, 17), VisionEncoder(model)


def test_vision_equals_the_module_for_any_number_of_tiles(vision: tuple[onnx.ModelProto, VisionEncoder]) -> None:
    graph, module = vision
    assert dynamic_dimensions(graph) == {VIEWS}
    batches = [{"pixels": (torch.rand(views, 3, 32, 32) * 2 - 1).half()} for views in (1, 2, 17)]
    found = check_graph("vision", graph, module, batches)
    # Not zero: float16 was compared with float32.
    assert 0 < found.rel_l2 < 2e-3


def test_vision_attention_is_one_node_a_layer(vision: tuple[onnx.ModelProto, VisionEncoder]) -> None:
    kinds = [node.op_type for node in vision[0].graph.node]
    assert kinds.count("Attention") == len(vision[1].vision.blocks)


def test_a_difference_smaller_than_float16_rounding_is_found(vision: tuple[onnx.ModelProto, VisionEncoder]) -> None:
    graph = onnx.ModelProto()
    graph.CopyFrom(vision[0])
    tanh = next(
        attribute
        for node in graph.graph.node
        for attribute in node.attribute
        if node.op_type == "Gelu" and attribute.name == "approximate" and attribute.s == b"tanh"
    )
    tanh.s = b"none"
    batch = {"pixels": (torch.rand(2, 3, 32, 32) * 2 - 1).half()}
    with pytest.raises(GraphError, match=r"'vision' \(float32, 2 rows\) gives 'features'"):
        check_graph("vision", graph, vision[1], [batch])


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1))
def test_the_largest_grid_decides_how_many_views_there_can_be(grids: list[tuple[int, int]]) -> None:
    views = max_views([(w * 384, h * 384) for w, h in grids], 384)
    assert views - 1 in {w * h for w, h in grids}
    assert all(views > w * h for w, h in grids)


def test_every_segment_equals_its_module(built: Built) -> None:
    for step in built.chain.engines():
        rows = (1, 5, MAX_WIDTH) if step.rows == "last" else (1, 5, MAX_ROWS)
        batches = [inputs(built.chain, step, count) for count in rows]
        check_graph(step.name, built.graphs[step.name], built.modules[step.name], batches, exact=1e-5, rounded=2e-3)
        assert dynamic_dimensions(built.graphs[step.name]) == {ROWS}


def _check(part: str, chain: Chain, built: Built, **limits: float) -> ChainDifference:
    layers = WholeModel(built.packed), WholeModel(built.exact)
    return check_chain(part, chain, built.graphs.__getitem__, *layers, **limits)


def test_an_embedding_is_held_to_the_bit(built: Built) -> None:
    name = next(iter(built.graphs))
    graph, module = built.graphs[name], built.modules[name]
    step = next(built.chain.engines())
    batches = [inputs(built.chain, step, rows) for rows in (1, 24)]
    assert only_moves(graph)
    assert check_graph(name, graph, module, batches).max_abs == 0
    other = copy.deepcopy(module)
    other.embed_tokens.weight.data[int(batches[1]["tokens"][5]), 7] += 2**-6
    with pytest.raises(GraphError, match=r"'00_embed' \(24 rows\) gives other rows"):
        check_graph(name, graph, other, batches)


def test_the_whole_chain_equals_the_language_model(built: Built) -> None:
    found = _check("target", built.chain, built, exact=1e-4, rounded=5e-3)
    # A prefill's last row and 11 decoded rows; random logits can tie within rounding.
    assert found.agreement >= 10 / 12


def test_a_crossed_wire_is_found(built: Built) -> None:
    def crossed(step: Any) -> Any:
        if isinstance(step, EngineStep) and "residual" in step.inputs:
            return dataclasses.replace(step, inputs=step.inputs | {"residual": "hidden.0"})
        return step

    chain = dataclasses.replace(built.chain, steps=tuple(crossed(step) for step in built.chain.steps))
    with pytest.raises(GraphError, match="draft's segments and operators together"):
        _check("draft", chain, built)


def test_the_chain_says_all_a_runtime_needs(built: Built) -> None:
    chain = built.chain
    assert Chain.from_json(chain.to_json()) == chain
    known = {chain.input}
    for step in chain.steps:
        assert set(step.inputs.values()) <= known, "a step reads what no earlier step wrote"
        assert known.isdisjoint(step.outputs.values()), "a step writes over what an earlier one wrote"
        known |= set(step.outputs.values())
        if isinstance(step, EngineStep):
            graph = built.graphs[step.name].graph
            assert [value.name for value in graph.input] == list(step.inputs)
            assert [value.name for value in graph.output] == list(step.outputs)
            for value, name in zip(
                (*graph.input, *graph.output), (*step.inputs.values(), *step.outputs.values()), strict=True
            ):
                spec, found = chain.tensors[name], value.type.tensor_type
                assert onnx.TensorProto.DataType.Name(found.elem_type) == _ONNX_NAMES[spec.dtype]
                assert tuple(dim.dim_param or dim.dim_value for dim in found.shape.dim) == spec.shape
    assert known == set(chain.tensors)
    assert [step.operator.split("_")[-1] for step in chain.steps if isinstance(step, OperatorStep)] == [
        "attention",
        "attention",
        "moe",
    ]


_ONNX_NAMES = {"float16": "FLOAT16", "float32": "FLOAT", "int64": "INT64"}


def test_every_weight_is_in_one_segment_or_an_operators(built: Built) -> None:
    held = [
        tensor.data_ptr() for module in built.modules.values() for tensor in (*module.parameters(), *module.buffers())
    ]
    assert len(set(held)) == len(held)
    left = {
        name
        for name, tensor in (*built.packed.named_parameters(), *built.packed.named_buffers())
        if tensor.data_ptr() not in held
    }
    # Experts' weights, the router's (a float32 copy is in the segment), and the latent's expansion.
    assert {name for name in left if ".mlp." not in name} == {name for name in left if "kv_b_proj" in name}
    assert not any("layers.0.mlp" in name for name in left)


def test_quantized_weights_stay_quantized(built: Built) -> None:
    kinds = {tensor.data_type for graph in built.graphs.values() for tensor in graph.graph.initializer}
    if not isinstance(built.packed.lm_head, Int8Linear):
        assert not kinds & {onnx.TensorProto.INT4, onnx.TensorProto.INT8}
        return
    assert {onnx.TensorProto.INT4, onnx.TensorProto.INT8} <= kinds
    middle = next(graph for name, graph in built.graphs.items() if "attention0_out" in name)
    # 4.25 bits a weight: o_proj, the dense MLP and q_proj; kv_a_proj_with_mqa stays 16 bit.
    hidden, inner, q, kv = 64, 128, 96, 80
    expected = (64 * hidden + 3 * hidden * inner + hidden * q) * 4.25 / 8 + hidden * kv * 2
    assert middle.ByteSize() == pytest.approx(expected, rel=0.2)


def test_the_routers_product_is_float32(built: Built) -> None:
    graph = next(graph for name, graph in built.graphs.items() if name.endswith("experts1_in")).graph
    router = next(tensor for tensor in graph.initializer if list(tensor.dims) in ([4, 64], [64, 4]))
    assert router.data_type == onnx.TensorProto.FLOAT


@given(st.integers(0, 2**31), st.sampled_from([torch.float32, torch.float16]))
def test_the_norm_that_exports_is_the_models(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    norm = RMSNorm(64)
    norm.weight.data = torch.rand(64, generator=generator) + 0.5
    norm = norm.to(dtype)
    x = torch.randn(3, 64, generator=generator).mul(10).to(dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(Norm(norm)(x), norm(x), rtol=tolerance, atol=tolerance)


def test_widening_leaves_no_float16(vision: tuple[onnx.ModelProto, VisionEncoder]) -> None:
    wide = widened(vision[0])
    assert onnx.TensorProto.FLOAT16 not in {tensor.data_type for tensor in wide.graph.initializer}
    out = OnnxRunner("vision", wide)({"pixels": torch.zeros(1, 3, 32, 32)})["features"]
    assert out.dtype == torch.float32


def test_nan_and_another_shape_are_never_equal() -> None:
    ones = torch.ones(3)
    assert not difference(ones * float("nan"), ones).rel_l2 <= 1e9
    assert difference(torch.ones(1, 3), ones).rel_l2 == float("inf")
    assert difference(ones, ones) == difference(torch.zeros(3), torch.zeros(3))


class _Data(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0]


def test_a_module_that_cannot_be_exported_is_named() -> None:
    with pytest.raises(GraphError, match="graph 'sieve'"):
        export_onnx("sieve", _Data(), {"x": torch.randn(4)}, ["y"], dynamic=ROWS, largest=1)
