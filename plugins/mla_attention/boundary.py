"""mla_attention on the device as a graph sees it: from a segment's outputs, normalised latents, to the next one's input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trtvlm.plugins.cuda.memory import Piece, carve, total_bytes
from trtvlm.plugins.int4_linear.decode import MOST_ROWS as ROWS  # a launch takes; longer passes are cut
from trtvlm.plugins.mla_attention.decode import CHUNK, MOST_POSITIONS, MLAWeights, MLAWorkspace, mla_decode


@dataclass(frozen=True)
class MLABoundary:
    """The operator with its weights (without a norm) on the device. Launches only; every call may be captured.

    rope: float32 tables [positions, rope / 2]. ValueError: more positions than the kernels merge.
    """

    weights: MLAWeights
    rope: tuple[Tensor, Tensor]
    positions: int

    def __post_init__(self) -> None:
        if self.positions > MOST_POSITIONS:
            raise ValueError(f"the attention kernels merge at most {MOST_POSITIONS} positions, not {self.positions}")

    @property
    def workspace_bytes(self) -> int:
        """Bytes of workspace a call needs, whatever its rows."""
        return total_bytes(self._pieces())

    def __call__(
        self,
        q: Tensor,
        latent: Tensor,
        k_pe: Tensor,
        latent_cache: Tensor,
        k_pe_cache: Tensor,
        cursor: Tensor,
        out: Tensor,
        memory: Tensor,
        span: int,
    ) -> None:
        """`reference.mla_attention` into `out` half [M, heads * v]; inputs are half, cursor int32 [1].

        span: positions that the cursor and the rows stay within. memory: uint8, `workspace_bytes` of it.
        """
        queries, outputs, shares, later = carve(memory, self._pieces())
        workspace = MLAWorkspace(queries, outputs, shares, -(-self.positions // CHUNK))
        rows = q.shape[0]
        for start in range(0, rows, ROWS):
            part = slice(start, min(start + ROWS, rows))
            if start:
                torch.add(cursor, start, out=later)
            mla_decode(
                q[part], (latent[part], k_pe[part]), self.weights, self.rope, latent_cache, k_pe_cache,
                later if start else cursor, out[part], workspace, part.stop - start, span,
            )  # fmt: skip

    def _pieces(self) -> list[Piece]:
        return workspace_pieces(self.weights.heads, self.weights.rank, self.weights.rope, self.positions)


def workspace_pieces(heads: int, rank: int, rope: int, positions: int) -> list[Piece]:
    """Queries, each chunk's outputs and shares, and a later cursor."""
    chunks = -(-positions // CHUNK)
    return [
        Piece(torch.half, (ROWS, heads, rank + rope)),
        Piece(torch.float32, (ROWS * chunks, heads, rank)),
        Piece(torch.float32, (ROWS * chunks, heads, 2)),
        Piece(torch.int32, (1,)),
    ]
