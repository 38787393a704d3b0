"""onnxruntime in TensorRT's place: the very graphs the engines were compiled from, on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trtvlm.model.errors import UserError
from trtvlm.plugins.onnx_runner import OnnxRunner
from trtvlm.runtime.tensorrt.segment import Graph, Segment


class OnnxSegment:
    """`Segment` over NAME.onnx. A pass is computed and then copied to where TensorRT would have written it."""

    def __init__(self, graph: Graph) -> None:
        path = graph.folder / f"{graph.name}.onnx"
        if not path.is_file():
            raise UserError(f"There is no {path}: build the engine directory again, with its engines.")
        self.graph = graph
        self._runner = OnnxRunner(graph.name, path)
        if set(self._runner.outputs) != set(graph.outputs):
            raise UserError(
                f"{path} makes {sorted(self._runner.outputs)}, but chain.json takes {sorted(graph.outputs)} from it: "
                "build the engine directory again."
            )

    def run(self, rows: int, first: int = 0, decode: bool = False) -> None:
        """As `Segment.run`."""
        found = self._runner({name: self.graph.view(name, rows, first, decode) for name in self.graph.inputs})
        for name, buffer in self.graph.outputs.items():
            buffer[:rows] = found[name]


class OnnxBackend:
    """Opens graphs with onnxruntime on the CPU."""

    device = torch.device("cpu")

    def open(self, graphs: Sequence[Graph]) -> list[Segment]:
        """As `Backend.open`."""
        return [OnnxSegment(graph) for graph in graphs]
