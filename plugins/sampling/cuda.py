"""Probabilities and draws on the device: launches on torch's stream, capturable.

Temperature, top-p, seed and step are read from the state (`speculative_accept/state.py`), so one graph serves all requests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trtvlm.plugins.cuda.launch import defines, kernel
from trtvlm.plugins.sampling.reference import BUCKETS, LEVELS

KERNEL = "sampling/kernel.cu"
SLICE_THREADS, SLICE_ITEMS = 512, 8
MAX_VOCAB = 2**19  # times weights of up to 2^44: their sum fits 64 bits
_SELECTED_WORDS = 6  # 64-bit words of the kernel's struct Selected


def slices(vocab: int) -> int:
    """Blocks that a row of the vocabulary takes. ValueError if the kernels do not take it."""
    if vocab % SLICE_ITEMS or not 0 < vocab <= MAX_VOCAB:
        raise ValueError(f"sampling takes vocabularies of up to {MAX_VOCAB} tokens in {SLICE_ITEMS}s, not of {vocab}")
    return -(-vocab // (SLICE_THREADS * SLICE_ITEMS))


def workspace(rows: int, vocab: int, device: torch.device | str = "cuda") -> Tensor:
    """What `probabilities` of up to `rows` rows needs: int64, zeros to begin with, and left so that it can go on."""
    words = LEVELS * BUCKETS + slices(vocab) + LEVELS * _SELECTED_WORDS + 1
    return torch.zeros(rows * words, dtype=torch.int64, device=device)


def probabilities(
    logits: Tensor,
    candidates: tuple[Tensor, Tensor],
    state: Tensor,
    probs: Tensor,
    workspace: Tensor,
    rows: int,
    *,
    token: Tensor | None = None,
    which: int = 0,
) -> None:
    """`reference.distribution` of each row: probs float32 [rows, V] of logits float32 [rows, V], in four launches.

    candidates: the head's (values float32 [rows, blocks], tokens int32 [rows, blocks]); state: int32 [STATE_SIZE].
    token int32 [rows]: if given, a token of each row is drawn with random number which + row of the step. ValueError: a
    vocabulary that the kernels do not take.
    """
    vocab = logits.shape[-1]
    macros = defines(VOCAB=vocab)
    grid = (slices(vocab), rows)
    values, tokens = candidates
    blocks = values.shape[-1]
    kernel(KERNEL, "weigh", macros)(grid, SLICE_THREADS, logits, values, tokens, blocks, state, workspace)
    kernel(KERNEL, "refine_1", macros)(grid, SLICE_THREADS, logits, state, workspace)
    kernel(KERNEL, "refine_2", macros)(grid, SLICE_THREADS, logits, state, workspace)
    kernel(KERNEL, "finish", macros)(grid, SLICE_THREADS, logits, state, workspace, probs, token, which)
