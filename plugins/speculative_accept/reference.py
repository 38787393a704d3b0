"""What speculative_accept means: greedy verification, and rejection sampling.

Below, in numpy, what the kernels do with the state of a step (state.py).
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trtvlm.plugins.sampling.reference import PROBABILITY_ONE, draw, random_fraction, to_fixed, unit
from trtvlm.plugins.speculative_accept.state import (
    ACCEPT_TEST,
    ACCEPTED,
    DONE,
    DRAFT_CURSORS,
    DRAFTED,
    EMITTED,
    EOS,
    INPUTS,
    LIMIT,
    MAX_DRAFTED,
    RING_ACCEPTED,
    RING_COUNT,
    RING_DONE,
    RING_DRAFTED,
    RING_HEADER,
    RING_STEPS,
    SEED,
    STEP,
    TARGET_CURSOR,
    TARGET_DRAW,
    draft_cursors,
)

Ints = NDArray[np.int32]


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


def advance(state: Ints, ring: Ints, drafted: int, accepted: int, own: int) -> None:
    """Emit the accepted ones of `drafted` tokens and the target's own, up to the answer's end, and move everything on.

    state int32 [STATE_SIZE] and ring int32 [RING_HEADER + capacity] as in state.py, changed in place. Nothing changes
    after DONE.
    """
    if state[DONE]:
        return
    first = INPUTS + 2
    tokens = [*state[first : first + accepted].tolist(), own][: state[LIMIT] - state[EMITTED]]
    ended = int(state[EOS]) in tokens
    if ended:
        tokens = tokens[: tokens.index(int(state[EOS])) + 1]
    capacity = len(ring) - RING_HEADER
    for index, token in enumerate(tokens, int(state[EMITTED])):
        ring[RING_HEADER + index % capacity] = token
    state[INPUTS : INPUTS + 2] = [int(state[INPUTS + 1]), *tokens][-2:]
    state[TARGET_CURSOR] += len(tokens)
    state[DRAFT_CURSORS : DRAFT_CURSORS + MAX_DRAFTED] = draft_cursors(int(state[TARGET_CURSOR]))
    state[EMITTED] += len(tokens)
    state[STEP] += 1
    state[DRAFTED] += drafted
    state[ACCEPTED] += min(accepted, len(tokens))
    state[DONE] = ended or state[EMITTED] >= state[LIMIT]
    ring[RING_DONE], ring[RING_STEPS] = state[DONE], state[STEP]
    ring[RING_DRAFTED], ring[RING_ACCEPTED] = state[DRAFTED], state[ACCEPTED]
    ring[RING_COUNT] = state[EMITTED]


def greedy_step(state: Ints, ring: Ints, choices: list[int]) -> None:
    """The end of a greedy step: `choices` are the target's, one more than tokens were drafted."""
    drafted = len(choices) - 1
    accepted = 0
    while accepted < drafted and state[INPUTS + 2 + accepted] == choices[accepted]:
        accepted += 1
    advance(state, ring, drafted, accepted, choices[accepted])


def sampled_step(state: Ints, ring: Ints, q: NDArray[np.float32], p: NDArray[np.float32]) -> None:
    """The end of a sampled step: rejection sampling of the drafted tokens, q [K, V] what they were drawn from, p [K + 1, V].

    As `speculative_accept`, with the step's own random numbers and sums of integers.
    """
    seed = int(state[SEED]) % 2**32 | int(state[SEED + 1]) % 2**32 << 32
    step, drafted, accepted = int(state[STEP]), len(q), 0
    while accepted < drafted:
        token = int(state[INPUTS + 2 + accepted])
        uniform = unit(random_fraction(seed, step, ACCEPT_TEST + accepted))
        if not uniform * float(q[accepted, token]) < float(p[accepted, token]):
            break
        accepted += 1
    row = p[accepted]
    weights = to_fixed(np.maximum(row - q[accepted], 0) if accepted < drafted else row, PROBABILITY_ONE)
    if not weights.any():
        weights = to_fixed(row, PROBABILITY_ONE)
    advance(state, ring, drafted, accepted, draw(weights, random_fraction(seed, step, TARGET_DRAW)))
