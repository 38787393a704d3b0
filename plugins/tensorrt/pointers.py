"""Device pointers as tensors, without copies: what TensorRT hands a plugin, for launchers that take tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

_CODES = {torch.half: "<f2", torch.float32: "<f4", torch.int32: "<i4", torch.uint8: "|u1"}


class _Memory:
    """Speaks the CUDA array interface, version 3."""

    def __init__(self, pointer: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": _CODES[dtype],
            "data": (pointer, False),
            "version": 3,
            "strides": None,
        }


# A graph's pointers come again and again: with them in hand, a launch looks nothing up.
@lru_cache(maxsize=4096)
def tensor_at(pointer: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The contiguous tensor that lies at a device pointer; it does not own its memory. KeyError: another dtype."""
    return torch.as_tensor(_Memory(pointer, shape, dtype), device="cuda")


@contextmanager
def on_stream(stream: int) -> Iterator[None]:
    """Make a raw stream torch's current one, so that launches and torch's own operations go there."""
    # torch takes a null pointer for no pointer, and would give a stream of its own.
    wrapped = torch.cuda.ExternalStream(stream) if stream else torch.cuda.default_stream()
    with torch.cuda.stream(wrapped):
        yield
