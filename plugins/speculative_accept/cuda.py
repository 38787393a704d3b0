"""The end of a speculative step on the device: launches on torch's stream, capturable. The state is told in state.py."""

from __future__ import annotations

import torch
from torch import Tensor

from trtvlm.plugins.cuda.launch import defines, kernel
from trtvlm.plugins.sampling.cuda import SLICE_THREADS, slices
from trtvlm.plugins.speculative_accept.state import MAX_DRAFTED, RING_HEADER

KERNEL = "speculative_accept/kernel.cu"
CHOOSE_THREADS, ACCEPT_THREADS = 256, 512


def choose(candidates: tuple[Tensor, Tensor], out: Tensor, rows: int) -> None:
    """out[m] int32 = the most likely token of row m; candidates: the head's (values, tokens), each [rows, blocks]."""
    values, tokens = candidates
    kernel(KERNEL, "choose")((rows,), CHOOSE_THREADS, values, tokens, values.shape[-1], out)


def accept_greedy(
    state: Tensor,
    ring: Tensor,
    drafted: int,
    choices: Tensor | None = None,
    candidates: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Keep the drafted tokens that are the target's own choices, and move on: `reference.greedy_step`.

    choices: the target's, int32 [drafted + 1]; with candidates (values, tokens), each [drafted + 1, blocks], they are
    found here (and written to choices, if given). ValueError: more than MAX_DRAFTED tokens, or neither given.
    """
    _check(drafted)
    if choices is None and candidates is None:
        raise ValueError("accept_greedy needs the target's choices or its candidates")
    values, tokens = candidates if candidates is not None else (None, None)
    blocks = values.shape[-1] if values is not None else 0
    launch = kernel(KERNEL, "accept_greedy")
    launch((1,), ACCEPT_THREADS, state, ring, len(ring) - RING_HEADER, drafted, choices, values, tokens, blocks)


def workspace(vocab: int, device: torch.device | str = "cuda") -> Tensor:
    """What `accept_sampled` needs: int64, zeros to begin with, and left so that it can go on."""
    return torch.zeros(2 * slices(vocab) + 1, dtype=torch.int64, device=device)


def accept_sampled(
    state: Tensor, ring: Tensor, drafted: int, draft_probs: Tensor | None, target_probs: Tensor, workspace: Tensor
) -> None:
    """Rejection sampling of the drafted tokens, and move on: `reference.sampled_step`.

    draft_probs float32 [drafted, V] (None if nothing is drafted), target_probs float32 [drafted + 1, V]. ValueError:
    more than MAX_DRAFTED tokens, or a vocabulary that the kernels do not take.
    """
    _check(drafted)
    vocab = target_probs.shape[-1]
    grid = (slices(vocab),)
    launch = kernel(KERNEL, "accept_sampled", defines(VOCAB=vocab))
    capacity, sums, counter = len(ring) - RING_HEADER, workspace, workspace[-1:]
    launch(grid, SLICE_THREADS, state, ring, capacity, drafted, draft_probs, target_probs, sums, counter)


def _check(drafted: int) -> None:
    if not 0 <= drafted <= MAX_DRAFTED:
        raise ValueError(f"a step drafts 0 to {MAX_DRAFTED} tokens, not {drafted}")
