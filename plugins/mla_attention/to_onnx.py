"""mla_attention in ONNX: a node of its own, as no standard form reads a latent cache without expanding it.

Between segments it is a boundary; in a single engine it is the plugin of the same name, whose cache outputs are its
cache inputs, overwritten. ONNX has values only, so the operator that returns its caches is what is exported.
"""

NODES = {"mla_attention": "mla_attention_functional"}
"""ONNX node type -> the PyTorch operator that is exported as it."""
