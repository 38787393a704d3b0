"""An ONNX graph run by onnxruntime on the CPU: how graphs are checked, and how engines are stood in for without a GPU."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trtvlm.model.errors import GraphError, first_line

if TYPE_CHECKING:
    import onnx


class OnnxRunner:
    """An ONNX graph on the CPU: tensors in and out by name."""

    def __init__(self, name: str, model: "onnx.ModelProto | bytes | Path") -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        # Threads that spin while they wait take the cores from who has work: a chain has a session a segment.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Fusions of the runtime's own are not part of the graph that is being checked.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        # Among them the one that rounds activations to INT8 before multiplying by INT4 weights.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        # From a path, so that what lies beside a graph (its large weights) is found.
        data = (
            str(model) if isinstance(model, Path) else model if isinstance(model, bytes) else model.SerializeToString()
        )
        try:
            self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises its own kinds; all mean: this graph is not valid
            raise GraphError(f"onnxruntime refuses the graph '{name}': {first_line(error)}.") from error
        # It keeps what it was made from, to make itself again on another device: a second copy of all weights.
        self._session._model_bytes = None
        self.name = name
        self.outputs = [value.name for value in self._session.get_outputs()]

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run with exactly the graph's inputs -> its outputs by name."""
        arrays = {name: value.contiguous().numpy() for name, value in inputs.items()}
        try:
            results = self._session.run(self.outputs, arrays)
        except Exception as error:  # likewise
            raise GraphError(f"onnxruntime cannot run the graph '{self.name}': {first_line(error)}.") from error
        return {name: torch.from_numpy(result) for name, result in zip(self.outputs, results, strict=True)}
