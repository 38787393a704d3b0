"""`embed` on the device: one launch on torch's stream, capturable."""

from __future__ import annotations

from torch import Tensor

from trtvlm.plugins.cuda.launch import defines, kernel
from trtvlm.plugins.embedding.reference import SUM_WIDTH

KERNEL = "embedding/kernel.cu"
MAX_HIDDEN = 8192


def threads(hidden: int) -> int:
    """Threads of a block. ValueError if the kernel does not take rows of this width."""
    if hidden % SUM_WIDTH or not SUM_WIDTH <= hidden <= MAX_HIDDEN:
        raise ValueError(f"embed takes rows of {SUM_WIDTH} to {MAX_HIDDEN} values in {SUM_WIDTH}s, not of {hidden}")
    return max(128, -(-hidden // 8 // 32) * 32)


def embed(
    tokens: Tensor,
    table: Tensor,
    residual: Tensor,
    square_sums: Tensor,
    rows: int,
    candidates: tuple[Tensor, Tensor] | None = None,
    turns: Tensor | None = None,
) -> None:
    """`reference.embed` of tokens int32 [rows] and table float16 [V, hidden] into residual and square_sums.

    candidates: the head's (values float32 [blocks], tokens int32 [blocks]) for the last token, which is then chosen first
    and written to tokens[rows - 1]. turns: counters of the step's launches to zero
    (`trtvlm.plugins.cuda.turns`). ValueError: a width that the kernel does not take.
    """
    vocab, hidden = table.shape
    block = threads(hidden)
    values, indices = candidates if candidates is not None else (None, None)
    blocks = values.numel() if values is not None else 0
    launch = kernel(KERNEL, "embed", defines(HIDDEN=hidden))
    launches = 0 if turns is None else len(turns)
    launch((rows,), block, tokens, table, vocab, residual, square_sums, values, indices, blocks, turns, launches)
