"""The operators as plugins of a TensorRT that takes plugins: what their `trt_plugin.py` files share."""
