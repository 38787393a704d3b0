"""PyTorch modules -> ONNX graphs (torch.export, opset 24), with every dynamic dimension named and ranged."""

import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trtvlm.model.errors import GraphError, first_line
from trtvlm.model.vlm import DeepseekVL2

if TYPE_CHECKING:
    import onnx

OPSET = 24
VIEWS = "views"
ROWS = "rows"


class VisionEncoder(nn.Module):
    """Tower and projector as one graph: pixels [views, 3, S, S] -> features [views, h * h, hidden]."""

    def __init__(self, model: DeepseekVL2) -> None:
        super().__init__()
        self.vision = model.vision
        self.projector = model.projector

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels in -1..1 [views, 3, S, S] -> projected features [views, h * h, hidden], in the pixels' dtype."""
        out: Tensor = self.projector(self.vision(pixels))
        return out


def export_onnx(
    name: str,
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    *,
    dynamic: str,
    largest: int,
) -> "onnx.ModelProto":
    """Export `module` called with `inputs`, in that order, as an ONNX graph with the same input and output names.

    The project's own linear operators come out as standard nodes. Dimension 0 of every input is the one dynamic
    dimension, called `dynamic`, 1..`largest`; the example inputs need at least 2 there, because torch.export treats 0
    and 1 as constants. Raises GraphError naming the graph.
    """
    return standard_graph(name, export_operators(name, module, inputs, outputs, dynamic, largest), dynamic)


def export_operators(
    name: str, module: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], dynamic: str, largest: int
) -> "onnx.ModelProto":
    """`export_onnx` before its end: the project's operators are nodes of their own, weights are named as in `module`."""
    from trtvlm.plugins.onnx_table import custom_translation_table

    dimension = torch.export.Dim(dynamic, min=1, max=max(2, largest))
    shapes = tuple({0: dimension} for _ in inputs)
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(module, tuple(inputs.values()), dynamic_shapes=shapes, strict=False)
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=list(outputs),
                custom_translation_table=custom_translation_table(),
                verbose=False,
            )
            assert exported is not None
            model: onnx.ModelProto = exported.model_proto
            return model
    except Exception as error:  # the exporter raises many kinds; all mean: this module cannot be written as ONNX
        raise GraphError(f"The graph '{name}' could not be exported to ONNX: {first_line(error)}") from error


def standard_graph(name: str, model: "onnx.ModelProto", dynamic: str) -> "onnx.ModelProto":
    """Finish what `export_operators` gave, in place: standard nodes for linear operators, and its names."""
    from trtvlm.plugins.onnx_table import standardise

    try:
        model = standardise(model)
    except ValueError as error:
        raise GraphError(f"The graph '{name}' could not be exported to ONNX: {first_line(error)}") from error
    return _named(name, model, dynamic)


def export_vision(model: DeepseekVL2, largest: int) -> "onnx.ModelProto":
    """Export the vision tower and projector of `model` (any dtype; engines want float16) for 1..`largest` views."""
    encoder = VisionEncoder(model).eval()
    size = model.config.tile_size
    pixels = torch.zeros(2, 3, size, size, dtype=model.image_newline.dtype)
    return export_onnx("vision", encoder, {"pixels": pixels}, ["features"], dynamic=VIEWS, largest=largest)


def max_views(candidate_resolutions: Sequence[tuple[int, int]], tile: int) -> int:
    """The most views one image can have: the global one and the tiles (pixels / `tile`) of the largest candidate."""
    return 1 + max((width // tile) * (height // tile) for width, height in candidate_resolutions)


def dynamic_dimensions(model: "onnx.ModelProto") -> set[str]:
    """The names of the graph inputs' dynamic dimensions."""
    return {
        dim.dim_param
        for value in model.graph.input
        for dim in value.type.tensor_type.shape.dim
        if dim.HasField("dim_param")
    }


def _named(name: str, model: "onnx.ModelProto", dynamic: str) -> "onnx.ModelProto":
    """Give the graph and its one dynamic dimension, to which the exporter gives a name of its own, their names."""
    found = sorted(dynamic_dimensions(model))
    if len(found) != 1:
        raise GraphError(f"The graph '{name}' has dynamic dimensions {found}, where only '{dynamic}' should be.")
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_param"):
                dim.dim_param = re.sub(rf"\b{found[0]}\b", dynamic, dim.dim_param)
    model.graph.name = name
    # Where the exporting Python files lie is nobody's business, and the same inputs should give the same bytes.
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]
    del model.graph.metadata_props[:]
    del model.metadata_props[:]
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's own chatter off the terminal: missing torchvision, deprecations inside PyTorch."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels: list[tuple[Any, int]] = [(logger, logger.level) for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in levels:
                logger.setLevel(level)
