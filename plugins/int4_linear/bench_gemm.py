"""Times of INT4 products of many rows: `python -m trtvlm.plugins.int4_linear.bench_gemm [MODEL ...]`, on a CUDA device.

For each layer and each tile shape of gemm.py, then for the experts of a layer under random routing. TFLOP/s count the
products asked for, not those that fill up a tile.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from trtvlm.model.config import LanguageConfig
from trtvlm.model.sizes import SIZES, language_size
from trtvlm.plugins.cuda.timing import time_graph
from trtvlm.plugins.int4_linear.gemm import SHAPES, best_shape, gated_gemm, gemm
from trtvlm.plugins.int4_moe.grouped import experts, plan_groups, product

ROWS = (64, 256, 1024, 4096)
REPEATS = 8  # launches of one graph


def random_tiles(outputs: int, inputs: int, *lead: int) -> tuple[Tensor, Tensor]:
    """A random INT4 weight as its row tiles: any words are codes."""
    shape = (*lead, outputs // 16, inputs // 64)
    codes = torch.randint(-(2**31), 2**31, (*shape, 32, 4), dtype=torch.int32, device="cuda")
    scales = torch.rand(*shape, 8, 2, device="cuda").add_(0.5).div_(4.6 * inputs**0.5).half()
    return codes, scales


def report(model: str, name: str, rows: int, flops: float, time: float) -> None:
    """One line: a time in microseconds and what it makes of the device."""
    rate = f"{flops / time / 1e6:7.1f} TFLOP/s" if flops else ""
    print(f"{model:20} {name:36} M={rows:<5} {time:9.1f} us {rate}", flush=True)


def bench_layers(model: str, config: LanguageConfig) -> None:
    """The dense layers, each shape."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    shared = config.moe_intermediate_size * (config.n_shared_experts or 0)
    layers = {
        "qkv": ((1 if config.use_mla else 3) * heads * config.head_dim, hidden, False),
        "o": (hidden, heads * config.value_head_dim, False),
        "shared fc": (2 * shared, hidden, True),
        "shared proj": (hidden, shared, False),
        "dense fc": (2 * config.intermediate_size, hidden, True),
    }
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    for name, (outputs, inputs, gated) in layers.items():
        codes, scales = random_tiles(outputs, inputs)
        for rows in ROWS:
            x = torch.randn(rows, inputs, device="cuda").half()
            out = torch.empty(rows, outputs // 2 if gated else outputs, dtype=torch.half, device="cuda")
            for shape in SHAPES:
                call: Callable[[], None] = (
                    partial(gated_gemm, x, codes, scales, out, shape=shape)
                    if gated
                    else partial(gemm, x, codes, scales, out, shape=shape)
                )
                chosen = "*" if shape == best_shape(rows, outputs, multiprocessors) else ""
                label = f"{name} {outputs}x{inputs} {shape.outputs}x{shape.rows}{chosen}"
                report(model, label, rows, 2.0 * rows * outputs * inputs, time_graph([call] * REPEATS))


def bench_experts(model: str, config: LanguageConfig) -> None:
    """The routed experts: the plan, both products, and all together."""
    hidden, width = config.hidden_size, config.moe_intermediate_size
    number, top_k = config.n_routed_experts or 0, config.num_experts_per_tok or 0
    fc, proj = random_tiles(2 * width, hidden, number), random_tiles(hidden, width, number)
    for rows in ROWS:
        x = torch.randn(rows, hidden, device="cuda").half()
        index = torch.rand(rows, number, device="cuda").topk(top_k, dim=-1).indices
        weight = torch.rand(rows, top_k, device="cuda")
        inner = torch.empty(rows * top_k, width, dtype=torch.half, device="cuda")
        results = torch.empty(rows * top_k, hidden, dtype=torch.half, device="cuda")
        plan = plan_groups(index, number)
        flops = 2.0 * rows * top_k * hidden * width

        def all_of_it(x: Tensor = x, index: Tensor = index, weight: Tensor = weight) -> None:
            experts(x, index, weight, *fc, None, *proj, None, width)

        def only_plan(index: Tensor = index) -> None:
            plan_groups(index, number)

        calls: dict[str, tuple[Callable[[], None], float]] = {
            "plan": (only_plan, 0.0),
            "experts fc": (partial(product, x, *fc, inner, None, plan, top_k, gated=True), 2 * flops),
            "experts proj": (partial(product, inner, *proj, results, None, plan, top_k, gated=False), flops),
            "experts, whole": (all_of_it, 3 * flops),
        }
        for name, (call, done) in calls.items():
            report(model, f"{name} {number} x {width}", rows, done, time_graph([call] * REPEATS))


if __name__ == "__main__":
    for model in sys.argv[1:] or SIZES:
        bench_layers(model, language_size(model))
        bench_experts(model, language_size(model))
