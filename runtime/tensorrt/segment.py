"""One compiled graph over buffers of fixed addresses: the small interface that TensorRT and onnxruntime both fill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from trtvlm.model.chain import WANTED


@dataclass(frozen=True)
class Graph:
    """A graph to open: `folder`/`name`.onnx and .engine, and the buffer of each of its inputs and outputs.

    Dimension 0 of a buffer is the graph's dynamic dimension (rows, or views), as long as it may get; `whole` are those that
    are always taken whole. Of the input `wanted`, a decode takes as many as it has rows, a prefill one. `decode_rows`: rows
    of every decode pass, or 0 for a graph that has none (the vision tower).
    """

    name: str
    folder: Path
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    decode_rows: int = 0
    whole: frozenset[str] = frozenset()

    def view(self, name: str, rows: int, first: int, decode: bool) -> Tensor:
        """What a pass takes of an input's buffer."""
        buffer = self.inputs[name]
        if name in self.whole:
            return buffer
        return buffer[: rows if decode else 1] if name == WANTED else buffer[first : first + rows]


class Segment(Protocol):
    """A graph that was opened."""

    def run(self, rows: int, first: int = 0, decode: bool = False) -> None:
        """Rows `first` .. `first` + `rows` - 1 of the inputs -> the first `rows` rows of the outputs.

        On a GPU it only enqueues, on torch's current stream. `decode`: a decode pass, which always has the graph's
        `decode_rows` rows and starts at row 0; it can be captured in a CUDA graph after it has run once.
        """
        ...


class Backend(Protocol):
    """Opens graphs."""

    @property
    def device(self) -> torch.device:
        """Where the buffers must be."""
        ...

    def open(self, graphs: Sequence[Graph]) -> list[Segment]:
        """Open all graphs of a model at once: they run one after the other, and may share scratch memory.

        UserError naming a file that is missing or that does not load.
        """
        ...
