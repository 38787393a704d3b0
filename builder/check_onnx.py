"""Exported graphs, run by onnxruntime on the CPU, against the PyTorch modules they came from.

Two comparisons a graph, because float16 rounding hides small mistakes (a tanh GELU in the place of an erf one moves the
result by less than the rounding does):
- the very same graph with every float16 widened to float32, against the float32 module: equal up to summation order;
- the graph as it is compiled, against the float32 module: equal up to float16 rounding.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trtvlm.model.errors import GraphError
from trtvlm.plugins.onnx_runner import OnnxRunner

if TYPE_CHECKING:
    import onnx

# Relative L2 error allowed between two float32 evaluations of one graph. A sum of K products carries about sqrt(K) * 2^-24,
# 7e-6 for the largest K there is (12288); the vision tower has some hundred of them, most far shorter. Measured graphs
# stay under 1e-6.
EXACT = 3e-5

# Relative L2 error allowed for the float16 graph. Every stored activation is rounded by up to 2^-11 (5e-4), and
# independent roundings add up as square roots: 64 of them in a row, each as large as it can be, make 2^-8.
ROUNDED = 2.0**-8


@dataclass(frozen=True)
class Difference:
    """How far a graph's outputs are from the module's: |a - b| / |b| over a whole output, and the largest |a - b|."""

    rel_l2: float
    max_abs: float

    def worst(self, other: "Difference") -> "Difference":
        """The larger of both measures."""
        return Difference(max(self.rel_l2, other.rel_l2), max(self.max_abs, other.max_abs))


def check_graph(
    name: str,
    model: "onnx.ModelProto",
    module: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    exact: float = EXACT,
    rounded: float = ROUNDED,
) -> Difference:
    """Compare `model` with `module` on every batch of inputs -> the compiled graph's largest difference.

    Inputs are in the graph's own types; `module` returns a tensor or a tuple in the order of the graph's outputs.
    Raises GraphError naming the graph, the output and the error when it is over `exact` (float32) or `rounded`.
    """
    if only_moves(model):
        return _check_moves(name, model, module, batches)
    reference = copy.deepcopy(module).float().eval()
    cases = []
    for inputs in batches:
        widened_inputs = {key: value.float() if value.is_floating_point() else value for key, value in inputs.items()}
        with torch.no_grad():
            expected = reference(*widened_inputs.values())
        cases.append((inputs, widened_inputs, expected if isinstance(expected, tuple) else (expected,)))
    # One after the other: a large graph's weights are in memory several times while it is run.
    del reference
    for kind, limit in (("float32", exact), ("as is", rounded)):
        worst, results = Difference(0.0, 0.0), dict[str, Tensor]()
        run = runner(name, model, wide=kind == "float32")
        for inputs, widened_inputs, expected in cases:
            results = run(widened_inputs if kind == "float32" else inputs)
            for output, value in zip(run.outputs, expected, strict=True):
                found = difference(results[output], value)
                # Not "over the limit" but "not within it": NaN compares false.
                if not found.rel_l2 <= limit:
                    rows = next(iter(inputs.values())).shape[0]
                    raise GraphError(
                        f"The graph '{name}' ({kind}, {rows} rows) gives '{output}' with a relative error of "
                        f"{found.rel_l2:.2e} against PyTorch, over the {limit:.2e} allowed."
                    )
                worst = worst.worst(found)
        del run, results  # what a session gave keeps its memory alive
    return worst


def difference(found: Tensor, expected: Tensor) -> Difference:
    """Compare two tensors of one shape in float64; NaN when either holds one, infinite when the shapes differ."""
    if found.shape != expected.shape:
        return Difference(float("inf"), float("inf"))
    a, b = found.double(), expected.double()
    error, size = (a - b).norm().item(), b.norm().item()
    return Difference(error / size if size else error, (a - b).abs().max().item() if a.numel() else 0.0)


def only_moves(model: "onnx.ModelProto") -> bool:
    """Whether a graph computes nothing: the embedding, the largest of all in float32, picks rows."""
    return {node.op_type for node in model.graph.node} <= {"Gather", "Identity"}


def _check_moves(
    name: str, model: "onnx.ModelProto", module: nn.Module, batches: Iterable[Mapping[str, Tensor]]
) -> Difference:
    """Nothing is rounded, so every bit must be the module's; there is no need for a second graph in float32."""
    run = runner(name, model, wide=False)
    for inputs in batches:
        with torch.no_grad():
            expected = module(*inputs.values())
        (found,) = run(inputs).values()
        if found.dtype != expected.dtype or not torch.equal(found, expected):
            rows = expected.shape[0]
            raise GraphError(f"The graph '{name}' ({rows} rows) gives other rows than PyTorch.")
    return Difference(0.0, 0.0)


def runner(name: str, model: "onnx.ModelProto", *, wide: bool) -> OnnxRunner:
    """Run `model` as it is, or widened. Serialized here, so that a widened graph is gone before the runtime copies it."""
    return OnnxRunner(name, (widened(model) if wide else model).SerializeToString())


def widened(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """The same graph with every float16 tensor, cast and type replaced by float32."""
    import onnx
    from onnx import TensorProto, numpy_helper

    def widen(source: onnx.TensorProto, target: onnx.TensorProto) -> None:
        if source.data_type != TensorProto.FLOAT16:
            target.CopyFrom(source)
            return
        target.name, target.data_type = source.name, TensorProto.FLOAT
        target.dims.extend(source.dims)
        target.raw_data = numpy_helper.to_array(source).astype("float32").tobytes()

    # Built up and not overwritten: what a message once held keeps its memory as long as the message lives.
    wide = onnx.ModelProto(ir_version=model.ir_version)
    wide.opset_import.extend(model.opset_import)
    wide.graph.name = model.graph.name
    for source in model.graph.initializer:
        widen(source, wide.graph.initializer.add())
    for field in ("input", "output", "value_info"):
        values = getattr(wide.graph, field)
        values.extend(getattr(model.graph, field))
        for value in values:
            if value.type.tensor_type.elem_type == TensorProto.FLOAT16:
                value.type.tensor_type.elem_type = TensorProto.FLOAT
    wide.graph.node.extend(model.graph.node)
    for node in wide.graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                tensor = onnx.TensorProto()
                widen(attribute.t, tensor)
                attribute.t.CopyFrom(tensor)
            elif attribute.name in ("to", "dtype", "output_dtype") and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
    return wide
