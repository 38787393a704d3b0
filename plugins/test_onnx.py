"""Operators in ONNX: exported, made standard, run by onnxruntime, compared with the module."""

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from trtvlm.plugins.fused_add_rms_norm.op import fused_add_rms_norm
from trtvlm.plugins.int4_linear.module import Int4Linear
from trtvlm.plugins.int8_linear.module import Int8Linear
from trtvlm.plugins.onnx_table import custom_translation_table, standardise


class AddNorm(nn.Module):
    """A residual addition with the norm after it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(128) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
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
