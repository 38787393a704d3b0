"""What speculative_accept means: greedy verification, and rejection sampling."""

import torch
from torch import Tensor


def speculative_accept_greedy(draft_tokens: Tensor, target_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Draft tokens stand up to the first that is not the target's own choice.

    draft_tokens int64 [K], target_logits [K + 1, V] (row i follows draft token i - 1) -> accepted count int64 [] in
    0..K, and the target's own token int64 [] after them.
    """
    choice = target_logits.argmax(-1)
    agrees = (draft_tokens == choice[:-1]).long()
    count = agrees.cumprod(0).sum()
    return count, choice[count]


def speculative_accept(
    draft_tokens: Tensor, draft_probs: Tensor, target_probs: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """Rejection sampling (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318).

    Draft token x at i stands with probability min(1, p_i(x) / q_i(x)); the first that falls is replaced by a draw from
    max(0, p_i - q_i), renormalised; if none falls, one more token is drawn from p_K. The tokens are then distributed
    as p alone would draw them.

    draft_tokens int64 [K], draft_probs q [K, V] that they were drawn from, target_probs p [K + 1, V], uniforms [K + 1]
    in [0, 1): K acceptance tests, then the draw -> accepted count int64 [] in 0..K and the next token int64 [].
    """
    draws, vocab = len(draft_tokens), target_probs.shape[-1]
    # float64: cumulative sums over a vocabulary lose the last tokens of the tail in float32.
    p, q, u = target_probs.double(), draft_probs.double(), uniforms.double()
    column = draft_tokens.unsqueeze(1)
    # u < p / q without the division: q may be 0 in a table, though never for a token that was drawn from it.
    stands = u[:draws] * q.gather(1, column).squeeze(1) < p[:draws].gather(1, column).squeeze(1)
    count = stands.long().cumprod(0).sum()
    # Row K has no draft to subtract: the residual is p itself.
    drafted = torch.cat((q, q.new_zeros(1, vocab)))[count]
    residual = (p[count] - drafted).clamp_min(0.0)
    # Rounding may leave nothing where p equals q and the test still fell.
    weights = torch.where(residual.sum() > 0, residual, p[count])
    return count, _draw(weights, u[draws])


def _draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """The index int64 [] that `uniform` in [0, 1) falls on, of weights [V] >= 0 that need not sum to 1."""
    cumulative = weights.cumsum(0)
    index = (cumulative <= uniform * cumulative[-1]).sum()
    # uniform * total may round up to the total: the last index with any weight is meant.
    last = (weights > 0).nonzero().amax()
    return torch.minimum(index, last)
