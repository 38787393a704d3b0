"""TensorRT's engines, of either flavour, over buffers of fixed addresses. Written against the API's stubs; not run yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from trtvlm.model.errors import UserError
from trtvlm.plugins.tensorrt.register import register
from trtvlm.runtime.tensorrt.installed import ONE_ENGINE, logger, tensorrt
from trtvlm.runtime.tensorrt.segment import Graph, Segment

if TYPE_CHECKING:
    import tensorrt as trt

DECODE, PREFILL = 0, 1
"""Optimization profiles, in the order the engines were built with; a graph without decode passes has one."""


class TensorRTBackend:
    """Opens NAME.engine files on one CUDA device."""

    def __init__(self, flavour: str, device: torch.device | str) -> None:
        """UserError: that TensorRT is not installed."""
        self.device = torch.device(device)
        self._module = tensorrt(flavour)
        # An engine belongs to the device that is current when it is loaded.
        torch.cuda.set_device(self.device.index or 0)
        if flavour == ONE_ENGINE:
            register()
        self._runtime: trt.Runtime = self._module.Runtime(logger(self._module))

    def open(self, graphs: Sequence[Graph]) -> list[Segment]:
        """As `Backend.open`: the segments share the scratch memory of the one that needs most."""
        segments = [TensorRTSegment(graph, self._load(graph), self._module) for graph in graphs]
        size = max((segment.scratch_bytes for segment in segments), default=0)
        scratch = torch.empty(max(1, size), dtype=torch.uint8, device=self.device)
        for segment in segments:
            segment.give_scratch(scratch)
        return list(segments)

    def _load(self, graph: Graph) -> trt.ICudaEngine:
        path = graph.folder / f"{graph.name}.engine"
        try:
            engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): build the engine directory again.") from None
        if engine is None:
            raise UserError(f"TensorRT does not load {path}; what it says is above. Build the engines on this machine.")
        _check_tensors(path, engine, {**graph.inputs, **graph.outputs})
        return engine


class TensorRTSegment:
    """`Segment` over an engine: a context for decode passes, whose shapes never change, and one for all others.

    A captured CUDA graph holds the state of the context it was captured from, so nothing may change the first one's.
    """

    def __init__(self, graph: Graph, engine: trt.ICudaEngine, module: Any) -> None:
        self.graph = graph
        self._engine = engine
        self._prefill_profile = min(PREFILL, engine.num_optimization_profiles - 1)
        self.scratch_bytes = engine.device_memory_size_v2
        self._prefill = new_context(engine, module, "NONE")
        self._decode = new_context(engine, module, "EAGER") if graph.decode_rows else None
        self._ready = False

    def give_scratch(self, scratch: Tensor) -> None:
        """Memory that the contexts work in; others may use it between passes."""
        self._scratch = scratch
        for context in (self._prefill, self._decode):
            if context is not None:
                context.set_device_memory(scratch.data_ptr(), scratch.numel())

    def run(self, rows: int, first: int = 0, decode: bool = False) -> None:
        """As `Segment.run`. RuntimeError: TensorRT refuses."""
        stream = torch.cuda.current_stream().cuda_stream
        if not self._ready:
            self._prepare(stream)
        if decode:
            assert self._decode is not None
            assert (rows, first) == (self.graph.decode_rows, 0)
            context = self._decode
        else:
            context = self._prefill
            self._bind(context, rows, first, decode)
        self._check(context.execute_async_v3(stream), "run")

    def _prepare(self, stream: int) -> None:
        """Profiles and the decode context's shapes: once, and never while a graph is captured."""
        self._check(self._prefill.set_optimization_profile_async(self._prefill_profile, stream), "choose a profile of")
        if self._decode is not None:
            self._check(self._decode.set_optimization_profile_async(DECODE, stream), "choose a profile of")
            self._bind(self._decode, self.graph.decode_rows, 0, True)
        torch.cuda.current_stream().synchronize()
        self._ready = True

    def _bind(self, context: trt.IExecutionContext, rows: int, first: int, decode: bool) -> None:
        for name in self.graph.inputs:
            view = self.graph.view(name, rows, first, decode)
            self._check(context.set_input_shape(name, tuple(view.shape)), f"set the shape of '{name}' of")
            self._check(context.set_tensor_address(name, view.data_ptr()), f"bind '{name}' of")
        for name, buffer in self.graph.outputs.items():
            self._check(context.set_tensor_address(name, buffer.data_ptr()), f"bind '{name}' of")

    def _check(self, worked: bool, what: str) -> None:
        if not worked:
            raise RuntimeError(f"TensorRT could not {what} the engine '{self.graph.name}'; what it says is above")


def new_context(engine: trt.ICudaEngine, module: Any, specialised: Literal["EAGER", "NONE"]) -> trt.IExecutionContext:
    """An execution context without memory of its own. `specialised`: whether it compiles kernels for the shapes it meets."""
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(module.ExecutionContextAllocationStrategy.USER_MANAGED)
    if hasattr(module, "DynamicShapesKernelSpecializationStrategy"):
        # TensorRT-RTX compiles kernels on the device. Its default is to swap better ones in as they get ready: bits would
        # depend on when, and a CUDA graph would keep the slow ones. A decode has one shape, prompts have many.
        strategies: Any = module.DynamicShapesKernelSpecializationStrategy
        chosen = getattr(strategies, specialised)
        config.dynamic_shapes_kernel_specialization_strategy = chosen  # type: ignore[attr-defined,unused-ignore]
    context = engine.create_execution_context(config)
    if context is None:
        raise UserError(f"TensorRT has no memory for a context of the engine '{engine.name}': use a smaller context.")
    return context


def _check_tensors(path: Path, engine: trt.ICudaEngine, buffers: Mapping[str, Tensor]) -> None:
    """UserError unless the engine's tensors are exactly those of chain.json."""
    names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    if names != set(buffers):
        raise UserError(
            f"{path} has the tensors {sorted(names)}, but chain.json binds {sorted(buffers)}: build the engine directory "
            "again."
        )
