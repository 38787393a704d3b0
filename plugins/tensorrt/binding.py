"""TensorRT's Python classes for plugins, from whichever package is here.

TensorRT itself runs plugins. TensorRT-RTX's package has the very same classes and no use for them: it lets plugins be made,
serialized and launched without TensorRT. Where neither is installed, `shim` stands in for that.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


def find() -> Any:
    """The first module that has the plugin classes."""
    for name in ("tensorrt", "tensorrt_rtx", "trtvlm.plugins.tensorrt.shim"):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        # Type stubs alone leave an empty namespace package behind, which imports.
        if hasattr(module, "IPluginV3"):
            return module
    raise AssertionError("the shim has the classes")


if TYPE_CHECKING:
    import tensorrt as trt
else:
    trt = find()

__all__ = ["trt"]
