"""torch.ops.trtvlm.speculative_accept (and _greedy); CUDA has kernels, other devices and what these do not take run
the reference.
"""

import torch
from torch import Tensor

from trtvlm.plugins.shapes import require
from trtvlm.plugins.speculative_accept import reference


@torch.library.custom_op("trtvlm::speculative_accept", mutates_args=())
def speculative_accept(
    draft_tokens: Tensor, draft_probs: Tensor, target_probs: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """`reference.speculative_accept`: accepted count and next token, both int64 []."""
    return reference.speculative_accept(draft_tokens, draft_probs, target_probs, uniforms)


@speculative_accept.register_fake
def _(draft_tokens: Tensor, draft_probs: Tensor, target_probs: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    require(target_probs.shape[0] == draft_tokens.shape[0] + 1, "the target has one row more")
    require(draft_probs.shape[0] == draft_tokens.shape[0], "one row of draft probabilities a token")
    require(uniforms.shape[0] == draft_tokens.shape[0] + 1, "one uniform number a row of the target")
    return draft_tokens.new_empty(()), draft_tokens.new_empty(())


@torch.library.custom_op("trtvlm::speculative_accept_greedy", mutates_args=())
def speculative_accept_greedy(draft_tokens: Tensor, target_logits: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.speculative_accept_greedy`: accepted count and next token, both int64 []."""
    count, token = reference.speculative_accept_greedy(draft_tokens, target_logits)
    return count, token.clone()


@speculative_accept_greedy.register_fake
def _(draft_tokens: Tensor, target_logits: Tensor) -> tuple[Tensor, Tensor]:
    require(target_logits.shape[0] == draft_tokens.shape[0] + 1, "the target has one row more")
    return draft_tokens.new_empty(()), draft_tokens.new_empty(())


@speculative_accept.register_kernel("cuda")
def _(draft_tokens: Tensor, draft_probs: Tensor, target_probs: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    from trtvlm.plugins.speculative_accept import device

    fits = device.supports(draft_tokens, draft_probs, target_probs)
    run = device.speculative_accept if fits else reference.speculative_accept
    return run(draft_tokens, draft_probs, target_probs, uniforms)


@speculative_accept_greedy.register_kernel("cuda")
def _(draft_tokens: Tensor, target_logits: Tensor) -> tuple[Tensor, Tensor]:
    from trtvlm.plugins.speculative_accept import device

    if device.supports(draft_tokens):
        return device.speculative_accept_greedy(draft_tokens, target_logits)
    count, token = reference.speculative_accept_greedy(draft_tokens, target_logits)
    return count, token.clone()
