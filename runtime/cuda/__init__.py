"""The language model on a GPU: packed weights, whole steps in CUDA graphs, and an executor over them."""
