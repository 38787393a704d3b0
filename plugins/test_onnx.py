"""Operators in ONNX: exported, made standard, run by onnxruntime, compared with the module."""

from collections.abc import Callable
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from tests.tiny import tiny_config
from trtvlm.model.moe import MoE
from trtvlm.plugins.fused_add_rms_norm.op import fused_add_rms_norm
from trtvlm.plugins.int4_linear.module import Int4Linear
from trtvlm.plugins.int4_moe.module import Int4MoE
from trtvlm.plugins.int8_linear.module import Int8Linear
from trtvlm.plugins.mla_attention.op import mla_attention_functional
from trtvlm.plugins.onnx_table import custom_translation_table, standardise
from trtvlm.plugins.speculative_accept.op import speculative_accept, speculative_accept_greedy


class AddNorm(nn.Module):
    """A residual addition with the norm after it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(128) + 0.5)

    def forward(self, x: Tensor) -> Any:
        """X [rows, 128] -> norm and sum, added so that both are used."""
        normed, added = fused_add_rms_norm(x, x * 0.5, self.weight, 1e-6)
        return normed - added


def _export(module: nn.Module, x: Tensor) -> onnx.ModelProto:
    rows = torch.export.Dim("rows", min=1, max=8)
    program = torch.export.export(module.eval(), (x,), dynamic_shapes=({0: rows},), strict=False)
    table = custom_translation_table()
    exported = torch.onnx.export(program, dynamo=True, opset_version=24, custom_translation_table=table, verbose=False)
    assert exported is not None
    return exported.model_proto


def _calibrated() -> Int4Linear:
    layer = Int4Linear.from_float(torch.randn(96, 128))
    return Int4Linear(layer.weight, layer.scales, torch.rand(128) + 0.5)


MODULES = {
    "int4_linear": lambda: Int4Linear.from_float(torch.randn(96, 128)),
    "int4_linear with pre_quant_scale": _calibrated,
    "int8_linear": lambda: Int8Linear.from_float(torch.randn(96, 128)),
    "fused_add_rms_norm": AddNorm,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_standard_form_gives_the_reference(name: str, dtype: torch.dtype) -> None:
    module = MODULES[name]()
    x = torch.randn(3, 128, dtype=dtype)
    model = _export(module, x)
    operator = name.split()[0]
    assert [node.op_type for node in model.graph.node if node.domain == "trtvlm"] == [operator]
    standardise(model)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} <= {""}
    assert "trtvlm" not in {entry.domain for entry in model.opset_import}
    options = onnxruntime.SessionOptions()
    # Left alone, onnxruntime fuses DequantizeLinear and MatMul into a product that quantizes the activation too.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for rows in (1, 5):
        x = torch.randn(rows, 128, dtype=dtype)
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        # Same codes, scales and roundings on both sides; what is left is the order of 128 additions.
        tolerance = 1e-4 if dtype == torch.float32 else 5e-2
        torch.testing.assert_close(torch.from_numpy(got), module(x), atol=tolerance, rtol=tolerance)


class Attention(nn.Module):
    """mla_attention over caches that are inputs of the graph, as a single engine has them."""

    def forward(self, q: Tensor, latent: Tensor, k_pe: Tensor, kv_b: Tensor, caches: list[Tensor], at: Tensor) -> Any:
        """Everything as `mla_attention` has it, 2 heads -> the attention and the caches."""
        return mla_attention_functional(q, latent, k_pe, kv_b, *caches, at, 2, 0.25, 10_000.0)


class Accept(nn.Module):
    """Both verifications."""

    def forward(self, tokens: Tensor, q: Tensor, p: Tensor, uniforms: Tensor) -> tuple[Tensor, ...]:
        """Draft tokens, both tables and the uniform numbers -> counts and tokens."""
        return *speculative_accept(tokens, q, p, uniforms), *speculative_accept_greedy(tokens, p)


def _moe() -> Int4MoE:
    moe = MoE(tiny_config("base").language).requires_grad_(False)
    return Int4MoE.from_float(moe)


CACHES = [torch.zeros(16, 64), torch.zeros(16, 8)]
PLUGIN_NODES: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], int]] = {
    "int4_moe": (_moe, (torch.randn(3, 64),), 11),
    "mla_attention": (
        Attention,
        (torch.randn(3, 48), torch.randn(3, 64), torch.randn(3, 8), torch.randn(64, 64), CACHES, torch.tensor([2])),
        7,
    ),
    "speculative_accept": (
        Accept,
        (torch.tensor([1, 0]), torch.full((2, 4), 0.25), torch.full((3, 4), 0.25), torch.rand(3)),
        4,
    ),
}


@pytest.mark.parametrize("name", PLUGIN_NODES)
def test_operators_without_a_standard_form_stay_one_node(name: str) -> None:
    make, arguments, inputs = PLUGIN_NODES[name]
    program = torch.export.export(make().eval(), arguments, strict=False)
    table = custom_translation_table()
    exported = torch.onnx.export(program, dynamo=True, opset_version=24, custom_translation_table=table, verbose=False)
    assert exported is not None
    nodes = [node for node in standardise(exported.model_proto).graph.node if node.domain == "trtvlm"]
    assert nodes[0].op_type == name
    assert len([value for value in nodes[0].input if value]) == inputs
    attributes = {item.name: onnx.helper.get_attribute_value(item) for item in nodes[0].attribute}
    if name == "int4_moe":
        assert attributes == {
            "top_k": 2,
            "scoring": b"sigmoid",
            "normalise": 1,
            "scaling": 2.0,
            "groups": 1,
            "top_groups": 1,
        }
    if name == "mla_attention":
        assert attributes == {"heads": 2, "scale": 0.25, "rope_theta": 10_000.0}
        assert len(nodes[0].output) == 3


def test_the_int4_weight_keeps_four_bits() -> None:
    model = standardise(_export(Int4Linear.from_float(torch.randn(96, 128)), torch.randn(2, 128)))
    sizes = {tensor.data_type: len(tensor.raw_data) for tensor in model.graph.initializer}
    assert sizes == {onnx.TensorProto.INT4: 96 * 128 // 2, onnx.TensorProto.FLOAT: 4 * 96 * 2}


def test_a_weight_without_a_value_is_refused() -> None:
    model = _export(Int4Linear.from_float(torch.randn(96, 128)), torch.randn(2, 128))
    name = model.graph.initializer[0].name
    del model.graph.initializer[0]
    with pytest.raises(ValueError, match=name):
        standardise(model)
