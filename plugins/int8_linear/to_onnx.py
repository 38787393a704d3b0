"""int8_linear in standard ONNX: a DequantizeLinear with one scale an output under a MatMul, which TensorRT fuses."""

import onnx

from trtvlm.plugins.onnx_nodes import Rewrite

NODES = {"int8_linear": "int8_linear"}
"""ONNX node type -> the PyTorch operator that is exported as it."""


def standardise(node: Rewrite) -> None:
    """x, codes, scales -> DequantizeLinear, MatMul; the weight is stored as [in, out]."""
    codes, scales = node.constant(1).t().contiguous(), node.constant(2)
    weight = node.codes("weight", tuple(codes.shape), onnx.TensorProto.INT8, codes)
    weight = node.emit("DequantizeLinear", [weight, node.weight("scales", scales)], axis=1)
    node.emit("MatMul", [node.node.input[0], weight], [node.node.output[0]])
