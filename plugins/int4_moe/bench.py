"""Times of the decoding kernels of a MoE layer: `python -m trtvlm.plugins.int4_moe.bench [MODEL ...]`, on a CUDA device."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from trtvlm.model.config import LanguageConfig
from trtvlm.model.sizes import SIZES, language_size
from trtvlm.plugins.cuda.tiles import int4_tiles
from trtvlm.plugins.cuda.timing import time_graph
from trtvlm.plugins.int4_linear.decode import COLUMNS, Norm
from trtvlm.plugins.int4_moe import decode
from trtvlm.plugins.int4_moe.layer import DecodeWorkspace, MoEWeights, Tiles, router_tiles
from trtvlm.plugins.int4_moe.reference import Int4MLP, Routing
from trtvlm.plugins.int4_moe.rows import experts_rows

LAYERS = 32  # a launch each; of the smallest model the route alone then reads 85 MB, more than the L2 cache has
EPS = 1e-6


def random_mlp(hidden: int, width: int, experts: int | None, device: torch.device | str, *, scaled: bool) -> Int4MLP:
    """A random MLP, or `experts` of them stacked, whose outputs are about as large as its inputs."""
    lead = () if experts is None else (experts,)

    def codes(rows: int, inputs: int) -> Tensor:
        return torch.randint(-128, 128, (*lead, rows // 2, inputs), dtype=torch.int8, device=device)

    def scales(rows: int, inputs: int) -> Tensor:
        # Codes are 4.6 large, as the root of their mean square goes.
        return torch.rand(*lead, rows, inputs // 64, device=device).add(0.5).div(4.6 * inputs**0.5).half()

    def pre(inputs: int) -> Tensor | None:
        return torch.rand(inputs, device=device).add(0.5).half() if scaled else None

    fc, proj = (2 * width, hidden), (hidden, width)
    return Int4MLP(codes(*fc), scales(*fc), codes(*proj), scales(*proj), pre(hidden), pre(width))


def weights_of(
    config: LanguageConfig, experts: Int4MLP, shared: Int4MLP | None, device: torch.device | str
) -> MoEWeights:
    """The kernels' form of a layer's experts, with a random router (and correction bias, where there is one)."""
    number = config.n_routed_experts or 0
    routing = Routing(
        config.num_experts_per_tok or 1, config.scoring_func, config.norm_topk_prob, config.routed_scaling_factor
    )
    router = torch.randn(number, config.hidden_size, device=device) / config.hidden_size**0.5
    bias = torch.randn(number, device=device) * 0.1 if config.topk_method == "noaux_tc" else None
    beside: tuple[Tiles | None, Tiles | None] = (None, None)
    if shared is not None:
        beside = (
            _tiles(shared.fc, shared.fc_scales, shared.fc_pre),
            _tiles(shared.proj, shared.proj_scales, shared.proj_pre),
        )
    return MoEWeights(
        router_tiles(router), bias, routing, _tiles(experts.fc, experts.fc_scales, experts.fc_pre),
        _tiles(experts.proj, experts.proj_scales, experts.proj_pre), *beside,
    )  # fmt: skip


def _tiles(packed: Tensor, scales: Tensor, pre_quant_scale: Tensor | None) -> Tiles:
    if packed.dim() == 2:
        return Tiles(*int4_tiles(packed, scales), pre_quant_scale)
    # Experts a few at a time: unpacking takes many times their size.
    parts = [int4_tiles(*pair) for pair in zip(packed.split(8), scales.split(8), strict=True)]
    codes, scale = (torch.cat(part) for part in zip(*parts, strict=True))
    return Tiles(codes, scale, pre_quant_scale)


def read_bytes(config: LanguageConfig, chosen: int) -> dict[str, int]:
    """Weights that each launch reads once, in bytes, when the rows choose `chosen` experts between them."""
    hidden, width = config.hidden_size, config.moe_intermediate_size
    matrix = hidden * width // 2 + hidden * width // 64 * 2
    shared = (config.n_shared_experts or 0) * matrix
    router = 4 * hidden * (config.n_routed_experts or 0)
    up, down = 2 * chosen * matrix, chosen * matrix + shared
    return {"route": router + 2 * shared, "experts_up": up, "experts_down": down, "experts_rows": up + down}


def bench(name: str) -> None:
    """Print the times of one size: each kernel is launched once a layer, on rows of its own."""
    config = language_size(name)
    hidden, width = config.hidden_size, config.moe_intermediate_size
    layers = []
    for _ in range(LAYERS):
        experts = random_mlp(hidden, width, config.n_routed_experts, "cuda", scaled=True)
        beside = width * (config.n_shared_experts or 0)
        shared = random_mlp(hidden, beside, None, "cuda", scaled=True) if beside else None
        layers.append(weights_of(config, experts, shared, "cuda"))
    for rows in (1, 4, 8, 16):
        launches: dict[str, list[Callable[[], None]]] = defaultdict(list)
        chosen = 0
        for weights in layers:
            residual = torch.randn(rows, hidden, device="cuda")
            norm = Norm(torch.ones(hidden, device="cuda").half(), residual.square().unflatten(1, (-1, 16)).sum(-1), EPS)
            workspace = DecodeWorkspace.allocate(weights, rows, "cuda")
            # Leaves the logits and the work list. The residual grows with every replay: only the time is asked for.
            out, sums = residual.clone(), norm.square_sums.clone()
            decode.route(residual, norm, weights, workspace, rows)
            decode.experts_up(weights, workspace, rows)
            chosen += int(workspace.work[:, 0].sum())
            launches["layer"].append(
                partial(decode.moe_decode, out, sums, Norm(norm.weight, sums, EPS), weights, workspace, rows)
            )
            launches["route"].append(partial(decode.route, residual, norm, weights, workspace, rows))
            if rows <= COLUMNS:
                launches["experts_rows"].append(partial(experts_rows, out, sums, weights, workspace, rows))
            else:
                launches["experts_up"].append(partial(decode.experts_up, weights, workspace, rows))
                launches["experts_down"].append(partial(decode.experts_down, out, sums, weights, workspace, rows))
        sizes = read_bytes(config, round(chosen / LAYERS))
        sizes["layer"] = sizes["route"] + sizes["experts_rows"]
        for kernel, calls in launches.items():
            time, size = time_graph(calls), sizes[kernel]
            print(f"{name:20} M={rows} {kernel:12} {time:7.2f} us {size / 1e6:7.2f} MB {size / time / 1e3:7.0f} GB/s")


if __name__ == "__main__":
    for model in sys.argv[1:] or SIZES:
        bench(model)
