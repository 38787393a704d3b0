"""Launches of a step that overlap: each starts while the one before it runs, and waits on the device for what it needs of it.

    turns.begin()                # the launch before this has zeroed turns.counters
    launch_in_turn(turns, kernel(...), grid, block, *arguments)  # ... one after the other, as if in one stream
    turns.end()

Otherwise a kernel would be started, and would ask memory for its weights, only when the one before had ended: a microsecond
or two in which nothing moves. (Programmatic dependent launch does this too, from SM 9.0 on.)

Launches are put into two queues. Launch n starts when n - 2 has ended; counters in memory tell it when n - 1 has
(include/turns.cuh). So no more than two launches are there at once, and only blocks of the later one wait for
the other.

A launch can have blocks that do not count: what they leave is not for n + 1, or n + 1 waits for it in a way of its own.

They could take all the room of a device, and wait for blocks that find none. Therefore launch n overlaps n - 1 only if all of
its blocks find room at once, and some multiprocessor then has room for a block of n - 1 besides, wherever the hardware has put
them (`occupancy.Device.leaves_room`); otherwise it follows n - 1 in the same queue. Blocks of n - 1 wait for nothing any more,
so that they end one after the other, even if those of n came first (blocks that wait for others of their own launch come after
them, and blocks are given out in order). They may: both launches can be waiting for the end of the same one. (All blocks of n,
because a launch's blocks are given out only after all of a launch that came before: Amert et al., GPU scheduling on the NVIDIA
TX2, RTSS 2017.) The rule takes for granted that all kernels divide L1 alike, as those do that `Kernel.overlapping` gives; that
nothing else on the device waits in this way, so that one step runs at a time; and, as occupancy calculators do, that what is
free of a multiprocessor can be given to one block.

Both queues must run at once, or else launches one by one in the order of launching, as under tools that let no two kernels
run together: all that is waited for is there then, since no launch waits for a later one. CUDA graphs do so in practice.

A step that takes turns does so, too, when it is launched before it is captured: its kernels must have been loaded by then, and
are loaded apart from those of steps that take none. From the host, launches come too slowly to overlap much.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from trtvlm.plugins.cuda.launch import Launch
from trtvlm.plugins.cuda.occupancy import Device, Use
from trtvlm.plugins.cuda.occupancy import device as device_of

WORDS = 8
"""int32 of a launch's counters: `TurnCounters` of turns.cuh."""


class Queues(Protocol):
    """Two queues, 0 and 1. What is launched into one runs in order."""

    def begin(self) -> None:
        """Queue 0 is the one that launches went to until now; queue 1 goes on from there."""

    def into(self, queue: int) -> AbstractContextManager[object]:
        """What is launched within goes to this queue."""

    def mark(self, queue: int) -> Any:
        """The end of what is in the queue by now."""

    def follow(self, queue: int, mark: Any) -> None:
        """What comes into the queue next starts after the mark."""


class Streams:
    """Queues of a CUDA device; can be captured."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = device
        self._streams = [torch.cuda.Stream(device), torch.cuda.Stream(device)]

    def begin(self) -> None:
        """As in `Queues`."""
        self._streams[0] = torch.cuda.current_stream(self._device)
        self._streams[1].wait_stream(self._streams[0])

    def into(self, queue: int) -> AbstractContextManager[object]:
        """As in `Queues`."""
        stream: AbstractContextManager[object] = torch.cuda.stream(self._streams[queue])
        return stream

    def mark(self, queue: int) -> torch.cuda.Event:
        """As in `Queues`."""
        event: torch.cuda.Event = self._streams[queue].record_event()
        return event

    def follow(self, queue: int, mark: torch.cuda.Event) -> None:
        """As in `Queues`."""
        self._streams[queue].wait_event(mark)


class Turns:
    """The turns of a step of at most `launches` launches; counters int32 [launches, WORDS].

    room: what the device has. taken, overlapped: launches since `begin`, and how many of them started before the one ahead had
    ended. queues, room: instead of those of the CUDA device `device`.
    """

    def __init__(
        self, launches: int, device: torch.device | str, queues: Queues | None = None, room: Device | None = None
    ) -> None:
        self.counters = torch.zeros(launches, WORDS, dtype=torch.int32, device=device)
        self._queues = queues or Streams(device)
        self.room = room or device_of(self.counters.device.index)
        self.taken, self.overlapped = 0, 0
        self._queue = 0
        self._ahead: tuple[int, Use] | None = None
        self._ended: Any = None

    def begin(self) -> None:
        """From here on launches take turns. The current stream's last launch has zeroed the counters."""
        self._queues.begin()
        self.taken, self.overlapped = 0, 0
        self._queue = 0
        self._ahead, self._ended = None, None

    @contextmanager
    def next(self, blocks: int, use: Use, counted: int) -> Iterator[tuple[Tensor, int, int]]:
        """The next launch goes to its queue if it is made within, and these are the kernel's last arguments.

        counted: how many of its blocks call finish_turn, if a launch follows. ValueError: there are no counters left.
        """
        index = self.taken
        if index >= len(self.counters):
            raise ValueError(f"a step of more than {len(self.counters)} launches")
        before = 0
        if self._ahead is not None and self.room.leaves_room(blocks, use, self._ahead[1]):
            before = self._ahead[0]
            self._queue = 1 - self._queue
            if self._ended is not None:
                self._queues.follow(self._queue, self._ended)
            self._ended = None
        else:
            # The next launch may go to the other queue, but not before the one ahead of this has ended.
            self._ended = self._queues.mark(self._queue) if index else None
        self.taken, self.overlapped = index + 1, self.overlapped + (before > 0)
        self._ahead = counted, use
        with self._queues.into(self._queue):
            yield self.counters, index, before

    def end(self) -> None:
        """What is launched from here on follows all of them."""
        self._queues.follow(0, self._queues.mark(1))


def launch_in_turn(
    turns: Turns | None,
    launch: Launch,
    grid: tuple[int, ...],
    block: int,
    *arguments: Tensor | int | float | None,
    shared: int = 0,
    counted: int | None = None,
    apart: bool = False,
) -> None:
    """Launch a kernel whose last arguments are its turn; in order with everything else where `turns` is None.

    counted: how many of its blocks count themselves, if not all. apart: no two of its blocks shall stand on one
    multiprocessor, where there are no more of them than multiprocessors.
    """
    if turns is None:
        launch(grid, block, *arguments, None, 0, 0, shared=shared)
        return
    launch, blocks = launch.overlapping, math.prod(grid)
    if apart and blocks <= turns.room.count:
        # Two blocks with half of what there is find no room: something is kept of each.
        shared = max(shared, turns.room.multiprocessor.shared // 2)
    with turns.next(blocks, launch.use(block, shared), blocks if counted is None else counted) as turn:
        launch(grid, block, *arguments, *turn, shared=shared)
