"""Whether a launch leaves room for the one that it waits for: against every way to place its blocks, and against a device."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtvlm.plugins.cuda.occupancy import Device, Multiprocessor, Use

H200 = Device(132, Multiprocessor(65536, 2048, 228 * 1024, 32))
ADA = Device(46, Multiprocessor(65536, 1536, 100 * 1024, 24))

uses = st.builds(Use, st.integers(0, 5), st.integers(1, 4), st.integers(0, 4))
devices = st.builds(
    Device,
    st.integers(1, 4),
    st.builds(Multiprocessor, st.integers(4, 9), st.integers(4, 8), st.integers(4, 9), st.integers(1, 4)),
)


def test_units_of_a_block() -> None:
    assert Use.of(32, 256, 0) == Use(32 * 256, 256, 1024)
    assert Use.of(33, 256, 1) == Use(40 * 256, 256, 1024 + 128)
    # Nine warps: one of the schedulers has three.
    assert Use.of(64, 288, 48 * 1024) == Use(64 * 384, 384, 49 * 1024)
    assert Use.of(255, 1, 128) == Use(256 * 128, 128, 1024 + 128)


@pytest.mark.parametrize(
    ("device", "blocks", "use", "other", "leaves"),
    [
        (H200, 131, Use.of(128, 512, 0), Use.of(128, 512, 0), True),  # a multiprocessor with none
        (H200, 132, Use.of(128, 512, 0), Use.of(128, 512, 0), False),  # all registers of each
        (H200, 132, Use.of(128, 256, 0), Use.of(128, 256, 0), True),  # half of them
        (H200, 263, Use.of(128, 256, 0), Use.of(128, 256, 0), True),
        (H200, 264, Use.of(128, 256, 0), Use.of(128, 256, 0), False),
        (H200, 132, Use.of(32, 256, 113 * 1024), Use.of(32, 256, 113 * 1024), True),
        (H200, 132, Use.of(32, 256, 113 * 1024 + 1), Use.of(32, 256, 113 * 1024), False),
        (H200, 132 * 7, Use.of(16, 256, 0), Use.of(16, 256, 0), True),
        (H200, 132 * 8, Use.of(16, 256, 0), Use.of(16, 32, 0), False),  # all threads
        (H200, 132 * 31, Use.of(16, 32, 0), Use.of(16, 32, 0), False),  # a warp counts as four
        (H200, 132 * 3 + 1, Use.of(32, 512, 0), Use.of(32, 512, 0), True),
        (H200, 132 * 2 + 1, Use.of(64, 512, 0), Use.of(16, 32, 0), False),  # two fit on each, and one is left over
        (H200, 5, Use.of(32, 128, 228 * 1024), Use.of(32, 128, 0), False),  # fits nowhere
        (ADA, 46, Use.of(32, 512, 0), Use.of(32, 1024, 0), True),
        (ADA, 46, Use.of(32, 640, 0), Use.of(32, 1024, 0), False),
    ],
)
def test_known_cases(device: Device, blocks: int, use: Use, other: Use, leaves: bool) -> None:
    assert device.leaves_room(blocks, use, other) is leaves


def most_that_fit(multiprocessor: Multiprocessor, use: Use) -> int:
    """Counted one by one."""
    count = 0
    while multiprocessor.fits(use):
        multiprocessor, count = multiprocessor.beside(use), count + 1
    return count


@settings(max_examples=300, deadline=None)
@given(devices, st.integers(1, 17), uses, uses)
def test_same_as_all_ways_to_place_the_blocks(device: Device, blocks: int, use: Use, other: Use) -> None:
    most = most_that_fit(device.multiprocessor, use)
    whole = [
        counts for counts in itertools.product(range(most + 1), repeat=device.count) if sum(counts) == blocks
    ]  # fmt: skip
    always = all(any(device.multiprocessor.beside(use, count).fits(other) for count in counts) for counts in whole)
    assert device.leaves_room(blocks, use, other) is (bool(whole) and always)


def ends(device: Device, later: tuple[int, Use], earlier: tuple[int, Use], seed: int, later_first: bool) -> bool:
    """Whether two launches end, of which the later one's blocks stay until all of the earlier one's are through.

    Blocks go to any multiprocessor that has room, those of one launch after all of the other.
    """
    rng = random.Random(seed)
    loads = [[0, 0] for _ in range(device.count)]
    waiting, running, uses = [later[0], earlier[0]], [0, 0], (later[1], earlier[1])
    order = [0, 1] if later_first else [1, 0]
    while waiting[1] or running[1]:
        moves: list[tuple[int, int, int]] = [(1, at, -1) for at, load in enumerate(loads) if load[1]]
        head = next((kind for kind in order if waiting[kind]), None)
        for at, load in enumerate(loads):
            free = device.multiprocessor.beside(uses[0], load[0]).beside(uses[1], load[1])
            if head is not None and free.fits(uses[head]):
                moves.append((head, at, 1))
        if not moves:
            return False
        kind, at, change = rng.choice(moves)
        loads[at][kind] += change
        running[kind] += change
        waiting[kind] -= max(change, 0)
    return True


@settings(max_examples=300, deadline=None)
@given(devices, st.integers(1, 17), uses, st.integers(1, 9), uses, st.integers(0, 99), st.booleans())
def test_launches_end_in_whatever_order_their_blocks_come(
    device: Device, blocks: int, use: Use, ahead: int, other: Use, seed: int, later_first: bool
) -> None:
    if device.multiprocessor.fits(other) and device.leaves_room(blocks, use, other):
        assert ends(device, (blocks, use), (ahead, other), seed, later_first)


def test_a_launch_that_leaves_no_room_may_wait_for_ever() -> None:
    half, small = Use(2, 1, 0), Use(1, 1, 0)
    device = Device(2, Multiprocessor(5, 8, 8, 8))
    assert device.leaves_room(3, half, half)
    assert not device.leaves_room(4, half, half)
    assert not ends(device, (4, half), (1, half), 0, True)
    # Room there is, but blocks that have not found any stand before those of the other launch.
    assert device.leaves_room(4, half, small)
    assert not device.leaves_room(5, half, small)
    assert not ends(device, (5, half), (1, small), 0, True)
    assert ends(device, (5, half), (1, small), 0, False)
