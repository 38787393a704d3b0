"""The plugins: made, asked, serialized and made again anywhere; launched on raw pointers inside a graph on a GPU."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from trtvlm.model.rope import rope_table
from trtvlm.plugins.gqa_attention.reference import gqa_attention
from trtvlm.plugins.gqa_attention.trt_plugin import GQAAttentionPlugin
from trtvlm.plugins.int4_linear import packing
from trtvlm.plugins.int4_moe.boundary import MoEBoundary
from trtvlm.plugins.int4_moe.reference import Int4MLP, Routing, int4_moe
from trtvlm.plugins.int4_moe.trt_plugin import Int4MoEPlugin
from trtvlm.plugins.mla_attention.decode import MLAWeights
from trtvlm.plugins.mla_attention.reference import mla_attention
from trtvlm.plugins.mla_attention.trt_plugin import MLAAttentionPlugin
from trtvlm.plugins.tensorrt import plugin as base
from trtvlm.plugins.tensorrt import shim
from trtvlm.plugins.tensorrt.binding import trt
from trtvlm.plugins.tensorrt.plugin import NAMESPACE, VERSION, OperatorCreator, OperatorPlugin, arrays, fields

MLA = {"heads": 16, "nope": 128, "rope": 64, "value": 128, "rank": 512, "positions": 512}
GQA = {"heads": 10, "kv_heads": 10, "width": 128, "positions": 512}
MOE = {"experts": 8, "hidden": 256, "width": 128, "shared": 256, "top_k": 2, "sigmoid": 0, "normalise": 0, "biased": 0}
BASE_MOE = MOE | {"sigmoid": 1, "normalise": 1, "biased": 1, "scaling": 2.5}
PLUGINS: list[tuple[type[OperatorPlugin], dict[str, Any]]] = [
    (MLAAttentionPlugin, MLA),
    (GQAAttentionPlugin, GQA),
    (Int4MoEPlugin, MOE | {"scaling": 1.0}),
    (Int4MoEPlugin, BASE_MOE),
    (Int4MoEPlugin, MOE | {"scaling": 1.0, "shared": 0}),
]
every = pytest.mark.parametrize(("kind", "numbers"), PLUGINS, ids=["mla", "gqa", "moe", "moe-base", "moe-unshared"])


def described(shape: Sequence[int], dtype: Any, layout: Any = None, rows: int = 5) -> Any:
    desc = trt.PluginTensorDesc()
    desc.dims = trt.Dims([rows if size < 0 else size for size in shape])
    desc.type, desc.format = dtype, trt.TensorFormat.LINEAR if layout is None else layout
    return desc


def dynamic(desc: Any) -> Any:
    # What TensorRT passes in a build: its own kind holds no Python-made description.
    return SimpleNamespace(desc=desc)


@every
def test_an_engine_makes_the_same_plugin_again(kind: type[OperatorPlugin], numbers: dict[str, Any]) -> None:
    plugin = kind(**numbers)
    creator = OperatorCreator(kind)
    assert (creator.name, creator.plugin_namespace, creator.plugin_version) == (kind.OPERATOR, NAMESPACE, VERSION)
    assert [field.name for field in base._each(creator.field_names)] == list(kind.FIELDS)
    again = creator.create_plugin("node", plugin.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME)
    for other in (again, plugin.clone(), plugin.attach_to_context(cast(Any, None))):
        assert isinstance(other, kind)
        assert other is not plugin
        assert other.numbers == plugin.numbers
        assert (other.plugin_name, other.plugin_namespace, other.plugin_version) == (kind.OPERATOR, NAMESPACE, VERSION)
    for capability in (trt.PluginCapabilityType.CORE, trt.PluginCapabilityType.BUILD, trt.PluginCapabilityType.RUNTIME):
        assert plugin.get_capability_interface(capability) is plugin


@every
def test_types_and_shapes(kind: type[OperatorPlugin], numbers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = kind(**numbers)
    assert len(plugin.input_types) == len(plugin.input_shapes)
    assert plugin.num_outputs == len(plugin.output_types) == len(plugin.output_shapes)
    assert plugin.get_output_data_types(list(plugin.input_types)) == list(plugin.output_types)
    # Expressions are TensorRT's own; here a name and numbers.
    monkeypatch.setattr(base, "dims_exprs", list)
    builder: Any = SimpleNamespace(constant=lambda value: value)
    inputs: Any = [["rows" if size < 0 else size for size in shape] for shape in plugin.input_shapes]
    found: Any = plugin.get_output_shapes(inputs, [], builder)
    assert found == [["rows" if size < 0 else size for size in shape] for shape in plugin.output_shapes]
    assert found[0][0] == "rows"
    for output, source in plugin.ALIASED.items():
        assert plugin.get_aliased_input(output) == source
        assert plugin.output_shapes[output] == plugin.input_shapes[source]
        assert plugin.output_types[output] == plugin.input_types[source]
    assert plugin.get_aliased_input(0) == -1
    assert plugin.get_workspace_size([], []) == plugin.workspace_bytes > 0
    assert plugin.get_valid_tactics() == []


@every
def test_it_takes_contiguous_tensors_of_its_types_and_no_others(
    kind: type[OperatorPlugin], numbers: dict[str, Any]
) -> None:
    plugin = kind(**numbers)
    types, shapes = (*plugin.input_types, *plugin.output_types), (*plugin.input_shapes, *plugin.output_shapes)
    good = [dynamic(described(shape, dtype)) for shape, dtype in zip(shapes, types, strict=True)]
    count = len(plugin.input_types)
    assert all(plugin.supports_format_combination(at, good, count) for at in range(len(good)))
    assert not plugin.supports_format_combination(0, good, count - 1)
    for at, (shape, dtype) in enumerate(zip(shapes, types, strict=True)):
        other = trt.DataType.FLOAT if dtype != trt.DataType.FLOAT else trt.DataType.HALF
        bad = [*good[:at], dynamic(described(shape, other)), *good[at + 1 :]]
        assert not plugin.supports_format_combination(at, bad, count)
    plugin.configure_plugin(good[:count], good[count:])
    plugin.on_shape_change([desc.desc for desc in good[:count]], [desc.desc for desc in good[count:]])
    wrong = dynamic(described([size + 1 for size in plugin.input_shapes[1]], plugin.input_types[1]))
    descs = [good[0], wrong, *good[2:count]]
    with pytest.raises(ValueError, match=f"input 1 of {kind.OPERATOR} has shape"):
        plugin.configure_plugin(descs, [])
    with pytest.raises(ValueError, match=f"input 1 of {kind.OPERATOR} has shape"):
        plugin.on_shape_change([desc.desc for desc in descs], [])


@every
def test_fields_it_needs(kind: type[OperatorPlugin], numbers: dict[str, Any]) -> None:
    creator = OperatorCreator(kind)
    kinds = dict(kind.FIELDS)
    first = next(iter(kinds))
    del kinds[first]
    with pytest.raises(ValueError, match=f"{kind.OPERATOR} lacks the number '{first}'"):
        creator.create_plugin("node", fields(held := arrays(numbers, kinds)), trt.TensorRTPhase.BUILD)
    # The parser adds fields of its own.
    held = arrays(numbers | {"plugin_level": 3}, {**kind.FIELDS, "plugin_level": int})
    found: Any = creator.create_plugin("node", fields(held), trt.TensorRTPhase.BUILD)
    assert found.numbers == kind(**numbers).numbers
    with pytest.raises(ValueError, match="has the numbers"):
        kind(**numbers, more=1)


@pytest.mark.parametrize(
    ("kind", "numbers", "message"),
    [
        (MLAAttentionPlugin, MLA | {"positions": 8192}, "at most 4096 positions"),
        (MLAAttentionPlugin, MLA | {"rank": 500}, "do not take a rank"),
        (GQAAttentionPlugin, GQA | {"kv_heads": 2}, "up to 2 heads a key head"),
        (GQAAttentionPlugin, GQA | {"positions": 8192}, "at most 4096 positions"),
        (Int4MoEPlugin, BASE_MOE | {"experts": 160}, "at most 15 of 128 experts"),
        (Int4MoEPlugin, BASE_MOE | {"shared": 200}, "must be a multiple of the experts' 128"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused(
    kind: type[OperatorPlugin], numbers: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**numbers)


@every
def test_without_tensorrt_a_shim_stands_in(
    kind: type[OperatorPlugin], numbers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hasattr(trt, "IPluginCreatorV3One")
    real = importlib.import_module("trtvlm.plugins.tensorrt.binding")
    monkeypatch.setattr(real.importlib, "import_module", _only_the_shim(importlib.import_module))
    assert real.find() is shim
    for name in (
        "IPluginV3",
        "IPluginV3OneBuildV2",
        "PluginField",
        "PluginFieldCollection",
        "PluginTensorDesc",
        "DimsExprs",
    ):
        assert hasattr(shim, name)
        assert hasattr(trt, name)
    for group in (
        shim.DataType,
        shim.TensorFormat,
        shim.PluginFieldType,
        shim.PluginCapabilityType,
        shim.TensorRTPhase,
    ):
        theirs = getattr(trt, group.__name__)
        assert {member.name: member.value for member in group} == {
            name: getattr(theirs, name).value for name in group.__members__
        }
    made: Any = shim.PluginFieldCollection(
        shim.PluginField(name, np.array([value]), shim.PluginFieldType.INT32) for name, value in numbers.items()
    )
    found: Any = OperatorCreator(kind).create_plugin("node", made, trt.TensorRTPhase.BUILD)
    assert found.numbers == kind(**numbers).numbers


def _only_the_shim(real: Callable[..., Any]) -> Callable[..., Any]:
    def find(name: str, *rest: Any) -> Any:
        if name.split(".")[0] in ("tensorrt", "tensorrt_rtx"):
            raise ImportError(name)
        return real(name, *rest)

    return find


# -- on a GPU -----------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A plugin, its inputs on the device, what its outputs must be, and which of them it leaves in which input."""

    plugin: OperatorPlugin
    inputs: list[Tensor]
    expected: list[Tensor]


def attention_case(kind: type[OperatorPlugin], rows: int, cursor: int) -> Case:
    torch.manual_seed(rows)
    at = torch.tensor([cursor], dtype=torch.int32)
    if kind is MLAAttentionPlugin:
        heads, nope, rope, value, rank, positions = MLA.values()
        q, latent, k_pe = (torch.randn(rows, width).half() for width in (heads * (nope + rope), rank, rope))
        kv_b = (torch.randn(heads * (nope + value), rank) * rank**-0.5).half()
        caches = [torch.randn(positions, width).half() for width in (rank, rope)]
        after = [cache.clone() for cache in caches]
        scale = (nope + rope) ** -0.5
        out = mla_attention(
            q.float(), latent.float(), k_pe.float(), kv_b.float(), after[0], after[1], at, heads, scale, 10_000.0
        )
        weights = MLAWeights.pack(kv_b, None, heads, nope, rope)
        inputs = [q, latent, k_pe, weights.keys, weights.values, *rope_table(rope, positions, 10_000.0), *caches, at]
        return Case(kind(**MLA), inputs, [out, *after])
    heads, kv_heads, width, positions = GQA.values()
    q, k, v = (torch.randn(rows, count * width).half() for count in (heads, kv_heads, kv_heads))
    caches = [torch.randn(kv_heads, positions, width).half() for _ in range(2)]
    after = [cache.clone() for cache in caches]
    out = gqa_attention(q.float(), k.float(), v.float(), after[0], after[1], at, heads, width**-0.5, 10_000.0)
    return Case(kind(**GQA), [q, k, v, *rope_table(width, positions, 10_000.0), *caches, at], [out, *after])


def mlp(lead: tuple[int, ...], hidden: int, width: int) -> Int4MLP:
    def weight(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
        packed = torch.randint(-128, 128, (*lead, outputs // 2, inputs), dtype=torch.int8)
        scales = (torch.rand(*lead, outputs, inputs // packing.GROUP_SIZE) + 0.5) / (4.6 * inputs**0.5)
        return packed, scales.half().float()

    pre = [(torch.rand(size) + 0.5).half().float() for size in (hidden, width)]
    return Int4MLP(*weight(2 * width, hidden), *weight(hidden, width), *pre)


def moe_case(numbers: dict[str, Any], rows: int) -> Case:
    torch.manual_seed(rows)
    plugin = Int4MoEPlugin(**numbers)
    count, hidden, width, shared = (int(numbers[name]) for name in ("experts", "hidden", "width", "shared"))
    x, logits = torch.randn(rows, hidden).half(), torch.randn(rows, count)
    experts, both = mlp((count,), hidden, width), mlp((), hidden, shared) if shared else None
    bias = torch.randn(count) * 0.1 if numbers["biased"] else None
    routing = Routing(
        numbers["top_k"],
        "sigmoid" if numbers["sigmoid"] else "softmax",
        bool(numbers["normalise"]),
        numbers["scaling"],
    )
    expected = int4_moe(x.float(), logits, experts, routing, both, bias)
    weights = MoEBoundary.pack(experts, routing, both, bias).weights
    parts = [weights.fc, weights.proj, *([weights.shared_fc, weights.shared_proj] if shared else [])]
    tiles = [tensor for part in parts if part for tensor in (part.codes, part.scales, part.pre_quant_scale)]
    return Case(
        plugin, [x, logits, *(t for t in tiles if t is not None), *([] if bias is None else [bias])], [expected]
    )


CASES: list[Callable[[int], Case]] = [
    lambda rows: attention_case(MLAAttentionPlugin, rows, 77),
    lambda rows: attention_case(GQAAttentionPlugin, rows, 77),
    lambda rows: moe_case(MOE | {"scaling": 1.0}, rows),
    lambda rows: moe_case(BASE_MOE, rows),
    lambda rows: moe_case(MOE | {"scaling": 1.0, "shared": 0}, rows),
]


@pytest.mark.parametrize("make", CASES, ids=["mla", "gqa", "moe", "moe-base", "moe-unshared"])
def test_the_cases_below_have_the_plugins_own_shapes(make: Callable[[int], Case]) -> None:
    case = make(3)
    dtypes = [base._DTYPES[dtype] for dtype in case.plugin.input_types]
    shapes = [tuple(3 if size < 0 else size for size in shape) for shape in case.plugin.input_shapes]
    assert [(tensor.dtype, tuple(tensor.shape)) for tensor in case.inputs] == list(zip(dtypes, shapes, strict=True))
    assert [tuple(tensor.shape) for tensor in case.expected] == [
        tuple(3 if size < 0 else size for size in shape) for shape in case.plugin.output_shapes
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 5, 8, 16, 37])
@pytest.mark.parametrize("make", CASES, ids=["mla", "gqa", "moe", "moe-base", "moe-unshared"])
def test_enqueue_in_a_captured_graph(make: Callable[[int], Case], rows: int) -> None:
    case = make(rows)
    plugin, creator = case.plugin, OperatorCreator(type(case.plugin))
    # As an engine has it: made again from its fields.
    plugin = cast(
        OperatorPlugin, creator.create_plugin("node", plugin.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME)
    )
    inputs = [tensor.cuda().contiguous() for tensor in case.inputs]
    first = [tensor.clone() for tensor in inputs]
    outputs = [
        inputs[plugin.ALIASED[number]]
        if number in plugin.ALIASED
        else torch.full(tuple(expected.shape), torch.nan, dtype=torch.half, device="cuda")
        for number, expected in enumerate(case.expected)
    ]
    workspace = torch.full((plugin.workspace_bytes,), 255, dtype=torch.uint8, device="cuda")
    descs = [
        [described(tuple(tensor.shape), dtype) for tensor, dtype in zip(tensors, types, strict=True)]
        for tensors, types in ((inputs, plugin.input_types), (outputs, plugin.output_types))
    ]
    pointers = [[tensor.data_ptr() for tensor in tensors] for tensors in (inputs, outputs)]

    def enqueue() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        plugin.enqueue(descs[0], descs[1], pointers[0], pointers[1], workspace.data_ptr(), stream)

    plugin.on_shape_change(descs[0], descs[1])
    enqueue()  # compiles and loads, which cannot be captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        enqueue()
    for tensor, value in zip(inputs, first, strict=True):
        tensor.copy_(value)
    outputs[0].fill_(torch.nan)
    workspace.fill_(255)
    graph.replay()
    torch.cuda.synchronize()
    for found, expected in zip(outputs, case.expected, strict=True):
        difference = (found.float().cpu() - expected.float()).norm() / expected.float().norm()
        # Activations are rounded to half in between.
        assert difference < 2e-3
