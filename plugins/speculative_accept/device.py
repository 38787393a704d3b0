"""`speculative_accept` and its greedy twin on the device, with given uniform numbers: one launch each, nothing read back.

Whole steps on the device do not come by here: they have their own random numbers and state (cuda.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from trtvlm.plugins.cuda.launch import kernel

SOURCE = "speculative_accept/operator.cu"
MOST_DRAFTED = 31
_THREADS = 512


def supports(draft_tokens: Tensor, *probs: Tensor) -> bool:
    """Whether the kernels take these: up to 31 int64 tokens, float32 probabilities."""
    few = draft_tokens.dtype == torch.int64 and len(draft_tokens) <= MOST_DRAFTED
    return few and all(table.dtype == torch.float32 and table.shape[-1] < 2**31 for table in probs)


def speculative_accept(
    draft_tokens: Tensor, draft_probs: Tensor, target_probs: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """`reference.speculative_accept` of what `supports` allows; sums are in another order, in float64 like there."""
    count, token = draft_tokens.new_empty(()), draft_tokens.new_empty(())
    kernel(SOURCE, "speculative_accept")(
        (1,), _THREADS, draft_tokens.contiguous(), draft_probs.contiguous(), target_probs.contiguous(),
        uniforms.double().contiguous(), len(draft_tokens), target_probs.shape[-1], count, token,
    )  # fmt: skip
    return count, token


def speculative_accept_greedy(draft_tokens: Tensor, target_logits: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.speculative_accept_greedy` of what `supports` allows."""
    count, token = draft_tokens.new_empty(()), draft_tokens.new_empty(())
    kernel(SOURCE, "speculative_accept_greedy")(
        (1,), 32, draft_tokens.contiguous(), target_logits.argmax(-1), len(draft_tokens), count, token
    )
    return count, token
