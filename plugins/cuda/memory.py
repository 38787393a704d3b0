"""Several tensors in one piece of device memory, without copies: a workspace that somebody else allocated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 256


@dataclass(frozen=True)
class Piece:
    """A tensor that is wanted: its type and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes it takes, up to where the next one may begin."""
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return -(-count // ALIGNMENT) * ALIGNMENT


def total_bytes(pieces: Sequence[Piece]) -> int:
    """Bytes that `carve` needs for them."""
    return sum(piece.nbytes for piece in pieces)


def carve(memory: Tensor, pieces: Sequence[Piece]) -> list[Tensor]:
    """Views of `memory`, uint8 and aligned to ALIGNMENT, one after the other. ValueError: it is too small."""
    if memory.numel() < total_bytes(pieces):
        raise ValueError(f"{memory.numel()} bytes of workspace are too few for {total_bytes(pieces)}")
    out, start = [], 0
    for piece in pieces:
        used = piece.dtype.itemsize
        for size in piece.shape:
            used *= size
        out.append(memory[start : start + used].view(piece.dtype).view(piece.shape))
        start += piece.nbytes
    return out
