"""Random numbers against published ones; top-p and draws against sorting and fractions."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtvlm.plugins.sampling.reference import WEIGHT_ONE, distribution, draw, kept, philox, relative, to_fixed


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # Random123's kat_vectors, philox 4x32 of 10 rounds.
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_numbers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    assert philox(counter, key) == expected


def _smallest_set(weights: np.ndarray, top_p: float) -> set[int]:
    """The definition: most likely first, smaller tokens first of equal ones, until the sum reaches top_p."""
    exact = [Fraction(int(weight)) for weight in to_fixed(weights, WEIGHT_ONE)]
    wanted = Fraction(float(np.float32(top_p))) * sum(exact)
    taken: set[int] = set()
    for token in sorted(range(len(exact)), key=lambda t: (-weights[t], t)):
        if sum(exact[t] for t in taken) >= wanted and taken:
            break
        taken.add(token)
    return {token for token in taken if exact[token]}


@given(
    st.lists(st.sampled_from([0.0, -0.5, -1.0, -1.0000001, -3.0, -20.0, -40.0]), min_size=1, max_size=40),
    st.sampled_from([0.01, 0.25, 0.5, 0.75, 0.9, 0.999, 1.0]),
)
def test_top_p_keeps_the_smallest_set(logits: list[float], top_p: float) -> None:
    weights = relative(np.array(logits, np.float32), 1.0)
    out = kept(weights, top_p)
    assert set(np.flatnonzero(out)) == _smallest_set(weights, top_p)
    assert (out[out > 0] == weights[out > 0]).all()


@pytest.mark.parametrize("temperature", [1e-30, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
def test_distribution_is_softmax_and_top_p(temperature: float, top_p: float) -> None:
    logits = np.random.default_rng(0).normal(0, 3, 1024).astype(np.float32)
    with np.errstate(under="ignore"):
        expected = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    expected /= expected.sum()
    order = np.argsort(-expected, kind="stable")
    ranked = expected[order]
    expected[order[ranked.cumsum() - ranked >= top_p]] = 0
    probs, _ = distribution(logits, temperature, top_p)
    np.testing.assert_allclose(probs, expected / expected.sum(), rtol=1e-5, atol=1e-12)


def test_temperature_zero_is_certain() -> None:
    probs, weights = distribution(np.array([1, 3, 3, 2], np.float32), 0.0, 1.0)
    assert probs.tolist() == [0, 1, 0, 0]
    assert draw(weights, 2**64 - 1) == 1


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8).filter(any), st.integers(0, 2**64 - 1))
def test_a_draw_is_the_inverse_of_the_sums(weights: list[int], fraction: int) -> None:
    token = draw(np.array(weights, np.uint64), fraction)
    at = Fraction(fraction, 2**64) * sum(weights)
    assert sum(weights[:token]) <= at < sum(weights[: token + 1])
