"""Whole answers by steps over the state alone equal plain decoding, with toy models that look at what their caches hold."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trtvlm.plugins.sampling.reference import distribution, draw, random_fraction
from trtvlm.plugins.speculative_accept import state as layout
from trtvlm.plugins.speculative_accept.reference import Ints, greedy_step, sampled_step
from trtvlm.plugins.speculative_accept.state import (
    DONE,
    DRAFT_DRAW,
    EMITTED,
    INPUTS,
    LIMIT,
    MAX_DRAFTED,
    RING_ACCEPTED,
    RING_COUNT,
    RING_DRAFTED,
    RING_HEADER,
    RING_STEPS,
    SEED,
    STEP,
    TARGET_CURSOR,
    TEMPERATURE,
    TOP_P,
    Start,
)

VOCAB = 6


class Toy:
    """A model of which a row is a function of all tokens up to its position, read from a cache by a cursor."""

    def __init__(self, name: str, prompt: list[int], room: int) -> None:
        self.name = name
        self.cache = [*prompt, *[-1] * room]

    def decode(self, tokens: list[int], cursor: int) -> list[np.ndarray]:
        """Logits of each row: at `cursor` and on, as one launch writes and reads them."""
        self.cache[cursor : cursor + len(tokens)] = tokens
        return [self.logits(self.cache[: cursor + row + 1]) for row in range(len(tokens))]

    def logits(self, tokens: list[int]) -> np.ndarray:
        assert -1 not in tokens, "a position was never written"
        words = hashlib.sha256(repr(tokens).encode()).digest()
        own = np.frombuffer(words, np.uint8)[:VOCAB].astype(np.float32) / 64
        if self.name == "draft":  # like the target, but for noise
            noise = np.frombuffer(words, np.uint8)[VOCAB : 2 * VOCAB].astype(np.float32) / 160
            return own + noise
        return own


def _step(state: Ints, ring: Ints, target: Toy, draft: Toy, k: int, greedy: bool) -> None:
    """What one replay does, launch by launch."""
    temperature, top_p = state[[TEMPERATURE, TOP_P]].view(np.float32).tolist()
    seed = int(state[SEED]) % 2**32 | int(state[SEED + 1]) % 2**32 << 32
    q = np.zeros((k, VOCAB), np.float32)
    for i in range(k):
        inputs = state[INPUTS : INPUTS + 2] if i == 0 else state[INPUTS + 1 + i : INPUTS + 2 + i]
        logits = draft.decode(inputs.tolist(), int(state[layout.DRAFT_CURSORS + i]))[-1]
        if greedy:
            state[INPUTS + 2 + i] = logits.argmax()
        else:
            q[i], weights = distribution(logits, temperature, top_p)
            state[INPUTS + 2 + i] = draw(weights, random_fraction(seed, int(state[STEP]), DRAFT_DRAW + i))
    rows = target.decode(state[INPUTS + 1 : INPUTS + 2 + k].tolist(), int(state[TARGET_CURSOR]))
    if greedy:
        greedy_step(state, ring, [int(row.argmax()) for row in rows])
    else:
        p = np.stack([distribution(row, temperature, top_p)[0] for row in rows])
        sampled_step(state, ring, q, p)


def _begin(prompt: list[int], first: int, limit: int, **settings: float) -> tuple[Ints, Ints, Toy, Toy]:
    start = Start(prompt[-1], first, len(prompt), limit, **settings)  # type: ignore[arg-type]
    room = limit + MAX_DRAFTED + 1
    ring = layout.new_ring(max(limit, 1), pinned=False).numpy()
    return start.state().numpy(), ring, Toy("target", prompt, room), Toy("draft", prompt, room)


def _plain(prompt: list[int], first: int, limit: int, eos: int) -> list[int]:
    tokens = [*prompt, first]
    toy = Toy("target", [], 0)
    while len(tokens) < len(prompt) + 1 + limit:
        tokens.append(int(toy.logits(tokens).argmax()))
        if tokens[-1] == eos:
            break
    return tokens[len(prompt) + 1 :]


@given(
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5),
    limit=st.integers(0, 30),
    eos=st.integers(-1, VOCAB - 1),
    widths=st.lists(st.integers(1, 7), min_size=1, max_size=5) | st.just([0]),
)
def test_greedy_steps_are_plain_decoding(prompt: list[int], limit: int, eos: int, widths: list[int]) -> None:
    state, ring, target, draft = _begin(prompt, 3, limit, eos=eos)
    drafted = steps = 0
    while not state[DONE]:
        k = widths[steps % len(widths)]  # graphs of several widths share a state
        _step(state, ring, target, draft, k, greedy=True)
        drafted, steps = drafted + k, steps + 1
        emitted = ring[RING_HEADER : RING_HEADER + ring[RING_COUNT]].tolist()
        # Both cursors stand right behind what the caches hold of the answer.
        assert target.cache[: state[TARGET_CURSOR]] == [*prompt, 3, *emitted][:-1]
        assert state[INPUTS : INPUTS + 2].tolist() == [*prompt, 3, *emitted][-2:]
    expected = _plain(prompt, 3, limit, eos)
    assert ring[RING_HEADER : RING_HEADER + ring[RING_COUNT]].tolist() == expected
    assert (ring[RING_STEPS], ring[RING_DRAFTED]) == (steps, drafted)
    assert ring[RING_ACCEPTED] <= min(drafted, len(expected))

    before, shown = state.copy(), ring.copy()
    _step(state, ring, target, draft, widths[0], greedy=True)
    state[INPUTS + 2 :] = before[INPUTS + 2 :]  # drafted tokens are scratch
    assert (state == before).all()
    assert (ring == shown).all()


@given(st.integers(1, 40), st.integers(1, 7))
def test_a_small_ring_is_written_round(limit: int, k: int) -> None:
    state, _, target, draft = _begin([1, 2], 3, limit)
    ring = layout.new_ring(k + 1, pinned=False).numpy()
    tokens: list[int] = []
    while not state[DONE]:
        _step(state, ring, target, draft, k, greedy=True)
        tokens += [int(ring[RING_HEADER + n % (k + 1)]) for n in range(len(tokens), ring[RING_COUNT])]
    assert tokens == _plain([1, 2], 3, limit, -1)


def test_a_draft_that_agrees_is_accepted_whole() -> None:
    state, ring, target, draft = _begin([1, 2], 3, 21)
    draft.name = "target"
    while not state[DONE]:
        _step(state, ring, target, draft, 4, greedy=True)
    assert ring[[RING_COUNT, RING_STEPS, RING_ACCEPTED]].tolist() == [21, 5, 17]


@given(st.integers(0, 2**64 - 1), st.integers(0, 4))
def test_sampling_certainties_is_greedy(seed: int, k: int) -> None:
    state, ring, target, draft = _begin([1, 2], 3, 12, seed=seed)
    while not state[DONE]:
        _step(state, ring, target, draft, k, greedy=False)
    assert ring[RING_HEADER : RING_HEADER + 12].tolist() == _plain([1, 2], 3, 12, -1)


@pytest.mark.parametrize(("k", "temperature", "top_p"), [(0, 1.0, 1.0), (2, 1.5, 1.0), (1, 1.0, 0.8)])
def test_sampled_tokens_have_the_targets_distribution(k: int, temperature: float, top_p: float) -> None:
    runs = 1500
    counts: Counter[tuple[int, int]] = Counter()
    for seed in range(runs):
        state, ring, target, draft = _begin([1, 2], 3, 2, seed=seed * 2**40, temperature=temperature, top_p=top_p)
        while not state[DONE]:
            _step(state, ring, target, draft, k, greedy=False)
        counts[int(ring[RING_HEADER]), int(ring[RING_HEADER + 1])] += 1
    toy = Toy("target", [], 0)
    first, _ = distribution(toy.logits([1, 2, 3]), temperature, top_p)
    for x in range(VOCAB):
        second, _ = distribution(toy.logits([1, 2, 3, x]), temperature, top_p)
        for y in range(VOCAB):
            expected = float(first[x]) * float(second[y])
            # Five standard deviations; the seeds are fixed, so this passes always or never.
            assert abs(counts[x, y] / runs - expected) <= 5 * (expected * (1 - expected) / runs) ** 0.5


def test_a_start_says_where_everything_stands() -> None:
    state = Start(7, 8, 100, 50, eos=2, seed=2**32 - 1, temperature=0.5, top_p=0.25).state()
    assert state[[EMITTED, LIMIT, SEED, SEED + 1]].tolist() == [0, 50, -1, 0]
    assert state[[TEMPERATURE, TOP_P]].view(torch.float32).tolist() == [0.5, 0.25]
    assert layout.target_cursor(state).tolist() == [100]
    assert layout.draft_cursor(state, 0).tolist() == [99]
    assert layout.draft_cursor(state, 2).tolist() == [102]
    assert layout.draft_inputs(state, 0).tolist() == [7, 8]
    for i in range(3):
        layout.drafted_token(state, i)[0] = 20 + i
    assert layout.draft_inputs(state, 1).tolist() == [20]
    assert layout.target_inputs(state, 3).tolist() == [8, 20, 21, 22]
    with pytest.raises(ValueError, match="prompt"):
        Start(0, 0, 0, 1).state()
