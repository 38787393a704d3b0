"""From logits to tokens: greedy or sampled, plain or speculative, always with the same distribution.

Temperature and top-p are part of both the target's and the draft's distribution, so that what
`trtvlm.plugins.speculative_accept` accepts of the draft's has exactly the distribution that plain sampling has.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from trtvlm.plugins.speculative_accept.reference import speculative_accept, speculative_accept_greedy

if TYPE_CHECKING:
    from torch import Tensor


def probabilities(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """The distribution a token is drawn from: float64 [..., vocab] of logits [..., vocab], on the CPU.

    Softmax at a temperature > 0, then top-p: the smallest set of most likely tokens whose probability reaches `top_p`,
    renormalised (Holtzman et al., 2020). Equal probabilities are ordered by token id. Each row stands alone.
    """
    rows = logits.detach().to("cpu", torch.float64)
    # The largest logit is taken off before the division: no temperature, however small, overflows.
    probs = ((rows - rows.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_p < 1.0:
        ranked, order = probs.sort(dim=-1, descending=True, stable=True)
        before = ranked.cumsum(-1) - ranked  # what the more likely tokens already cover; 0 for the first
        ranked = torch.where(before < top_p, ranked, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, order, ranked)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def draw(probs: Tensor, uniform: float) -> int:
    """The token of a distribution [vocab] (of any positive total) at `uniform` in [0, 1): the inverse of its cdf."""
    cdf = probs.cumsum(-1)
    token = int(torch.searchsorted(cdf, cdf[-1] * uniform, right=True))
    # Rounding may put the product on the very end of the cdf; the last token with any probability is meant then.
    return min(token, int(probs.nonzero()[-1]))


@dataclass
class Sampler:
    """Chooses tokens for one request. Temperature 0 is greedy; otherwise draws come from a seeded generator."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    _generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._generator = torch.Generator()
        if self.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(self.seed % 2**63)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken (the smaller id of two equal ones)."""
        return self.temperature == 0

    def choose(self, logits: Tensor) -> tuple[int, Tensor]:
        """A token for logits [vocab], and the distribution [vocab] it was drawn from (greedy: empty)."""
        if self.greedy:
            return int(logits.argmax()), logits.new_empty(0)
        probs = probabilities(logits, self.temperature, self.top_p)
        return draw(probs, self._uniform()), probs

    def accept(self, drafted: list[int], draft_probs: list[Tensor], logits: Tensor) -> list[int]:
        """The tokens of one verification: the accepted drafted ones, then one of the target's own.

        drafted: K tokens; draft_probs: what `choose` gave with each; logits [K + 1, vocab]: the target's rows, row i
        being the one that drafted[i] competes in. Returns 1 to K + 1 tokens.
        """
        tokens = torch.tensor(drafted, dtype=torch.int64)
        if self.greedy:
            count, own = speculative_accept_greedy(tokens, logits)
        else:
            p = probabilities(logits, self.temperature, self.top_p)
            q = torch.stack(draft_probs) if draft_probs else p[:0]
            uniforms = torch.rand(len(p), generator=self._generator, dtype=torch.float64)
            count, own = speculative_accept(tokens, q, p, uniforms)
        return [*drafted[: int(count)], int(own)]

    def _uniform(self) -> float:
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))
