"""How a time is taken on the device: replays back to back, each with inputs of its own, and what they spread over."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Launch = Callable[[], None]
WARMUP = 5


@dataclass(frozen=True)
class Spread:
    """Milliseconds of `replays` replays: the median, and what 95 and 99 of a hundred stay below."""

    p50: float
    p95: float
    p99: float
    replays: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Spread:
        """Percentiles of milliseconds, linear between neighbours. ValueError: nothing was measured."""
        if not times:
            raise ValueError("no times were measured")
        cuts = statistics.quantiles([*times, *times[: len(times) == 1]], n=100, method="inclusive")
        p50, p95, p99 = (round(cuts[percent - 1], 5) for percent in (50, 95, 99))
        return cls(p50, p95, p99, len(times))

    def to_dict(self) -> dict[str, float]:
        """For JSON."""
        return {"p50": self.p50, "p95": self.p95, "p99": self.p99, "replays": self.replays}


class Clock(Protocol):
    """What marks moments on the device."""

    def mark(self) -> Any:
        """A moment, once all that was launched before it is done."""

    def between(self, start: Any, end: Any) -> float:
        """Milliseconds; both moments have passed."""

    def wait(self) -> None:
        """Wait until all that was launched is done."""


class CudaClock:
    """Events on torch's current stream."""

    def mark(self) -> torch.cuda.Event:
        """Record an event."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Milliseconds between two events."""
        milliseconds: float = start.elapsed_time(end)
        return milliseconds

    def wait(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize()


def replay_times(replay: Launch, state: Tensor, states: Tensor, clock: Clock, warmup: int = WARMUP) -> list[float]:
    """Milliseconds of one replay after another, one for each of `states` [n, ...], which is copied into `state` before it.

    The copies are on the device and outside the measured time; the host waits for nothing until the last replay.
    `warmup` replays with the first states come first and are not counted.
    """
    for number in range(warmup):
        state.copy_(states[number % len(states)], non_blocking=True)
        replay()
    clock.wait()
    marks = []
    for inputs in states:
        state.copy_(inputs, non_blocking=True)
        start = clock.mark()
        replay()
        marks.append((start, clock.mark()))
    clock.wait()
    return [clock.between(start, end) for start, end in marks]


def captured(step: Launch) -> Launch:
    """A replay of `step` as one CUDA graph. The step runs once before: what is missing is compiled and allocated then."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def copy_gbps(size: int | None = None, repeats: int = 10) -> float:
    """Bytes read and written a second, in 1e9, by a device-to-device copy of `size` bytes: the median of `repeats`.

    By default 4 GiB, or a quarter of what is free: more than any cache holds.
    """
    size = size or min(1 << 32, torch.cuda.mem_get_info()[0] // 4)
    source = torch.zeros(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    clock, marks = CudaClock(), []
    for _ in range(repeats + 2):
        start = clock.mark()
        target.copy_(source)
        marks.append((start, clock.mark()))
    clock.wait()
    return 2 * size / (statistics.median(clock.between(*pair) for pair in marks[2:]) * 1e6)
