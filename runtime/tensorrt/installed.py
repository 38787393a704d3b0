"""The TensorRT of a flavour, if it is installed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trtvlm.model.errors import UserError

if TYPE_CHECKING:
    import tensorrt as trt

ONE_ENGINE = "tensorrt"
"""The flavour whose language model is one engine with plugins, rank0.engine."""

MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
HOW = {"tensorrt-rtx": "pip install tensorrt-rtx", "tensorrt": "install it, or tensorrt-llm, in this environment"}


def tensorrt(flavour: str) -> Any:
    """The Python module of a flavour: both have the same classes. UserError: an unknown flavour, or not installed."""
    if flavour not in MODULES:
        raise UserError(f"There is no TensorRT flavour '{flavour}': it is one of {', '.join(MODULES)}.")
    try:
        module = importlib.import_module(MODULES[flavour])
    except ImportError:
        module = None
    # Type stubs alone leave an empty namespace package behind, which imports.
    if module is None or not hasattr(module, "Builder"):
        raise UserError(f"The engines need {flavour}, which is not installed: {HOW[flavour]}.")
    return module


def logger(module: Any) -> trt.ILogger:
    """A logger that says what is wrong and nothing else."""
    made: trt.ILogger = module.Logger(module.Logger.WARNING)
    return made
