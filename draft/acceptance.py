"""How many tokens a target step yields with this draft: measured on answers, without running the speculative loop.

In greedy speculation the draft's proposals are compared with what the target itself would say, and whatever is kept
*is* the target's greedy answer. So the context from which a proposal is made is always a prefix of that answer, and
the chain the draft drafts from position t equals its teacher-forced predictions on the answer for as long as they
match. One teacher-forced forward of the draft over the target's answers therefore tells exactly, not approximately,
what every step of greedy speculation (Leviathan et al. 2023, "Fast inference from transformers via speculative
decoding", with both distributions degenerate) would have accepted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Acceptance:
    """What speculation of width `k` did over a set of answers.

    `steps` counts the target's verification passes and `tokens` what came out of them, the end token included; the
    first token of an answer comes from the prefill and counts in neither. `offered[i]` is the number of steps in which
    the draft's token i+1 could still be used (the answer had not ended), `accepted[i]` those in which it was kept.
    `matched` of `positions` predictions of the draft, at every position of the answers, equal the target's.
    """

    k: int
    steps: int
    tokens: int
    offered: tuple[int, ...]
    accepted: tuple[int, ...]
    matched: int
    positions: int

    @property
    def tokens_per_step(self) -> float:
        """Tokens that come out of one target step, between 1 and k + 1 (0 when nothing was measured)."""
        return self.tokens / max(self.steps, 1)

    @property
    def agreement(self) -> float:
        """The share of all answer positions where the draft's greedy token is the target's."""
        return self.matched / max(self.positions, 1)

    @property
    def by_position(self) -> tuple[float, ...]:
        """For each of the k drafted tokens, the share of steps offering it that kept it and all before it."""
        return tuple(kept / max(offered, 1) for kept, offered in zip(self.accepted, self.offered, strict=True))

    def to_dict(self) -> dict[str, object]:
        """The figures as plain JSON values."""
        return {
            "k": self.k,
            "steps": self.steps,
            "tokens": self.tokens,
            "tokens_per_step": round(self.tokens_per_step, 4),
            "by_position": [round(rate, 4) for rate in self.by_position],
            "agreement": round(self.agreement, 4),
        }


def expected_tokens(agreement: float, k: int) -> float:
    """Tokens a step if each drafted token were kept independently with probability `agreement`: 1 + a + ... + a^k."""
    return sum(agreement**i for i in range(k + 1))


def replay(matches: Iterable[Sequence[bool]], k: int) -> Acceptance:
    """Greedy speculation of width `k` replayed over answers.

    Args:
        matches: one sequence an answer: element t tells whether the draft, given the prompt and the answer's first t
            tokens, picks the answer's token t. Element 0 (the prefill's token) is counted in the agreement only.
        k: drafted tokens a step, at least 1.
    """
    if k < 1:
        raise ValueError(f"speculation needs k >= 1, not {k}")
    steps = tokens = matched = positions = 0
    offered, accepted = [0] * k, [0] * k
    for answer in matches:
        matched, positions = matched + sum(answer), positions + len(answer)
        t = 1
        while t < len(answer):
            left = len(answer) - t
            kept = 0
            while kept < min(k, left) and answer[t + kept]:
                kept += 1
            for i in range(min(k, left)):
                offered[i] += 1
                accepted[i] += i < kept
            advance = min(kept + 1, left)  # the target's own token follows, unless the answer ended inside the run
            steps, tokens, t = steps + 1, tokens + advance, t + advance
    return Acceptance(k, steps, tokens, tuple(offered), tuple(accepted), matched, positions)


def total(parts: Sequence[Acceptance]) -> Acceptance:
    """Measurements of the same k added up.

    Raises:
        ValueError: nothing to add, or different k.
    """
    if len({part.k for part in parts}) != 1:
        raise ValueError("acceptance can be added up only over at least one measurement, all of the same k")
    return Acceptance(
        parts[0].k,
        sum(part.steps for part in parts),
        sum(part.tokens for part in parts),
        tuple(map(sum, zip(*(part.offered for part in parts), strict=True))),
        tuple(map(sum, zip(*(part.accepted for part in parts), strict=True))),
        sum(part.matched for part in parts),
        sum(part.positions for part in parts),
    )
