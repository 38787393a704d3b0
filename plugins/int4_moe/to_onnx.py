"""int4_moe in ONNX: a node of its own, as a standard form would dequantize every expert to use a few.

Between segments it is a boundary; in a single engine it is the plugin of the same name.
"""

NODES = {"int4_moe": "int4_moe"}
"""ONNX node type -> the PyTorch operator that is exported as it."""
