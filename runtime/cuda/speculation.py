"""Whole speculative steps in one CUDA graph: draft, verification, acceptance and the next inputs, with no host in between.

The host replays a graph and reads the tokens out of pinned memory, one step late: while it looks at a step's tokens, the next
step runs. Without a draft, a step is a decode of one row and the same acceptance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from trtvlm.plugins.sampling import cuda as sampling
from trtvlm.plugins.speculative_accept import cuda as accept
from trtvlm.plugins.speculative_accept.state import (
    DRAFT_DRAW,
    FIRST_DRAW,
    RING_ACCEPTED,
    RING_COUNT,
    RING_DONE,
    RING_HEADER,
    STATE_SIZE,
    Start,
    draft_cursor,
    draft_inputs,
    drafted_token,
    new_ring,
    target_cursor,
    target_inputs,
)
from trtvlm.runtime.speculate import Step

if TYPE_CHECKING:
    from trtvlm.model.cache import KVCache

SPAN = 256
"""Graphs are captured for caches filled up to a multiple of this."""


Candidates = tuple[Tensor, Tensor]


class Program(Protocol):
    """What launches a language model's decode steps: `DecodeProgram`, or compiled engines.

    logits float32 [rows, V]; found: each row's candidates, float32 values and int32 tokens [rows, blocks].
    """

    max_rows: int
    logits: Tensor
    found: Candidates

    def launch(
        self,
        tokens: Tensor,
        cursor: Tensor,
        rows: int,
        span: int,
        chosen_from: Candidates | None = None,
        logits: bool = False,
    ) -> None:
        """As `DecodeProgram.launch`."""
        ...

    def best(self, row: int) -> Candidates:
        """The candidates of one row."""
        ...


class Holder(Protocol):
    """An executor as far as its cache goes."""

    @property
    def cache(self) -> KVCache:
        """What the graphs write."""
        ...

    def filled(self, length: int) -> None:
        """Say that graphs have filled the cache up to `length`."""
        ...


@dataclass(frozen=True)
class _Kind:
    """What a graph was captured for."""

    drafted: int
    span: int
    sampled: bool


class Speculation:
    """Runs requests on a target and perhaps a draft whose caches hold the same prompt. One request at a time."""

    def __init__(self, target: Program, draft: Program | None) -> None:
        self.target, self.draft = target, draft
        device = target.logits.device
        self.state = torch.zeros(STATE_SIZE, dtype=torch.int32, device=device)
        self.ring = new_ring(8192)
        self._vocab = target.logits.shape[1]
        self._graphs: dict[_Kind, torch.cuda.CUDAGraph] = {}
        self._pool: object | None = None
        self._sampling: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def run(self, start: Start, drafted: int, room: int) -> Iterator[Step]:
        """Steps of `drafted` tokens from `start` until its limit or its end of sequence.

        room: positions of the caches. Closing the iterator leaves the device idle. ValueError: more than the target's rows.
        """
        if self.draft is None:
            drafted = 0
        if not 0 <= drafted < self.target.max_rows:
            raise ValueError(f"a step drafts 0 to {self.target.max_rows - 1} tokens, not {drafted}")
        sampled = start.temperature > 0
        self.ring.zero_()
        self.state.copy_(start.state())
        seen, accepted_before = 0, 0
        events: list[torch.cuda.Event] = []
        try:
            while True:
                # Two steps may be on their way beyond what was seen.
                most = start.prompt + seen + 2 * (drafted + 1) + drafted + 1
                self._graph(_Kind(drafted, min(-(-most // SPAN) * SPAN, room), sampled)).replay()
                event = torch.cuda.Event()
                event.record()
                events.append(event)
                if len(events) < 2:
                    continue
                events.pop(0).synchronize()
                # The count is written last and so read last: all that it counts, and whether it is the end, is there.
                accepted, done, count = (int(self.ring[i]) for i in (RING_ACCEPTED, RING_DONE, RING_COUNT))
                if count > seen:
                    capacity = len(self.ring) - RING_HEADER
                    tokens = [int(self.ring[RING_HEADER + n % capacity]) for n in range(seen, count)]
                    step = Step(tokens, drafted, accepted - accepted_before)
                    seen, accepted_before = count, accepted
                    yield step
                if done:
                    return
        finally:
            torch.cuda.synchronize()

    def emitted(self) -> int:
        """Tokens that the last run emitted, all of it done."""
        return int(self.ring[RING_COUNT])

    def step(self, kind_drafted: int, span: int, sampled: bool = False) -> None:
        """Launch one step; what a graph captures."""
        target, draft, state = self.target, self.draft, self.state
        if sampled:
            self._sampled_step(kind_drafted, span)
            return
        chosen = None
        for index in range(kind_drafted):
            assert draft is not None
            rows = 2 if index == 0 else 1
            draft.launch(draft_inputs(state, index), draft_cursor(state, index), rows, span, chosen)
            chosen = draft.best(rows - 1)
        rows = kind_drafted + 1
        target.launch(target_inputs(state, kind_drafted), target_cursor(state), rows, span, chosen)
        found = target.found[0][:rows], target.found[1][:rows]
        accept.accept_greedy(state, self.ring, kind_drafted, candidates=found)

    def _sampled_step(self, drafted: int, span: int) -> None:
        target, draft, state = self.target, self.draft, self.state
        q, p, work, accepting = self._sampling_buffers()
        for index in range(drafted):
            assert draft is not None
            row = 1 if index == 0 else 0
            draft.launch(draft_inputs(state, index), draft_cursor(state, index), row + 1, span, logits=True)
            found = draft.found[0][row : row + 1], draft.found[1][row : row + 1]
            sampling.probabilities(
                draft.logits[row : row + 1], found, state, q[index : index + 1], work, 1,
                token=drafted_token(state, index), which=DRAFT_DRAW + index,
            )  # fmt: skip
        rows = drafted + 1
        target.launch(target_inputs(state, drafted), target_cursor(state), rows, span, logits=True)
        found = target.found[0][:rows], target.found[1][:rows]
        sampling.probabilities(target.logits[:rows], found, state, p, work, rows)
        accept.accept_sampled(state, self.ring, drafted, q if drafted else None, p, accepting)

    def _sampling_buffers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self._sampling is None:
            rows, device = self.target.max_rows, self.state.device
            q, p = (torch.zeros(rows, self._vocab, device=device) for _ in range(2))
            self._sampling = (
                q, p, sampling.workspace(rows, self._vocab, device), accept.workspace(self._vocab, device),
            )  # fmt: skip
        return self._sampling

    def _graph(self, kind: _Kind) -> torch.cuda.CUDAGraph:
        if kind not in self._graphs:
            # A step on its way must have written its tokens before they are kept: the ring is read by the host.
            torch.cuda.synchronize()
            kept, ring = self.state.clone(), self.ring.clone()
            self.step(kind.drafted, kind.span, kind.sampled)  # compiles and allocates what is missing
            torch.cuda.synchronize()
            self.state.copy_(kept)
            self.ring.copy_(ring)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step(kind.drafted, kind.span, kind.sampled)
            self._graphs[kind] = graph
        return self._graphs[kind]


@torch.inference_mode()
def run_steps(
    speculation: Speculation, target: Holder, draft: Holder | None, start: Start, drafted: int
) -> Iterator[Step]:
    """`Speculation.run` of two executors; afterwards their caches hold the prompt and what was emitted."""
    rooms = [executor.cache.max_len for executor in (target, draft) if executor is not None]
    try:
        yield from speculation.run(start, drafted, min(rooms))
    finally:
        held = start.prompt + speculation.emitted()
        target.filled(held)
        if draft is not None:
            # After everything was accepted, the draft has yet to read one token.
            draft.filled(held - 1)


__all__ = ["FIRST_DRAW", "SPAN", "Speculation", "run_steps"]
