"""The promise of the project: speculation gives the very tokens that plain decoding gives."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.toy import ToyDecoder, ToyModel, plain_greedy
from trtvlm.runtime.sampling import Sampler
from trtvlm.runtime.speculate import MAX_DRAFT_TOKENS, speculate

PROMPT = (0, 2, 1)


def run(
    target: ToyDecoder, draft: ToyDecoder | None, k: int, max_tokens: int, eos: int | None = None, newest: int = 1
) -> tuple[list[int], list[tuple[int, int, int]]]:
    steps = list(speculate(target, draft, newest, Sampler(), max_tokens=max_tokens, draft_tokens=k, eos=eos))
    return [t for step in steps for t in step.tokens], [(len(s.tokens), s.drafted, s.accepted) for s in steps]


@given(
    vocab=st.integers(2, 9),
    seed=st.integers(0, 999),
    noise=st.sampled_from([0.0, 0.1, 0.4, 1.0, 5.0]),
    k=st.integers(0, MAX_DRAFT_TOKENS),
    max_tokens=st.integers(0, 40),
    draft_room=st.integers(0, 50),
    eos=st.one_of(st.none(), st.integers(0, 8)),
)
@settings(max_examples=400, deadline=None)
def test_greedy_is_plain_greedy(
    vocab: int, seed: int, noise: float, k: int, max_tokens: int, draft_room: int, eos: int | None
) -> None:
    model = ToyModel(vocab, seed)
    target = ToyDecoder(model, PROMPT, max_length=len(PROMPT) + max_tokens)  # a context that is full at the end
    draft = ToyDecoder(ToyModel(vocab, seed, noise), PROMPT, max_length=len(PROMPT) + draft_room)
    tokens, steps = run(target, draft, k, max_tokens, eos)
    assert tokens == plain_greedy(model, PROMPT, 1, max_tokens, eos)
    # What both caches hold is the truth, up to the last step's leftovers.
    everything = [*PROMPT, 1, *tokens]
    kept = len(everything) - 1
    assert target.cache[:kept] == everything[:kept]
    assert draft.cache[: min(kept, draft.length)] == everything[: min(kept, draft.length)]
    for count, drafted, accepted in steps:
        assert accepted <= drafted <= k
        assert count in (accepted, accepted + 1)
    if noise == 0.0 and draft_room >= max_tokens + k:
        assert all(accepted == min(drafted, count) for count, drafted, accepted in steps)


def test_every_acceptance_length_occurs() -> None:
    """The cases above reach every path: a draft that is right often, but not always, on one long run."""
    target = ToyDecoder(ToyModel(8, 5), PROMPT, max_length=800)
    draft = ToyDecoder(ToyModel(8, 5, noise=0.5), PROMPT, max_length=800)
    tokens, steps = run(target, draft, 4, 600)
    assert tokens == plain_greedy(ToyModel(8, 5), PROMPT, 1, 600, None)
    assert {accepted for _, drafted, accepted in steps if drafted == 4} == {0, 1, 2, 3, 4}


def test_a_perfect_draft_needs_one_step_for_every_five_tokens() -> None:
    tokens, steps = run(
        ToyDecoder(ToyModel(50, 1), PROMPT, 103), ToyDecoder(ToyModel(50, 1), PROMPT, 103), k=4, max_tokens=100
    )
    assert len(tokens) == 100
    assert steps == [(5, 4, 4)] * 20


def test_end_inside_an_accepted_run() -> None:
    model = ToyModel(30, 4)
    plain = plain_greedy(model, PROMPT, 1, 8, None)
    eos = plain[2]
    assert eos not in plain[:2]
    tokens, steps = run(ToyDecoder(model, PROMPT), ToyDecoder(model, PROMPT), 7, 20, eos)
    assert tokens == plain[:3]
    assert steps == [(3, 7, 3)]


def test_the_last_tokens_are_not_drafted_for_nothing() -> None:
    model = ToyModel(30, 4)
    _, steps = run(ToyDecoder(model, PROMPT), ToyDecoder(model, PROMPT), 4, 7)
    assert steps == [(5, 4, 4), (2, 1, 1)]
    _, steps = run(ToyDecoder(model, PROMPT), ToyDecoder(model, PROMPT), 4, 1)
    assert steps == [(1, 0, 0)]


def test_without_room_it_refuses() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        run(ToyDecoder(ToyModel(4), PROMPT, max_length=10), None, 4, 8)


def test_sampled_runs_repeat_with_their_seed() -> None:
    def sampled(seed: int) -> list[int]:
        target, draft = ToyDecoder(ToyModel(20, 1), PROMPT), ToyDecoder(ToyModel(20, 1, 0.5), PROMPT)
        steps = speculate(target, draft, 1, Sampler(1.0, 0.9, seed), max_tokens=30)
        return [token for step in steps for token in step.tokens]

    assert sampled(1) == sampled(1) != sampled(2)
