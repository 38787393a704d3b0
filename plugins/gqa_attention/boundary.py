"""gqa_attention on the device as a graph sees it: from a segment's outputs to the next one's input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trtvlm.plugins.cuda.memory import Piece, carve, total_bytes
from trtvlm.plugins.gqa_attention.decode import CHUNK, MOST_POSITIONS, GQAWorkspace, gqa_decode
from trtvlm.plugins.int4_linear.decode import MOST_ROWS as ROWS  # a launch takes; longer passes are cut


@dataclass(frozen=True)
class GQABoundary:
    """The operator; `width` of a head, rope: float32 tables [positions, width / 2]. Launches only; calls may be captured.

    ValueError: more positions than the kernels merge.
    """

    heads: int
    width: int
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
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        cursor: Tensor,
        out: Tensor,
        memory: Tensor,
        span: int,
    ) -> None:
        """`reference.gqa_attention` into `out` half [M, heads * d]; inputs are half, cursor int32 [1].

        span: positions that the cursor and the rows stay within. memory: uint8, `workspace_bytes` of it.
        """
        outputs, shares, later = carve(memory, self._pieces())
        workspace = GQAWorkspace(outputs, shares, -(-self.positions // CHUNK))
        rows = q.shape[0]
        for start in range(0, rows, ROWS):
            part = slice(start, min(start + ROWS, rows))
            if start:
                torch.add(cursor, start, out=later)
            gqa_decode(
                (q[part], k[part], v[part]), self.heads, self.rope, k_cache, v_cache, later if start else cursor,
                out[part], workspace, part.stop - start, span,
            )  # fmt: skip

    def _pieces(self) -> list[Piece]:
        return workspace_pieces(self.heads, self.width, self.positions)


def workspace_pieces(heads: int, width: int, positions: int) -> list[Piece]:
    """Each chunk's outputs and shares, and a later cursor."""
    chunks = -(-positions // CHUNK)
    return [
        Piece(torch.float32, (ROWS * chunks, heads, width)),
        Piece(torch.float32, (ROWS * chunks, heads, 2)),
        Piece(torch.int32, (1,)),
    ]
