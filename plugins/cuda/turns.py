"""Launches of a step that overlap: each starts while the one before it runs, and waits on the device for what it needs of it.

    turns.begin()                # the launch before this has zeroed turns.counters
    launch_in_turn(turns, kernel(...), grid, block, *arguments)  # ... one after the other, as if in one stream
    turns.end()

Otherwise a kernel would be started, and would ask memory for its weights, only when the one before had ended: a microsecond
or two in which nothing moves. (Programmatic dependent launch does this too, from SM 9.0 on.)

Launches alternate between two streams, so that launch n starts when n - 2 has ended; counters in memory tell it when n - 1 has
(include/turns.cuh). Both streams must run at once, which only a captured graph is trusted with: a debugger or sanitizer that
runs one launch at a time would wait for ever.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from trtvlm.plugins.cuda.launch import Launch, kernel

SOURCE = "cuda/gate.cu"
WORDS = 16
"""int32 of a launch's counters: `TurnCounters` of turns.cuh."""


class Turns:
    """The turns of a step of at most `launches` launches; counters int32 [launches, WORDS]."""

    def __init__(self, launches: int, device: torch.device | str) -> None:
        self.counters = torch.zeros(launches, WORDS, dtype=torch.int32, device=device)
        self._streams = [torch.cuda.Stream(device), torch.cuda.Stream(device)]
        self._index, self._before = 0, 0

    def begin(self) -> None:
        """From here on launches take turns. The current stream's last launch has zeroed the counters."""
        self._streams[0] = torch.cuda.current_stream(self.counters.device)
        self._streams[1].wait_stream(self._streams[0])
        self._index, self._before = 0, 0

    @contextmanager
    def next(self, finishing: int) -> Iterator[tuple[Tensor, int, int]]:
        """The next launch's stream is the current one within, and these are the kernel's last arguments.

        finishing: blocks of it that call finish_turn.
        """
        index, before = self._index, self._before
        if index >= len(self.counters):
            raise ValueError(f"a step of more than {len(self.counters)} launches")
        self._index, self._before = index + 1, finishing
        with torch.cuda.stream(self._streams[index % 2]):
            if index == 1:
                # The first two become ready together: the second must not take the first one's room.
                kernel(SOURCE, "gate")((1,), 32, self.counters, 0)
            yield self.counters, index, before

    def end(self) -> None:
        """What is launched from here on follows all of them."""
        self._streams[0].wait_stream(self._streams[1])


def launch_in_turn(
    turns: Turns | None,
    launch: Launch,
    grid: tuple[int, ...],
    block: int,
    *arguments: Tensor | int | float | None,
    shared: int = 0,
    finishing: int | None = None,
) -> None:
    """Launch a kernel whose last arguments are its turn; in order with everything else where `turns` is None.

    finishing: blocks that call finish_turn, if not all.
    """
    if turns is None:
        launch(grid, block, *arguments, None, 0, 0, shared=shared)
        return
    with turns.next(math.prod(grid) if finishing is None else finishing) as turn:
        launch(grid, block, *arguments, *turn, shared=shared)
