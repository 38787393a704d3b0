"""The replayed acceptance equals a literal speculative loop over the same predictions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtvlm.draft.acceptance import Acceptance, expected_tokens, replay, total


def literal_loop(answer: list[int], predictions: list[int], k: int) -> tuple[int, int]:
    """(steps, tokens) of the loop as a runtime writes it: draft k, verify k + 1, keep the prefix, stop at the end."""
    committed, steps, tokens = [answer[0]], 0, 0
    while len(committed) < len(answer):
        drafted: list[int] = []
        for _ in range(k):
            context = committed + drafted
            right = context == answer[: len(context)] and len(context) < len(answer)
            drafted.append(predictions[len(context)] if right else -1)  # off the answer, whatever it says is lost
        verified: list[int] = []
        for proposal in drafted:
            truth = answer[len(committed) + len(verified)]
            verified.append(truth)
            if proposal != truth or len(committed) + len(verified) == len(answer):
                break
        else:
            verified.append(answer[len(committed) + len(verified)])
        committed += verified
        steps, tokens = steps + 1, tokens + len(verified)
    return steps, tokens


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40),
    st.integers(1, 6),
)
def test_replay_equals_the_literal_loop(pairs: list[tuple[int, int]], k: int) -> None:
    answer, predictions = [a for a, _ in pairs], [p for _, p in pairs]
    result = replay([[a == p for a, p in pairs]], k)
    assert (result.steps, result.tokens) == literal_loop(answer, predictions, k)
    assert result.tokens == len(answer) - 1


def test_perfect_and_useless_drafts_reach_the_bounds() -> None:
    perfect, useless = replay([[True] * 51], 4), replay([[False] * 51], 4)
    assert (perfect.tokens_per_step, perfect.agreement) == (5.0, 1.0)
    assert (useless.tokens_per_step, useless.agreement) == (1.0, 0.0)
    assert perfect.by_position == (1.0,) * 4
    assert useless.by_position == (0.0,) * 4


def test_answers_are_counted_apart() -> None:
    apart = total([replay([[True, True, False]], 2), replay([[True, False, True, True]], 2)])
    assert apart == replay([[True, True, False], [True, False, True, True]], 2)
    assert apart == Acceptance(2, 3, 5, (3, 3), (2, 1), 5, 7)


def test_expected_tokens() -> None:
    assert expected_tokens(1.0, 4) == 5
    assert expected_tokens(0.0, 4) == 1
    assert expected_tokens(0.5, 2) == 1.75


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="k >= 1"):
        replay([], 0)
    with pytest.raises(ValueError, match="same k"):
        total([replay([], 1), replay([], 2)])
