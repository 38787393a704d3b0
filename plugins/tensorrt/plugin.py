"""An operator as a TensorRT plugin (IPluginV3), and what creates it: the part that is the same for all of them.

An operator says which numbers it has, the types of its tensors, the shapes of its outputs, and how it is launched. All else
follows: formats are linear, state is those numbers alone, weights are inputs in the order its kernels read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trtvlm.plugins.tensorrt.binding import trt
from trtvlm.plugins.tensorrt.pointers import on_stream, tensor_at

NAMESPACE, VERSION = "trtvlm", "1"

Number = int | float

_DTYPES: dict[trt.DataType, torch.dtype] = {
    trt.DataType.HALF: torch.half,
    trt.DataType.FLOAT: torch.float32,
    trt.DataType.INT32: torch.int32,
}


class OperatorPlugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime):
    """Base of the operators' plugins.

    OPERATOR: its name in graphs. FIELDS: its numbers, each with its type. ALIASED: outputs that are an input, overwritten.
    """

    OPERATOR: ClassVar[str]
    FIELDS: ClassVar[Mapping[str, type]]
    ALIASED: ClassVar[Mapping[int, int]] = {}

    def __init__(self, **numbers: Number) -> None:
        """ValueError: numbers that are not exactly FIELDS, or that the kernels do not take."""
        trt.IPluginV3.__init__(self)
        trt.IPluginV3OneCore.__init__(self)
        trt.IPluginV3OneBuildV2.__init__(self)
        trt.IPluginV3OneRuntime.__init__(self)
        if numbers.keys() != self.FIELDS.keys():
            raise ValueError(f"{self.OPERATOR} has the numbers {list(self.FIELDS)}, not {list(numbers)}")
        self.numbers = {name: kind(numbers[name]) for name, kind in self.FIELDS.items()}
        self.check()
        self._arrays = arrays(self.numbers, self.FIELDS)
        self.plugin_name, self.plugin_namespace, self.plugin_version = self.OPERATOR, NAMESPACE, VERSION
        self.num_outputs = len(self.output_types)
        self.timing_cache_id = ""
        self.metadata_string = f"{self.OPERATOR} {self.numbers}"

    # -- what an operator says ---------------------------------------------------------------------------------------

    def check(self) -> None:
        """ValueError unless the kernels take these numbers."""

    @property
    def input_types(self) -> tuple[trt.DataType, ...]:
        """Element types of the inputs, in order."""
        raise NotImplementedError

    @property
    def output_types(self) -> tuple[trt.DataType, ...]:
        """Element types of the outputs, in order."""
        raise NotImplementedError

    @property
    def input_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the inputs; -1 is the number of rows."""
        raise NotImplementedError

    @property
    def output_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the outputs, likewise."""
        raise NotImplementedError

    @property
    def workspace_bytes(self) -> int:
        """Bytes of scratch memory a launch needs."""
        raise NotImplementedError

    def launch(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], memory: Tensor) -> None:
        """Launch on torch's current stream: no allocation, nothing read back."""
        raise NotImplementedError

    # -- IPluginV3 ---------------------------------------------------------------------------------------------------

    def get_capability_interface(self, type: trt.PluginCapabilityType) -> Any:
        """One object has all three."""
        return self

    def clone(self) -> trt.IPluginV3:
        """Another with the same numbers."""
        return self.__class__(**self.numbers)

    # -- IPluginV3OneBuildV2 -----------------------------------------------------------------------------------------

    def configure_plugin(self, in_: Any, out: Any) -> None:
        """ValueError unless the graph's tensors have the operator's shapes."""
        self._check_shapes([desc.desc for desc in in_])

    def get_output_data_types(self, input_types: list[trt.DataType]) -> list[trt.DataType]:
        """Element types of the outputs."""
        return list(self.output_types)

    def get_output_shapes(
        self, inputs: list[trt.DimsExprs], shape_inputs: list[trt.DimsExprs], expr_builder: trt.IExprBuilder
    ) -> list[trt.DimsExprs]:
        """Rows are the first input's; all other sizes are known."""
        rows: Any = inputs[0]
        return [
            dims_exprs([rows[0] if size < 0 else expr_builder.constant(size) for size in shape])
            for shape in self.output_shapes
        ]

    def supports_format_combination(self, pos: int, in_out: Any, num_inputs: int) -> bool:
        """Contiguous tensors of exactly the operator's types."""
        desc = in_out[pos].desc
        wanted = (*self.input_types, *self.output_types)
        return bool(
            num_inputs == len(self.input_types) and desc.format == trt.TensorFormat.LINEAR and desc.type == wanted[pos]
        )

    def get_workspace_size(self, in_: Any, out: Any) -> int:
        """Bytes of scratch memory."""
        return self.workspace_bytes

    def get_valid_tactics(self) -> list[int]:
        """There is one way to launch it."""
        return []

    # The stubs leave the argument out.
    def get_aliased_input(self, output_index: int) -> int:  # type: ignore[override, unused-ignore]
        """The input that an output overwrites, or -1."""
        return self.ALIASED.get(output_index, -1)

    # -- IPluginV3OneRuntime -----------------------------------------------------------------------------------------

    def attach_to_context(self, resource_context: trt.IPluginResourceContext) -> trt.IPluginV3:
        """A context has a plugin of its own; it needs nothing of the context's."""
        return self.clone()

    def set_tactic(self, tactic: int) -> None:
        """There is one."""

    def on_shape_change(self, in_: Any, out: Any) -> None:
        """ValueError unless the tensors have the operator's shapes."""
        self._check_shapes(in_)

    def enqueue(
        self,
        input_desc: list[trt.PluginTensorDesc],
        output_desc: list[trt.PluginTensorDesc],
        inputs: list[int],
        outputs: list[int],
        workspace: int,
        stream: int,
    ) -> None:
        """Launch on raw pointers and a raw stream. In a CUDA graph Python runs when it is captured, and never again."""
        with on_stream(stream), torch.inference_mode():
            given = [_tensor(pointer, desc) for pointer, desc in zip(inputs, input_desc, strict=True)]
            made = [_tensor(pointer, desc) for pointer, desc in zip(outputs, output_desc, strict=True)]
            self.launch(given, made, tensor_at(workspace, (self.workspace_bytes,), torch.uint8))

    def get_fields_to_serialize(self) -> trt.PluginFieldCollection_:
        """All of its numbers: an engine makes the plugin again out of them."""
        return fields(self._arrays)

    def _check_shapes(self, descs: Sequence[Any]) -> None:
        for number, (desc, shape) in enumerate(zip(descs, self.input_shapes, strict=True)):
            found = _shape(desc)
            if len(found) != len(shape) or any(s not in (f, -1) and f != -1 for f, s in zip(found, shape, strict=True)):
                raise ValueError(f"input {number} of {self.OPERATOR} has shape {list(found)}, not {list(shape)}")


class OperatorCreator(trt.IPluginCreatorV3One):
    """Makes the plugins of one operator, from a graph's attributes or an engine's fields."""

    def __init__(self, plugin: type[OperatorPlugin]) -> None:
        trt.IPluginCreatorV3One.__init__(self)
        self.plugin = plugin
        self.name, self.plugin_namespace, self.plugin_version = plugin.OPERATOR, NAMESPACE, VERSION
        self._arrays = arrays(dict.fromkeys(plugin.FIELDS, 0), plugin.FIELDS)
        self.field_names = fields(self._arrays)

    def create_plugin(
        self, name: str, field_collection: trt.PluginFieldCollection_, phase: trt.TensorRTPhase
    ) -> trt.IPluginV3:
        """A plugin from its numbers. ValueError: some are missing or wrong. Others, as the parser adds, are left alone."""
        found = {str(field.name): np.asarray(field.data).reshape(-1) for field in _each(field_collection)}
        missing = [field for field in self.plugin.FIELDS if field not in found or not len(found[field])]
        if missing:
            raise ValueError(f"{self.name} lacks the number '{missing[0]}'")
        return self.plugin(**{field: found[field][0].item() for field in self.plugin.FIELDS})


def arrays(numbers: Mapping[str, Number], kinds: Mapping[str, type]) -> dict[str, NDArray[Any]]:
    """Numbers as TensorRT keeps them: int32 or float32 arrays of one element."""
    return {name: np.array([numbers[name]], np.int32 if kind is int else np.float32) for name, kind in kinds.items()}


def fields(held: Mapping[str, NDArray[Any]]) -> trt.PluginFieldCollection_:
    """A collection that points into the arrays: whoever makes it keeps them as long as it is used."""
    kinds = {np.dtype(np.int32): trt.PluginFieldType.INT32, np.dtype(np.float32): trt.PluginFieldType.FLOAT32}
    made = [trt.PluginField(cast(Any, name), array, kinds[array.dtype]) for name, array in held.items()]
    # To TensorRT's binding this is one of its own collections too.
    return cast("trt.PluginFieldCollection_", trt.PluginFieldCollection(made))


def dims_exprs(sizes: Sequence[Any]) -> trt.DimsExprs:
    """A shape of expressions."""
    return trt.DimsExprs(list(sizes))


def _tensor(pointer: int, desc: Any) -> Tensor:
    return tensor_at(pointer, _shape(desc), _DTYPES[desc.type])


def _shape(desc: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in desc.dims)


def _each(collection: Any) -> list[Any]:
    return [collection[index] for index in range(len(collection))]
