"""Decode steps as they run in an answer: from the tokens' embeddings to their acceptance, in one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from trtvlm.plugins.speculative_accept import cuda as accept
from trtvlm.plugins.speculative_accept.state import (
    INPUTS,
    STATE_SIZE,
    Start,
    new_ring,
    target_cursor,
    target_inputs,
)
from trtvlm.runtime.cuda.measure import Clock, CudaClock, Launch, Spread, captured, replay_times
from trtvlm.runtime.cuda.speculation import SPAN, Speculation

if TYPE_CHECKING:
    from trtvlm.runtime.cuda.decode import Candidates

WIDTHS = (1, 2, 4, 8, 16)
REPLAYS = 500


class Program(Protocol):
    """What is measured of `trtvlm.runtime.cuda.decode.DecodeProgram`."""

    found: Candidates

    def launch(self, tokens: Tensor, cursor: Tensor, rows: int, span: int) -> None:
        """One step."""


@dataclass(frozen=True)
class Bench:
    """How steps are measured: cached positions, replays, and what takes times and graphs (a GPU, unless in a test)."""

    context: int
    replays: int = REPLAYS
    seed: int = 0
    clock: Clock = field(default_factory=CudaClock)
    capture: Callable[[Launch], Launch] = captured

    def span(self, rows: int) -> int:
        """What a step's graph is captured for, as in an answer: the next multiple of SPAN past its rows."""
        return -(-(self.context + 3 * rows) // SPAN) * SPAN

    def states(self, vocab: int, rows: int, device: torch.device | str) -> Tensor:
        """int32 [replays, STATE_SIZE]: one state for each replay, at the same position, with random tokens of its own."""
        draws = torch.randint(vocab, (self.replays, rows + 1), generator=torch.Generator().manual_seed(self.seed))
        start = Start(previous=0, newest=0, prompt=self.context, limit=2**30)
        states = start.state().repeat(self.replays, 1)
        states[:, INPUTS : INPUTS + rows + 1] = draws.int()
        return states.to(device)


class Step:
    """One step of `rows` rows on buffers of its own: what verifies rows - 1 drafted tokens; of one row, plain decoding."""

    def __init__(self, program: Program, rows: int, span: int, device: torch.device | str, pinned: bool = True) -> None:
        self.program, self.rows, self.span = program, rows, span
        self.state = torch.zeros(STATE_SIZE, dtype=torch.int32, device=device)
        self.ring = new_ring(8192, pinned=pinned)

    def __call__(self) -> None:
        """Launch it."""
        rows, state = self.rows, self.state
        self.program.launch(target_inputs(state, rows - 1), target_cursor(state), rows, self.span)
        found = self.program.found[0][:rows], self.program.found[1][:rows]
        accept.accept_greedy(state, self.ring, rows - 1, candidates=found)


def measure_step(step: Launch, state: Tensor, vocab: int, rows: int, bench: Bench) -> tuple[Spread, Launch]:
    """Times of a step that reads `state`, and its replay. Each replay has tokens of its own, at the same position."""
    states = bench.states(vocab, rows, state.device)
    state.copy_(states[0])
    replay = bench.capture(step)
    return Spread.of(replay_times(replay, state, states, bench.clock)), replay


def measure_speculation(speculation: Speculation, drafted: int, bench: Bench) -> tuple[dict[str, Any], Launch]:
    """A whole speculative step: `drafted` passes of the draft, verification, acceptance and the next inputs; and its replay."""
    vocab, span = speculation.target.logits.shape[1], bench.span(drafted + 1)
    spread, replay = measure_step(lambda: speculation.step(drafted, span), speculation.state, vocab, 1, bench)
    return {"drafted": drafted, "ms": spread.to_dict()}, replay
