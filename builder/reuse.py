"""Graphs of segments that differ only in their weights: exported once, filled anew for every layer.

torch.export takes most of the time a segment takes, and gives the same nodes for every layer of a kind. The weights in its
graph are named as in the module, so those of another layer can be put in their place.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from trtvlm.builder.export import export_operators, standard_graph

if TYPE_CHECKING:
    import onnx


class SegmentExporter:
    """`export_onnx` that remembers. `kind` must say everything about a module but its weights and their shapes."""

    def __init__(self) -> None:
        self._graphs: dict[Hashable, onnx.ModelProto] = {}
        self.exported, self.filled = 0, 0

    def export(
        self,
        kind: str,
        name: str,
        module: nn.Module,
        inputs: Mapping[str, Tensor],
        outputs: Sequence[str],
        *,
        dynamic: str,
        largest: int,
    ) -> "onnx.ModelProto":
        """As `export_onnx`, to the byte. Raises GraphError naming the graph."""
        import onnx

        weights = module.state_dict()
        shapes = tuple((key, value.dtype, value.shape) for key, value in weights.items())
        examples = tuple((key, value.dtype, value.shape) for key, value in inputs.items())
        key = (kind, shapes, examples, tuple(outputs), dynamic, largest)
        graph = onnx.ModelProto()
        if key in self._graphs:
            self.filled += 1
            graph.CopyFrom(self._graphs[key])
            _fill(graph, weights)
        else:
            self.exported += 1
            graph = export_operators(name, module, inputs, outputs, dynamic, largest)
            # The exporter may fold a weight away, or take two equal ones for one: then there is no place to fill.
            if weights.keys() <= {tensor.name for tensor in graph.graph.initializer}:
                self._graphs[key] = onnx.ModelProto()
                self._graphs[key].CopyFrom(graph)
        return standard_graph(name, graph, dynamic)


def _fill(graph: "onnx.ModelProto", weights: Mapping[str, Tensor]) -> None:
    from onnx import numpy_helper

    for tensor in graph.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name].contiguous().numpy(), tensor.name))
