"""Operators that neither PyTorch nor TensorRT has well: one folder an operator."""
