"""DeepSeek-VL2 on one consumer GPU: INT4 AWQ engines, a trained draft model, lossless speculative decoding."""

__version__ = "0.1.0"
