"""A safetensors file written one tensor at a time, so that a large checkpoint never stands whole in memory.

The header comes first in the file and names every tensor's place, so what will be written must be known beforehand.
Format: https://github.com/huggingface/safetensors (8 bytes of header length, the JSON header, the tensors' bytes).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

Spec = tuple[torch.dtype, tuple[int, ...]]

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8", torch.uint8: "U8"}


def nbytes(spec: Spec) -> int:
    """The size of a tensor in bytes."""
    dtype, shape = spec
    return math.prod(shape) * dtype.itemsize


class SafetensorsWriter:
    """Writes the tensors of `layout` (name -> dtype, shape) in any order; the file's bytes do not depend on it.

    resume: go on with the file that is there, which was begun with the same layout.
    """

    def __init__(self, path: Path, layout: Mapping[str, Spec], resume: bool = False) -> None:
        self.path, self.layout = path, dict(layout)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._offsets: dict[str, int] = {}
        self._rows: dict[str, int] = {}
        end = 0
        # Wide types first, then by name, as the safetensors library orders them: every tensor stays aligned.
        for name in sorted(self.layout, key=lambda name: (-self.layout[name][0].itemsize, name)):
            dtype, shape = self.layout[name]
            self._offsets[name] = end
            end += nbytes(self.layout[name])
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [self._offsets[name], end]}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._start = 8 + len(encoded)
        self._file = path.open("r+b" if resume else "wb")
        if resume:
            return
        try:
            self._file.write(len(encoded).to_bytes(8, "little") + encoded)
            self._file.truncate(self._start + end)
        except OSError:
            self._file.close()
            raise

    def __enter__(self) -> SafetensorsWriter:
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor in its place. ValueError if it is not what the layout says, or was written before."""
        if name not in self._offsets:
            raise ValueError(f"{name} is not in the layout, or was written before")
        if (tensor.dtype, tuple(tensor.shape)) != self.layout[name]:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, the layout says {self.layout[name]}")
        self._put(self._offsets.pop(name), tensor)

    def write_rows(self, name: str, start: int, rows: Tensor) -> None:
        """Put rows of a tensor's first dimension in their place, from `start` on; each row once, in order.

        ValueError if they are not what the layout says, or not the next ones.
        """
        if name not in self._offsets:
            raise ValueError(f"{name} is not in the layout, or was written before")
        dtype, shape = self.layout[name]
        if rows.dtype != dtype or rows.shape[1:] != shape[1:] or start + len(rows) > shape[0]:
            raise ValueError(f"rows of {name} are {rows.dtype} {tuple(rows.shape)}, the layout says {(dtype, shape)}")
        if start != self._rows.get(name, 0):
            raise ValueError(f"{name} has {self._rows.get(name, 0)} rows, so row {start} is not the next one")
        self._put(self._offsets[name] + start * nbytes((dtype, shape[1:])), rows)
        self._rows[name] = start + len(rows)
        if self._rows[name] == shape[0]:
            del self._offsets[name]

    def _put(self, offset: int, tensor: Tensor) -> None:
        self._file.seek(self._start + offset)
        self._file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)

    def written(self, prefix: str) -> None:
        """Count the tensors below `prefix` as written: a run before did it."""
        for name in [name for name in self._offsets if name.startswith(prefix)]:
            del self._offsets[name]

    def flush(self) -> None:
        """Let readers of the file see everything written so far."""
        self._file.flush()

    def sync(self) -> None:
        """Bring everything written so far to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file. ValueError if the block ended well but tensors are missing."""
        self._file.close()
        if kind is None and self._offsets:
            raise ValueError(f"{len(self._offsets)} tensors were never written: {min(self._offsets)}, ...")
