"""int4_linear in standard ONNX: a blocked INT4 DequantizeLinear under a MatMul, which TensorRT fuses."""

import onnx

from trtvlm.plugins.int4_linear import packing
from trtvlm.plugins.onnx_nodes import Rewrite

NODES = {"int4_linear": "int4_linear"}
"""ONNX node type -> the PyTorch operator that is exported as it."""


def standardise(node: Rewrite) -> None:
    """x, packed, scales[, pre_quant_scale] -> Mul, DequantizeLinear, MatMul.

    The weight is stored as [in, out], blocked along axis 0, so that MatMul needs no transposition; the scales take the
    activation's dtype, which is what DequantizeLinear's result then has.
    """
    codes, scales = packing.unpack(node.constant(1)), node.constant(2)
    outputs, inputs = codes.shape
    x = node.node.input[0]
    if node.has_input(3):
        x = node.emit("Mul", [x, node.weight("pre_quant_scale", node.constant(3))])
    packed = packing.pack_onnx(codes.t().contiguous())
    weight = node.codes("weight", (inputs, outputs), onnx.TensorProto.INT4, packed)
    scale = node.weight("scales", scales.t().contiguous())
    group = inputs // scales.shape[1]
    weight = node.emit("DequantizeLinear", [weight, scale], axis=0, block_size=group)
    node.emit("MatMul", [x, weight], [node.node.output[0]])
