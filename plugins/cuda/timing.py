"""Times on the device: launches captured in one CUDA graph, so that no host work is counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch


def time_graph(launches: Sequence[Callable[[], None]], repeats: int = 20, warmup: int = 3) -> float:
    """Median time of one launch in microseconds.

    All of `launches` are captured in one graph, which is replayed `repeats` times. Give as many launches over different
    buffers as it takes to exceed the L2 cache, or what is measured is the cache.
    """
    for launch in launches:  # compile and load before capturing
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    for _ in range(warmup):
        graph.replay()
    times: list[float] = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(launches))
    return median(times)
