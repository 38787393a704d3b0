"""The order of launches that take turns, and what their kernels are told and wait for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trtvlm.plugins.cuda.emulation.emulator import (
    ORDERS,
    EmulationError,
    Schedule,
    compiler,
    emulated,
    emulated_kernel,
)
from trtvlm.plugins.cuda.launch import Kernel, Launch, _attribute, kernel
from trtvlm.plugins.cuda.occupancy import Device, Multiprocessor, Use
from trtvlm.plugins.cuda.turns import WORDS, Turns, launch_in_turn

BEFORE = -1
"""What was launched before the turns."""


class RecordedQueues:
    """Queues that note for each launch what has ended when it starts."""

    def __init__(self) -> None:
        self.ends: list[set[int]] = [set(), set()]
        self.current, self.began, self.ended = 0, False, False
        self.after: dict[int, set[int]] = {}
        self.where: list[int] = []

    def begin(self) -> None:
        self.ends = [{BEFORE}, {BEFORE}]
        self.current, self.after, self.where = 0, {}, []

    @contextmanager
    def into(self, queue: int) -> Iterator[None]:
        before, self.current = self.current, queue
        yield
        self.current = before

    def mark(self, queue: int) -> set[int]:
        return set(self.ends[queue])

    def follow(self, queue: int, mark: set[int]) -> None:
        self.ends[queue] |= mark

    def launched(self, index: int) -> None:
        """A launch in the current queue: it starts when all has ended that is ahead of it there."""
        self.where.append(self.current)
        self.after[index] = set(self.ends[self.current])
        self.ends[self.current] |= {index}


class Recorded:
    """A kernel that must be launched to overlap others. It notes its last arguments; a large block fills a multiprocessor."""

    def __init__(self, queues: RecordedQueues, large: bool, overlaps: bool = False) -> None:
        self.queues, self.large, self.overlaps = queues, large, overlaps
        self.told: list[tuple[int, int]] = []

    def __call__(
        self, grid: tuple[int, ...], block: int, *arguments: Tensor | int | float | None, shared: int = 0
    ) -> None:
        assert self.overlaps
        index, before = arguments[-2:]
        assert isinstance(index, int)
        assert isinstance(before, int)
        self.told.append((index, before))
        self.queues.launched(index)

    def use(self, block: int, shared: int = 0) -> Use:
        return Use(0, 8 if self.large else 1, 0)

    @property
    def overlapping(self) -> Recorded:
        twin = Recorded(self.queues, self.large, overlaps=True)
        twin.told = self.told
        return twin


MULTIPROCESSORS = 64
"""Of ROOM; a launch of large blocks, one a multiprocessor, fills them."""
ROOM = Device(MULTIPROCESSORS, Multiprocessor(0, 8, 0, 8))


def launched(overlapping: list[bool], launches: int = 40) -> tuple[RecordedQueues, Turns, list[int]]:
    """Launch once for each of them, with its place + 10 blocks, or as many more than there are multiprocessors."""
    queues = RecordedQueues()
    turns = Turns(launches, "cpu", queues, ROOM)
    turns.begin()
    before = []
    for place, small in enumerate(overlapping):
        # All multiprocessors are filled, or there are few blocks, which are in nobody's way.
        launch = Recorded(queues, large=not small)
        launch_in_turn(turns, launch, (1, place + 10 if small else MULTIPROCESSORS + place + 10), 32, 1.0)
        ((index, told),) = launch.told
        assert index == place
        before.append(told)
    turns.end()
    return queues, turns, before


def test_all_overlap() -> None:
    queues, turns, before = launched([True] * 5)
    assert queues.where == [0, 1, 0, 1, 0]
    assert before == [0, 10, 11, 12, 13]
    assert (turns.taken, turns.overlapped) == (5, 4)
    # Each knows nothing of the one ahead.
    assert queues.after == {0: {-1}, 1: {-1}, 2: {-1, 0}, 3: {-1, 1}, 4: {-1, 0, 2}}


def test_none_overlaps() -> None:
    queues, turns, before = launched([False] * 5)
    assert queues.where == [0] * 5
    assert before == [0] * 5
    assert (turns.taken, turns.overlapped) == (5, 0)
    assert queues.after[4] == {-1, 0, 1, 2, 3}


def test_one_in_order_among_others() -> None:
    queues, _, before = launched([True, True, False, True, True])
    assert queues.where == [0, 1, 1, 0, 1]
    # The third has seen the second end; the fourth waits for the third, and starts when the second has ended.
    assert before == [0, 10, 0, MULTIPROCESSORS + 12, 13]
    assert queues.after[3] == {-1, 0, 1}
    assert queues.after[4] == {-1, 1, 2}


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_the_order_that_kernels_rely_on(overlapping: list[bool]) -> None:
    queues, turns, before = launched(overlapping)
    for index, small in enumerate(overlapping):
        ended = queues.after[index]
        assert BEFORE in ended
        if index > 1 and small:
            assert index - 2 in ended
        if index and small:
            assert index - 1 not in ended
            assert before[index] == index - 1 + 10 + (0 if overlapping[index - 1] else MULTIPROCESSORS)
        if not small:
            assert before[index] == 0
            assert index in (0, *(later + 1 for later in ended))
    assert turns.overlapped == sum(overlapping[1:])
    assert queues.ends[0] == {BEFORE, *range(len(overlapping))}


class Sized(Recorded):
    """A kernel that takes shared memory, and notes how much."""

    def __call__(
        self, grid: tuple[int, ...], block: int, *arguments: Tensor | int | float | None, shared: int = 0
    ) -> None:
        super().__call__(grid, block, *arguments, shared=shared)
        self.told.append((shared, 0))

    def use(self, block: int, shared: int = 0) -> Use:
        return Use.of(0, block, shared)

    @property
    def overlapping(self) -> Sized:
        twin = Sized(self.queues, self.large, overlaps=True)
        twin.told = self.told
        return twin


@given(st.integers(1, 200), st.integers(0, 99 << 10), st.sampled_from([100, 164, 228]))
def test_blocks_that_stand_apart(blocks: int, shared: int, kilobytes: int) -> None:
    room = Multiprocessor(0, 2048, kilobytes << 10, 32)
    launch = Sized(RecordedQueues(), large=False)
    turns = Turns(1, "cpu", launch.queues, Device(MULTIPROCESSORS, room))
    launch_in_turn(turns, launch, (blocks,), 32, shared=shared, apart=True)
    given_shared = launch.told[-1][0]
    if blocks > MULTIPROCESSORS:
        assert given_shared == shared
    else:
        assert given_shared >= shared
        assert room.fits(launch.use(32, given_shared)) == room.fits(launch.use(32, shared))
        assert not room.beside(launch.use(32, given_shared)).fits(launch.use(32, given_shared))


def test_a_step_begins_anew() -> None:
    queues = RecordedQueues()
    turns = Turns(4, "cpu", queues, ROOM)
    for _ in range(3):
        turns.begin()
        launches = [Recorded(queues, large=False) for _ in range(4)]
        for launch in launches:
            launch_in_turn(turns, launch, (3, 2), 32)
        turns.end()
        assert [launch.told for launch in launches] == [[(0, 0)], [(1, 6)], [(2, 6)], [(3, 6)]]
        assert queues.where == [0, 1, 0, 1]


def test_more_launches_than_counters() -> None:
    with pytest.raises(ValueError, match="more than 3 launches"):
        launched([True] * 4, launches=3)


# ---- kernels, on the emulator ------------------------------------------------------------------------------------------

SOURCE = """
#include "turns.cuh"
static_assert(sizeof(TurnCounters) == 4 * WORDS, "as the host makes them");

// Every block adds what all blocks have made of the launch before; the first SILENT do not say that they have finished.
extern "C" __global__ void __launch_bounds__(64) add_all(const int* in, int* out, int count, TurnCounters* turns, int index,
                                                         int before) {
    const Turn turn = {turns, index, before};
    await_turn(turn);
    int sum = 0;
    for (int i = 0; i < count; ++i) sum += in[i];
    if (threadIdx.x == 63) out[blockIdx.x] = sum % 1000 + blockIdx.x;
    if (blockIdx.x >= SILENT) finish_turn(turn);
}
"""


def made(make: Callable[..., Launch], folder: Path, silent: int = 0) -> Launch:
    """The kernel above by `make`, which is `kernel` or `emulated_kernel`."""
    file = folder / "add_all.cu"
    file.write_text(SOURCE)
    return make(str(file), "add_all", (("SILENT", silent), ("WORDS", WORDS)))


def emulated_add_all(folder: Path, silent: int = 0) -> Launch:
    """The same for the CPU."""
    if compiler() is None:
        pytest.skip("the emulator needs a C++ compiler")
    return made(emulated_kernel, folder, silent)


def chain(
    add_all: Launch, turns: Turns | None, blocks: list[int], device: str = "cpu", uncounted: int = 0
) -> list[list[int]]:
    """What each launch of so many blocks writes, given what the one ahead wrote."""
    values = [torch.arange(3, dtype=torch.int32, device=device)]
    values += [torch.full((count,), -1, dtype=torch.int32, device=device) for count in blocks]
    if turns is not None:
        turns.begin()
    for before, after in pairwise(values):
        launch_in_turn(turns, add_all, (len(after),), 64, before, after, len(before), counted=len(after) - uncounted)
    if turns is not None:
        turns.end()
    return [value.tolist() for value in values]


@pytest.mark.parametrize("order", ORDERS)
def test_kernels_that_take_turns_do_the_same(tmp_path: Path, order: str) -> None:
    add_all = emulated_add_all(tmp_path)
    blocks = [4, 1, 7, 9, 2, 2, 5]
    turns = Turns(len(blocks), "cpu", RecordedQueues(), Device(4, Multiprocessor(0, 256, 1 << 20, 8)))
    with emulated(Schedule(order)):
        expected = chain(add_all, None, blocks)
        assert chain(add_all, turns, blocks) == expected
    # 128 threads each, two on a multiprocessor: nine find no room.
    assert [turns.overlapped, turns.taken] == [5, 7]
    assert turns.counters[:, 0].tolist() == blocks
    assert turns.counters[:, 1:].eq(0).all()


def test_a_kernel_that_waits_for_a_silent_block_never_ends(tmp_path: Path) -> None:
    turns = Turns(3, "cpu", RecordedQueues(), Device(4, Multiprocessor(0, 256, 1 << 20, 8)))
    with pytest.raises(EmulationError, match=r"deadlock: .*1 poll"):
        chain(emulated_add_all(tmp_path, silent=1), turns, [3, 3, 2])
    assert turns.counters[:, 0].tolist() == [2, 0, 0]


def test_a_kernel_waits_for_the_blocks_that_count(tmp_path: Path) -> None:
    turns = Turns(3, "cpu", RecordedQueues(), Device(4, Multiprocessor(0, 256, 1 << 20, 8)))
    add_all = emulated_add_all(tmp_path, silent=1)
    assert chain(add_all, turns, [3, 3, 2], uncounted=1) == chain(add_all, None, [3, 3, 2])
    assert turns.overlapped == 2
    assert turns.counters[:, 0].tolist() == [2, 2, 1]


def test_a_kernel_that_follows_another_waits_for_no_block(tmp_path: Path) -> None:
    turns = Turns(3, "cpu", RecordedQueues(), Device(4, Multiprocessor(0, 128, 1 << 20, 8)))
    add_all = emulated_add_all(tmp_path, silent=1)
    assert chain(add_all, turns, [4, 4, 4]) == chain(add_all, None, [4, 4, 4])
    assert turns.overlapped == 0


@pytest.mark.gpu
def test_only_kernels_that_overlap_divide_l1_alike(tmp_path: Path) -> None:
    add_all = made(kernel, tmp_path)
    assert isinstance(add_all, Kernel)
    blocks = [4, 1, 7, 9, 2, 2, 5]
    expected = chain(add_all, None, blocks, "cuda")
    # Launched before anything is captured; the multiprocessors of every GPU have room for so few blocks.
    turns = Turns(len(blocks), "cuda")
    assert chain(add_all, turns, blocks, "cuda") == expected
    assert [turns.overlapped, turns.taken] == [6, 7]
    carveouts = [_attribute(one._kernel, "PREFERRED_SHARED_MEMORY_CARVEOUT") for one in (add_all, add_all.overlapping)]
    assert carveouts[0] != 100
    assert carveouts[1] == 100
    assert add_all.use(64) == add_all.overlapping.use(64)
    assert add_all.overlapping is add_all.overlapping
