"""speculative_accept in ONNX: nodes of their own, after the last segment, or plugins of the same names."""

NODES = {
    "speculative_accept": "speculative_accept",
    "speculative_accept_greedy": "speculative_accept_greedy",
}
"""ONNX node type -> the PyTorch operator that is exported as it."""
