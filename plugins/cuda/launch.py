"""Kernels as Python callables that launch on torch's current stream, capturable in a CUDA graph."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, cached_property, lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from trtvlm.plugins.cuda.compiler import cubin
from trtvlm.plugins.cuda.occupancy import Use

Defines = tuple[tuple[str, int | float], ...]


def defines(**values: int | float) -> Defines:
    """Macros of a kernel (HIDDEN=2048), in a form that can be the key of a cache."""
    return tuple(sorted(values.items()))


class Kernel:
    """One `extern "C" __global__` function. Tensors are passed as pointers, ints as int, floats as float.

    carveout: percent of L1 that shall be shared memory where it runs; None: the driver's choice.
    """

    def __init__(self, path: str, name: str, macros: Defines, arch: str, carveout: int | None = None) -> None:
        from cuda.core import ObjectCode

        self.name = name
        self._made_of = path, name, macros, arch
        self._module = ObjectCode.from_cubin(cubin(path, macros, arch))
        self._kernel = self._module.get_kernel(name)
        self._shared = 0
        self._registers = _attribute(self._kernel, "NUM_REGS")
        self._static = _attribute(self._kernel, "SHARED_SIZE_BYTES")
        if carveout is not None:
            _set_attribute(self._kernel, "PREFERRED_SHARED_MEMORY_CARVEOUT", carveout)

    def __call__(
        self,
        grid: tuple[int, ...],
        block: int,
        *arguments: Tensor | int | float | None,
        shared: int = 0,
    ) -> None:
        """Launch. `shared`: dynamic shared memory in bytes. None is a null pointer."""
        from cuda.core import LaunchConfig, launch

        if shared > max(self._shared, 48 * 1024 - self._static):
            # More than 48 KB, static and dynamic together, must be asked for.
            _set_attribute(self._kernel, "MAX_DYNAMIC_SHARED_SIZE_BYTES", shared)
            self._shared = shared
        config = LaunchConfig(grid=grid, block=block, shmem_size=shared)
        launch(_stream(torch.cuda.current_stream().cuda_stream), config, self._kernel, *map(_argument, arguments))

    def use(self, block: int, shared: int = 0) -> Use:
        """What a block of `block` threads and `shared` bytes of dynamic shared memory takes of a multiprocessor."""
        return Use.of(self._registers, block, self._static + shared)

    @cached_property
    def overlapping(self) -> Kernel:
        """Its twin, whose blocks can stand beside those of other kernels' twins on a multiprocessor.

        That takes one division of L1 for all of them, as a multiprocessor changes it only when it is idle: as much shared memory
        as there can be. Launches that follow each other are faster with the driver's. cuda-core lets no launch choose, so that
        there are two kernels. The twin is loaded when it is first asked for: like any kernel, not within a capture.
        """
        return Kernel(*self._made_of, carveout=100)


class Launch(Protocol):
    """What can be called as a `Kernel` can."""

    def __call__(
        self,
        grid: tuple[int, ...],
        block: int,
        *arguments: Tensor | int | float | None,
        shared: int = 0,
    ) -> None: ...

    def use(self, block: int, shared: int = 0) -> Use:
        """What a block takes of a multiprocessor."""

    @property
    def overlapping(self) -> Launch:
        """The same for launches that overlap others."""


def kernel(path: str, name: str, macros: Defines = (), device: int | None = None) -> Launch:
    """The kernel `name` of plugins/<path> under these macros, compiled for the current device (or `device`)."""
    return makers[-1](path, name, macros, device)


@cache
def _compiled(path: str, name: str, macros: Defines, device: int | None) -> Kernel:
    # torch's context must be current before anything is loaded into it.
    torch.cuda.init()
    torch.cuda.current_stream(device)
    major, minor = torch.cuda.get_device_capability(device)
    return Kernel(path, name, macros, f"sm_{major}{minor}")


makers: list[Callable[[str, str, Defines, int | None], Launch]] = [_compiled]
"""The last of them makes kernels; trtvlm.plugins.cuda.emulation puts its own there for a while."""


def _argument(value: Tensor | int | float | None) -> Any:
    if isinstance(value, Tensor):
        return value.data_ptr()
    if value is None:
        return 0
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int32(value)


@lru_cache(maxsize=64)
def _stream(handle: int) -> Any:
    from cuda.core import Device, Stream

    Device(torch.cuda.current_device()).set_current()
    return Stream.from_handle(handle)


def _attribute(kernel: Any, name: str) -> int:
    from cuda.bindings import driver

    status, value = driver.cuKernelGetAttribute(*_places(kernel, name))
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{name} of a kernel is not known: {status}")
    return int(value)


def _set_attribute(kernel: Any, name: str, value: int) -> None:
    from cuda.bindings import driver

    attribute, handle, device = _places(kernel, name)
    (status,) = driver.cuKernelSetAttribute(attribute, value, handle, device)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{name} {value} of a kernel was refused: {status}")


def _places(kernel: Any, name: str) -> tuple[Any, Any, Any]:
    """An attribute, the kernel's handle and its device, as the driver wants them."""
    from cuda.bindings import driver

    attribute = getattr(driver.CUfunction_attribute, f"CU_FUNC_ATTRIBUTE_{name}")
    handle = driver.CUkernel(int(kernel.handle)) if hasattr(driver, "CUkernel") else kernel.handle
    return attribute, handle, driver.CUdevice(torch.cuda.current_device())
