"""A step kernel by kernel: how long each takes by the profiler, how often it runs, and the bytes it must move."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trtvlm.model.cache_kind import CacheKind
from trtvlm.model.config import LanguageConfig
from trtvlm.plugins.int4_linear.decode import COLUMNS
from trtvlm.plugins.quantized_checkpoint import Kind
from trtvlm.plugins.step_bytes import CACHE, EMBEDDING, moved_bytes
from trtvlm.runtime.cuda.measure import Launch

PROFILED = 20


def kernel_bytes(
    config: LanguageConfig, lm_head: Kind, rows: int, context: int, kv_cache: CacheKind = "fp16"
) -> dict[str, float]:
    """Bytes of one INT4 step by the kernel that moves them, all its launches together; they add up to the step's."""
    found: dict[str, float] = {}
    # kv_b's key half goes into the query, its value half comes after the attention.
    key, value = config.qk_nope_head_dim, config.v_head_dim
    for name, size in moved_bytes(config, "int4", lm_head, rows, context, kv_cache).items():
        if "kv_b_proj" in name:
            shares = {"absorb": key / (key + value), "combine": value / (key + value)}
        else:
            shares = {_kernel_of(config, name, rows): 1.0}
        for kernel, share in shares.items():
            found[kernel] = found.get(kernel, 0) + share * size
    return found


def _kernel_of(config: LanguageConfig, name: str, rows: int) -> str:
    if name == CACHE:
        return "attend"
    if name == EMBEDDING:
        return "embed"
    layer = re.match(r"transformer\.layers\.(\d+)\.", name)
    if layer is None:
        return "head"
    part, moe = name[layer.end() :], config.is_moe(int(layer[1]))
    if part.startswith("attention.kv_a_layernorm"):
        return "absorb"
    first = part.startswith(("post_layernorm.", "mlp.router.", "mlp.shared_expert.fc.", "mlp.shared_expert.gate."))
    if moe and rows == 1 and (first or part.startswith("attention.dense.")):  # `int4_moe/row.py`
        return "dense_row"
    if not moe or part.startswith(("attention.", "input_layernorm.")):
        return "linear"
    if rows == 1:
        return "experts_row"
    if first:
        return "route"
    if rows <= COLUMNS:  # `int4_moe/rows.cu`
        return "experts_rows"
    return "experts_down" if part.startswith(("mlp.proj.", "mlp.shared_expert.proj.")) else "experts_up"


def profile_kernels(replay: Launch, state: Tensor, states: Tensor) -> dict[str, tuple[float, int]]:
    """Mean microseconds of a launch, and launches a step, of each kernel of a step, over PROFILED replays."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for number in range(PROFILED):
            state.copy_(states[number % len(states)])
            replay()
        torch.cuda.synchronize()
    return {
        event.key: (event.device_time_total / event.count, event.count // PROFILED)
        for event in profiled.key_averages()
        if event.device_time_total > 0 and event.count >= PROFILED and not event.key.startswith("Mem")
    }


def measure_operators(
    replay: Launch,
    state: Tensor,
    states: Tensor,
    bytes_of: dict[str, float],
    profiler: Callable[[Launch, Tensor, Tensor], dict[str, tuple[float, int]]] = profile_kernels,
) -> dict[str, dict[str, Any]]:
    """{kernel: {"us": of one launch, "launches": a step, "bytes": of one launch, where they are counted}}, slowest first."""
    times = profiler(replay, state, states)
    found: dict[str, dict[str, Any]] = {}
    for name, (us, launches) in sorted(times.items(), key=lambda each: -each[1][0] * each[1][1]):
        found[name] = {"us": round(us, 3), "launches": launches}
        if name in bytes_of:
            found[name]["bytes"] = round(bytes_of[name] / launches)
    return found
