"""Small builders shared by the operators' ONNX forms.

An exported graph first holds every operator as one node of the domain `trtvlm`. A single-engine TensorRT build maps
those to plugins; elsewhere `onnx_table.standardise` rewrites the ones that have a standard form. That needs the values
of the weights, as INT4 is packed differently in ONNX, so it can only happen once the graph is whole.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor

DOMAIN, VERSION = "trtvlm", 1

_FLOATS: dict[int, torch.dtype] = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
}


@dataclass
class Rewrite:
    """One operator node being replaced: its surroundings, and what replaces it.

    `constant(i)` is the value of input i; `dtype` is the ONNX element type of input 0.
    """

    node: onnx.NodeProto
    initializers: Mapping[str, onnx.TensorProto]
    dtype: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    tensors: list[onnx.TensorProto] = field(default_factory=list)

    def constant(self, index: int) -> Tensor:
        """The value of a weight input. KeyError if it is not an initializer of the graph."""
        return torch.from_numpy(numpy_helper.to_array(self.initializers[self.node.input[index]]).copy())

    def has_input(self, index: int) -> bool:
        """Whether an optional input is given."""
        return len(self.node.input) > index and self.node.input[index] != ""

    def attribute(self, name: str) -> Any:
        """The value of an attribute of the node."""
        return next(helper.get_attribute_value(item) for item in self.node.attribute if item.name == name)

    def weight(self, suffix: str, value: Tensor) -> str:
        """Add a float weight in the graph's own dtype -> its name. bfloat16 has no numpy dtype, hence the raw bytes."""
        name = self._name(suffix)
        cast = value.to(_FLOATS[self.dtype]).contiguous()
        raw = cast.view(torch.uint8).numpy().tobytes()
        self.tensors.append(helper.make_tensor(name, self.dtype, value.shape, raw, raw=True))
        return name

    def codes(self, suffix: str, shape: tuple[int, ...], elements: int, packed: Tensor) -> str:
        """Add an integer weight from its bytes -> its name."""
        name = self._name(suffix)
        raw = np.ascontiguousarray(packed.numpy()).tobytes()
        self.tensors.append(helper.make_tensor(name, elements, shape, raw, raw=True))
        return name

    def emit(self, kind: str, inputs: list[str], outputs: list[str] | None = None, **attributes: Any) -> str:
        """Add a standard node -> the name of its first output."""
        outputs = outputs or [self._name(f"{kind.lower()}_{len(self.nodes)}")]
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=f"{outputs[0]}/{kind}", **attributes))
        return outputs[0]

    def _name(self, suffix: str) -> str:
        return f"{self.node.output[0]}.{suffix}"
