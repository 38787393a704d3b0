"""fused_add_rms_norm in standard ONNX: Add and RMSNormalization (opset 23), which TensorRT fuses again."""

import onnx

from trtvlm.plugins.onnx_nodes import Rewrite

NODES = {"fused_add_rms_norm": "fused_add_rms_norm"}
"""ONNX node type -> the PyTorch operator that is exported as it."""


def standardise(node: Rewrite) -> None:
    """x, residual, weight -> Add, RMSNormalization computed in float32."""
    normalised, added = node.node.output
    node.emit("Add", list(node.node.input[:2]), [added])
    weight = node.weight("weight", node.constant(2))
    epsilon = node.attribute("eps")
    node.emit("RMSNormalization", [added, weight], [normalised], epsilon=epsilon, stash_type=onnx.TensorProto.FLOAT)
