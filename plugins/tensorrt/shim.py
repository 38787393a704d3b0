"""What plugins need of TensorRT's classes to be made, serialized and launched where no TensorRT is installed."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__version__ = "shim"


class DataType(enum.Enum):
    """Element types."""

    FLOAT = 0
    HALF = 1
    INT32 = 3


class TensorFormat(enum.Enum):
    """Memory layouts."""

    LINEAR = 0


class PluginFieldType(enum.Enum):
    """Types of a plugin's numbers."""

    FLOAT32 = 1
    INT32 = 5


class PluginCapabilityType(enum.Enum):
    """The interfaces that a plugin has."""

    CORE = 0
    BUILD = 1
    RUNTIME = 2


class TensorRTPhase(enum.Enum):
    """What a plugin is created for."""

    BUILD = 0
    RUNTIME = 1


class PluginField:
    """A named array."""

    def __init__(
        self, name: str = "", data: NDArray[Any] | None = None, type: PluginFieldType = PluginFieldType.INT32
    ) -> None:
        self.name, self.type = name, type
        self.data = np.zeros(0) if data is None else data
        self.size = len(self.data)


class PluginFieldCollection(list[PluginField]):
    """Named arrays."""


class DimsExprs(list[Any]):
    """Symbolic sizes."""

    def __init__(self, sizes: Sequence[Any] | int = ()) -> None:
        super().__init__([None] * sizes if isinstance(sizes, int) else sizes)


class PluginTensorDesc:
    """A tensor of a call: its shape, type and layout."""

    def __init__(self) -> None:
        self.dims: Sequence[int] = ()
        self.type, self.format = DataType.FLOAT, TensorFormat.LINEAR


class DynamicPluginTensorDesc:
    """A tensor of a build, whose sizes have a range."""

    def __init__(self) -> None:
        self.desc = PluginTensorDesc()
        self.min: Sequence[int] = ()
        self.opt: Sequence[int] = ()
        self.max: Sequence[int] = ()


class Dims(tuple[int, ...]):
    """A shape."""


class IPluginV3:
    """Base of plugins."""


class IPluginV3OneCore:
    """What every plugin has."""


class IPluginV3OneBuild:
    """What building asks."""


class IPluginV3OneBuildV2(IPluginV3OneBuild):
    """The same, with outputs that overwrite inputs."""


class IPluginV3OneRuntime:
    """What running asks."""


class IPluginCreatorV3One:
    """Base of what makes plugins."""
