"""The order of launches that take turns, and what their kernels are told and wait for."""

from collections.abc import Iterator
from contextlib import contextmanager

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
from trtvlm.plugins.cuda.launch import Launch
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
    """A launch that notes its last arguments; a block fills a multiprocessor if it is large."""

    def __init__(self, queues: RecordedQueues, large: bool) -> None:
        self.queues, self.large = queues, large
        self.told: list[tuple[int, int]] = []

    def __call__(
        self, grid: tuple[int, ...], block: int, *arguments: Tensor | int | float | None, shared: int = 0
    ) -> None:
        index, before = arguments[-2:]
        assert isinstance(index, int)
        assert isinstance(before, int)
        self.told.append((index, before))
        self.queues.launched(index)

    def use(self, block: int, shared: int = 0) -> Use:
        return Use(0, 8 if self.large else 1, 0)

    def overlap(self) -> None:
        pass


ROOM = Device(4, Multiprocessor(0, 8, 0, 8))


def launched(overlapping: list[bool], launches: int = 40) -> tuple[RecordedQueues, Turns, list[int]]:
    """Launch once for each of them, with as many finishing blocks as its place + 10."""
    queues = RecordedQueues()
    turns = Turns(launches, "cpu", queues, ROOM)
    turns.begin()
    before = []
    for place, small in enumerate(overlapping):
        # All multiprocessors are filled, or there is one block that is in nobody's way.
        launch = Recorded(queues, large=not small)
        launch_in_turn(turns, launch, (1, 1) if small else (2, 2), 32, 1.0, finishing=place + 10)
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
    assert before == [0, 10, 0, 12, 13]
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
            assert before[index] == index - 1 + 10
        if not small:
            assert before[index] == 0
            assert index in (0, *(later + 1 for later in ended))
    assert turns.overlapped == sum(overlapping[1:])
    assert queues.ends[0] == {BEFORE, *range(len(overlapping))}


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

// Every block adds what all blocks have made of the launch before.
extern "C" __global__ void __launch_bounds__(64) add_all(const int* in, int* out, int count, TurnCounters* turns, int index,
                                                         int before) {
    const Turn turn = {turns, index, before};
    await_turn(turn);
    int sum = 0;
    for (int i = 0; i < count; ++i) sum += in[i];
    if (threadIdx.x == 63) out[blockIdx.x] = sum % 1000 + blockIdx.x;
    finish_turn(turn);
}
"""


@pytest.fixture(scope="module")
def add_all(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    if compiler() is None:
        pytest.skip("the emulator needs a C++ compiler")
    file = tmp_path_factory.mktemp("turns") / "add_all.cu"
    file.write_text(SOURCE)
    return emulated_kernel(str(file), "add_all", (("WORDS", WORDS),))


def chain(add_all: Launch, turns: Turns | None, blocks: list[int], finishing: int | None = None) -> list[list[int]]:
    """What each launch of so many blocks writes, given what the one ahead wrote."""
    values = [torch.arange(3, dtype=torch.int32)]
    for count in blocks:
        values.append(torch.full((count,), -1, dtype=torch.int32))
        launch_in_turn(turns, add_all, (count,), 64, *values[-2:], len(values[-2]), finishing=finishing)
    return [value.tolist() for value in values]


@pytest.mark.parametrize("order", ORDERS)
def test_kernels_that_take_turns_do_the_same(add_all: Launch, order: str) -> None:
    blocks = [4, 1, 7, 9, 2, 2, 5]
    queues = RecordedQueues()
    turns = Turns(len(blocks), "cpu", queues, Device(4, Multiprocessor(0, 256, 1 << 20, 8)))
    with emulated(Schedule(order)):
        expected = chain(add_all, None, blocks)
        turns.begin()
        assert chain(add_all, turns, blocks) == expected
    # 128 threads each, two on a multiprocessor: nine find no room.
    assert [turns.overlapped, turns.taken] == [5, 7]
    assert turns.counters[:, 0].tolist() == blocks
    assert turns.counters[:, 1:].eq(0).all()


def test_a_kernel_that_waits_for_too_many_blocks_never_ends(add_all: Launch) -> None:
    turns = Turns(3, "cpu", RecordedQueues(), Device(4, Multiprocessor(0, 256, 1 << 20, 8)))
    turns.begin()
    with pytest.raises(EmulationError, match=r"deadlock: .*1 poll"):
        chain(add_all, turns, [2, 3, 2], finishing=3)
    assert turns.counters[:, 0].tolist() == [2, 0, 0]


def test_a_kernel_that_follows_another_waits_for_no_count(add_all: Launch) -> None:
    turns = Turns(3, "cpu", RecordedQueues(), Device(4, Multiprocessor(0, 128, 1 << 20, 8)))
    turns.begin()
    assert chain(add_all, turns, [4, 4, 4], finishing=99) == chain(add_all, None, [4, 4, 4])
    assert turns.overlapped == 0
