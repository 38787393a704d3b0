"""speculative_accept draws from exactly the target's distribution."""

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trtvlm.plugins.speculative_accept.op import speculative_accept, speculative_accept_greedy

# Probabilities in quarters: every acceptance ratio and every residual then has a denominator that divides 12, so the
# midpoints of 12 equal intervals stand exactly for all uniform numbers.
PARTS, GRID = 4, 12
MIDPOINTS = [(index + 0.5) / GRID for index in range(GRID)]
Distribution = tuple[Fraction, ...]


@st.composite
def distributions(draw: st.DrawFn) -> Distribution:
    cuts = sorted(draw(st.lists(st.integers(0, PARTS), min_size=2, max_size=2)))
    counts = (cuts[0], cuts[1] - cuts[0], PARTS - cuts[1])
    return tuple(Fraction(count, PARTS) for count in counts)


def _tensor(*rows: Distribution) -> torch.Tensor:
    return torch.tensor([[float(value) for value in row] for row in rows])


@settings(max_examples=30, deadline=None)
@given(distributions(), distributions(), distributions())
def test_one_draft_token_is_exact(q: Distribution, p: Distribution, after: Distribution) -> None:
    law = [Fraction(0)] * 3
    for drafted, accept, draw in itertools.product(range(3), MIDPOINTS, MIDPOINTS):
        if q[drafted] == 0:
            continue
        uniforms = torch.tensor([accept, draw])
        count, token = speculative_accept(torch.tensor([drafted]), _tensor(q), _tensor(p, after), uniforms)
        first = drafted if count == 1 else int(token)
        law[first] += q[drafted] / GRID**2
    assert tuple(law) == p


@settings(max_examples=3, deadline=None)
@given(st.lists(distributions(), min_size=8, max_size=8))
def test_two_draft_tokens_are_exact_jointly(tables: list[Distribution]) -> None:
    q_first, p_first, q_second, *rest = tables
    p_second, p_third = rest[:3], rest[3]  # the target's second distribution depends on the first token
    law = dict.fromkeys(itertools.product(range(3), repeat=2), Fraction(0))
    for drafted in itertools.product(range(3), repeat=2):
        chance = q_first[drafted[0]] * q_second[drafted[1]]
        if chance == 0:
            continue
        probs = _tensor(q_first, q_second), _tensor(p_first, p_second[drafted[0]], p_third)
        for numbers in itertools.product(MIDPOINTS, repeat=3):
            count, token = speculative_accept(torch.tensor(drafted), *probs, torch.tensor(numbers))
            weight = chance / GRID**3
            if count == 0:  # the second token is then drawn in the next step, from the target given the first
                for second, probability in enumerate(p_second[int(token)]):
                    law[int(token), second] += weight * probability
            else:
                law[drafted[0], drafted[1] if count == 2 else int(token)] += weight
    assert law == {pair: p_first[pair[0]] * p_second[pair[0]][pair[1]] for pair in law}


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(0, 2**31))
def test_greedy_keeps_the_longest_agreeing_run(drafted: list[int], seed: int) -> None:
    logits = torch.randn(len(drafted) + 1, 4, generator=torch.Generator().manual_seed(seed))
    choice = logits.argmax(-1).tolist()
    expected = next((i for i, token in enumerate(drafted) if token != choice[i]), len(drafted))
    count, token = speculative_accept_greedy(torch.tensor(drafted), logits)
    assert (int(count), int(token)) == (expected, choice[expected])


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(0, 2**31))
def test_greedy_is_sampling_from_certainties(drafted: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(drafted) + 1, 4, generator=generator)
    certain = torch.nn.functional.one_hot(logits.argmax(-1), 4).float()
    proposed = torch.nn.functional.one_hot(torch.tensor(drafted), 4).float()
    uniforms = torch.rand(len(drafted) + 1, generator=generator)
    sampled = speculative_accept(torch.tensor(drafted), proposed, certain, uniforms)
    assert sampled == speculative_accept_greedy(torch.tensor(drafted), logits)


def test_a_uniform_number_next_to_one_draws_a_token_that_has_weight() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0]])
    number = torch.tensor([1.0 - 2**-24])
    _, token = speculative_accept(torch.empty(0, dtype=torch.int64), torch.empty(0, 3), p, number)
    assert int(token) == 1


@pytest.mark.parametrize("drafts", [1, 4])
def test_opcheck(drafts: int) -> None:
    probs = torch.rand(2 * drafts + 1, 5).softmax(-1)
    tokens = torch.randint(0, 5, (drafts,))
    arguments = (tokens, probs[:drafts], probs[drafts:], torch.rand(drafts + 1))
    torch.library.opcheck(speculative_accept, arguments)
    torch.library.opcheck(speculative_accept_greedy, (tokens, probs[drafts:]))
