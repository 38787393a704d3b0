"""A compiled language model as a step of the speculative loop on the device: what `DecodeProgram` is for the kernels alone."""

from __future__ import annotations

import torch
from torch import Tensor

from trtvlm.runtime.tensorrt.program import ChainProgram
from trtvlm.runtime.tensorrt.whole import WholeProgram

Candidates = tuple[Tensor, Tensor]


class CompiledStep:
    """`trtvlm.runtime.cuda.speculation.Program` over a program's buffers. Launches only.

    `found`: of each row the best logit float32 [rows, 1] and its token int32 [rows, 1]; of equals the lower token.
    """

    def __init__(self, program: ChainProgram | WholeProgram, cursor: Tensor) -> None:
        self._program, self._cursor = program, cursor
        self.max_rows = program.width
        self.logits = program.logits
        device = program.logits.device
        values = torch.zeros(self.max_rows, 1, device=device)
        self.found = values, torch.zeros(self.max_rows, 1, dtype=torch.int32, device=device)
        self._best = torch.zeros(self.max_rows, 1, dtype=torch.int64, device=device)

    def launch(
        self,
        tokens: Tensor,
        cursor: Tensor,
        rows: int,
        span: int,
        chosen_from: Candidates | None = None,
        logits: bool = False,
    ) -> None:
        """Decode tokens int32 [rows] at cursor int32 [1], both on the device, within `span` positions.

        chosen_from: another step's best (value [1], token [1]); the token becomes the last of `tokens` first.
        """
        if chosen_from is not None:
            tokens[rows - 1 : rows].copy_(chosen_from[1])
        self._program.tokens[:rows].copy_(tokens[:rows])
        self._cursor.copy_(cursor)
        self._program.decode(rows, span)
        torch.max(self.logits, dim=-1, keepdim=True, out=(self.found[0], self._best))
        self.found[1].copy_(self._best)

    def best(self, row: int) -> Candidates:
        """The candidates of one row."""
        return self.found[0][row], self.found[1][row]
