"""Sampling: the distributions themselves, then that speculation keeps them (chi-square)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.toy import ToyDecoder, ToyModel
from trtvlm.runtime.sampling import Sampler, draw, probabilities
from trtvlm.runtime.speculate import speculate


@given(
    logits=st.lists(st.integers(-300, 300).map(lambda tenths: tenths / 10), min_size=1, max_size=12),
    temperature=st.floats(1e-300, 100),
    top_p=st.floats(1e-9, 1.0),
)
@settings(max_examples=300, deadline=None)
def test_probabilities_are_the_nucleus(logits: list[float], temperature: float, top_p: float) -> None:
    probs = probabilities(torch.tensor(logits, dtype=torch.float64), temperature, top_p).tolist()
    top = max(logits)
    weights = [math.exp(max(-745.0, (x - top) / temperature)) if x < top else 1.0 for x in logits]
    full = [w / sum(weights) for w in weights]
    kept, covered = set(), 0.0
    for token in sorted(range(len(full)), key=lambda t: (-full[t], t)):
        if covered >= top_p - 1e-12:
            break
        kept.add(token)
        covered += full[token]
    assert sum(probs) == pytest.approx(1)
    assert probs[int(np.argmax(logits))] > 0
    for token, prob in enumerate(probs):
        if prob > 0 and prob > 1e-12:
            # One token at the very edge may go either way by rounding.
            assert token in kept or covered == pytest.approx(top_p, abs=1e-9)
    if top_p == 1.0:
        assert probs == pytest.approx(full, abs=1e-9)


def test_top_p_by_hand() -> None:
    logits = torch.tensor([0.2, 0.5, 0.1, 0.2]).log()
    assert probabilities(logits, 1.0, 0.5).tolist() == pytest.approx([0, 1, 0, 0])
    assert probabilities(logits, 1.0, 0.6).tolist() == pytest.approx([2 / 7, 5 / 7, 0, 0])  # the smaller id of a tie
    assert probabilities(logits, 1.0, 0.95).tolist() == pytest.approx([0.2, 0.5, 0.1, 0.2])
    assert probabilities(logits, 0.5, 1.0).tolist() == pytest.approx(
        [0.04 / 0.34, 0.25 / 0.34, 0.01 / 0.34, 0.04 / 0.34]
    )


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rows = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    together = probabilities(rows, 0.7, 0.9)
    for i, row in enumerate(rows):
        assert torch.equal(together[i], probabilities(row, 0.7, 0.9))


def test_draw_is_the_inverse_cdf() -> None:
    probs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    assert [draw(probs, u) for u in (0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53)] == [1, 1, 3, 3, 4, 4]
    assert draw(probs * 1e-30, 0.5) == 3
    assert draw(probs, 1.0) == 4  # never a token of no probability, even off the end


def test_seeds() -> None:
    logits = torch.zeros(1000)
    assert [Sampler(1.0, 1.0, 7).choose(logits)[0] for _ in range(2)] == [Sampler(1.0, 1.0, 7).choose(logits)[0]] * 2
    assert Sampler(1.0, 1.0, 2**64 + 3).choose(logits)[0] >= 0
    assert Sampler(1.0, 1.0, -1).choose(logits)[0] >= 0
    first = [Sampler(1.0).choose(logits)[0] for _ in range(8)]
    assert len(set(first)) > 1  # without a seed, every sampler differs


def test_greedy_takes_the_smaller_of_equals() -> None:
    assert Sampler().choose(torch.tensor([1.0, 3.0, 3.0]))[0] == 1
    assert Sampler().accept([1, 0], [], torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 0.0], [0.0, 0.0, 9.0]])) == [1, 0, 2]


def test_equal_distributions_are_always_accepted() -> None:
    sampler = Sampler(0.8, 0.9, seed=1)
    row = torch.randn(50, generator=torch.Generator().manual_seed(2))
    for _ in range(200):
        token, probs = sampler.choose(row)
        assert sampler.accept([token], [probs], torch.stack([row, row]))[0] == token


def test_disjoint_distributions_are_always_refused() -> None:
    sampler = Sampler(1.0, 0.5, seed=1)
    draft, target = torch.tensor([9.0, 0.0]), torch.tensor([0.0, 9.0])
    token, probs = sampler.choose(draft)
    assert sampler.accept([token], [probs], torch.stack([target, target])) == [1]


SETTINGS = [(1.0, 1.0), (0.5, 1.0), (1.5, 0.8)]
SAMPLES = 3000


@pytest.mark.parametrize(("temperature", "top_p"), SETTINGS)
@pytest.mark.parametrize("noise", [0.7, 3.0])
def test_speculation_keeps_the_distribution(temperature: float, top_p: float, noise: float) -> None:
    """Chi-square of the first, second and third token against the exact distribution, and of their pairs.

    With these seeds the p values are what they are; a wrong distribution (no residual, top-p on one side only)
    gives p values below 1e-20 here.
    """
    vocab, count = 5, 3
    target_model = ToyModel(vocab, seed=3)
    draft_model = ToyModel(vocab, seed=3, noise=noise)
    exact = np.zeros([vocab] * count)
    for first in range(vocab):
        for second in range(vocab):
            context = (0, 1)
            prob = probabilities(target_model.logits(context), temperature, top_p)[first]
            prob = prob * probabilities(target_model.logits((*context, first)), temperature, top_p)[second]
            last = probabilities(target_model.logits((*context, first, second)), temperature, top_p)
            exact[first, second] = (prob * last).numpy()
    seen = np.zeros_like(exact)
    sampler = Sampler(temperature, top_p, seed=11)
    for _ in range(SAMPLES):
        target, draft = ToyDecoder(target_model), ToyDecoder(draft_model)
        out: list[int] = []
        for step in speculate(target, draft, 1, sampler, max_tokens=count, draft_tokens=2):
            out += step.tokens
        seen[tuple(out[:count])] += 1
    assert chi_square_p(seen.sum((1, 2)), exact.sum((1, 2))) > 1e-3
    assert chi_square_p(seen.sum((0, 2)), exact.sum((0, 2))) > 1e-3
    assert chi_square_p(seen.sum((0, 1)), exact.sum((0, 1))) > 1e-3
    assert chi_square_p(seen, exact) > 1e-3


def chi_square_p(seen: np.ndarray, exact: np.ndarray) -> float:
    """The p value of counts against probabilities; cells expecting fewer than 5 are pooled. No token out of the set."""
    seen, exact = seen.ravel(), exact.ravel()
    assert seen[exact == 0].sum() == 0
    expected = exact * seen.sum()
    rare = expected < 5
    observed = np.append(seen[~rare], seen[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = float(((observed - expected) ** 2 / expected).sum())
    freedom = torch.tensor((len(observed) - 1) / 2, dtype=torch.float64)
    if freedom == 0:
        return 1.0
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


def test_the_chi_square_test_can_fail() -> None:
    assert chi_square_p(np.array([520.0, 480.0]), np.array([0.5, 0.5])) > 0.1
    assert chi_square_p(np.array([600.0, 400.0]), np.array([0.5, 0.5])) < 1e-8
