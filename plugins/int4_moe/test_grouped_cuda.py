"""Experts over many rows: the plan, what compiles, and the results against float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trtvlm.model.sizes import SIZES, language_size
from trtvlm.plugins.cuda.compiler import ARCHITECTURES, PLUGINS, SHARED_LIMIT, compile_source
from trtvlm.plugins.cuda.launch import defines
from trtvlm.plugins.cuda.tiles import int4_tiles
from trtvlm.plugins.int4_linear.packing import dequantize
from trtvlm.plugins.int4_moe import grouped
from trtvlm.plugins.int4_moe.bench import random_mlp
from trtvlm.plugins.int4_moe.grouped import SHAPE, entry_count, experts, plan_groups, reference_plan
from trtvlm.plugins.int4_moe.reference import Int4MLP

MODELS = (*SIZES, "nano")
REGISTERS = 65536  # of a multiprocessor


def chosen(rows: int, number: int, top_k: int, kind: str, device: str = "cpu") -> Tensor:
    """Experts of each row: any, the same for all, or none of the upper half (empty experts)."""
    scores = torch.rand(rows, number, device=device)
    if kind == "one":
        scores = scores[:1].expand(rows, -1)
    if kind == "half":
        scores = scores[:, : max(top_k, number // 2)]
    return scores.topk(top_k, dim=-1).indices


KINDS = ("any", "one", "half")


@given(st.integers(0, 400), st.sampled_from([(8, 2), (64, 6), (72, 6), (1, 1)]), st.sampled_from(KINDS))
def test_the_plan_has_every_slot_once_with_its_expert(rows: int, sizes: tuple[int, int], kind: str) -> None:
    number, top_k = sizes
    index = chosen(rows, number, top_k, kind)
    plan = plan_groups(index, number)
    assert plan.entries.shape == (entry_count(rows * top_k, number), 4)
    assert sorted(plan.order.tolist()) == list(range(rows * top_k))
    seen: list[int] = []
    for expert, first, count, _ in plan.entries.tolist():
        assert count <= SHAPE.rows
        slots = plan.order[first : first + count]
        assert (index.flatten()[slots.long()] == expert).all()
        seen += range(first, first + count)
    assert seen == list(range(rows * top_k))


def test_the_fullest_plan_fits() -> None:
    # One more than whole blocks for each expert: nothing wastes more.
    number, each = 8, SHAPE.rows + 1
    index = torch.arange(number).repeat_interleave(each).unsqueeze(1)
    assert int((reference_plan(index, number).entries[:, 2] > 0).sum()) == entry_count(index.numel(), number)


# Seconds each: the least shared memory and the most. test_gemm_cuda.py has the same loop on all architectures.
@pytest.mark.parametrize(("arch", "kilobytes"), [("sm_86", 100), ("sm_90", 228)])
@pytest.mark.parametrize("gated", [False, True])
def test_the_products_compile(gated: bool, arch: str, kilobytes: int) -> None:
    stages = SHAPE.stages(kilobytes * 1024)
    macros = dict(SHAPE.macros(stages, 1, gated=gated))
    _, kernels = compile_source((PLUGINS / grouped.SOURCE).read_text(encoding="utf-8"), macros, arch)
    assert kernels["grouped"].spilled == 0
    assert kernels["grouped"].registers * SHAPE.threads * SHAPE.blocks <= REGISTERS
    assert SHAPE.shared(stages) <= SHARED_LIMIT


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("sizes", [(8, 2), (64, 6), (72, 6), (grouped.MAX_EXPERTS, 8)], ids=str)
def test_the_plan_compiles(sizes: tuple[int, int], arch: str) -> None:
    macros = dict(defines(EXPERTS=sizes[0], TOP_K=sizes[1], BLOCK_ROWS=SHAPE.rows))
    _, kernels = compile_source((PLUGINS / grouped.PLAN_SOURCE).read_text(encoding="utf-8"), macros, arch)
    for usage in kernels.values():
        assert usage.spilled == 0
        assert usage.shared <= 48 * 1024
    assert kernels["plan_groups"].registers * 1024 <= REGISTERS


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="int64"):
        plan_groups(torch.zeros(3, 2, dtype=torch.int32), 8)
    with pytest.raises(ValueError, match="1000"):
        plan_groups(torch.zeros(3, 2, dtype=torch.int64), 1000)
    mlp = random_mlp(128, 64, 3, "cpu", scaled=False)
    tiles = (*int4_tiles(mlp.fc, mlp.fc_scales), None, *int4_tiles(mlp.proj, mlp.proj_scales), None)
    index, weight = torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2)
    with pytest.raises(ValueError, match="128 wide"):
        experts(torch.zeros(2, 128).half(), index, weight, *tiles, 128)
    with pytest.raises(ValueError, match="activations"):
        experts(torch.zeros(2, 64).half(), index, weight, *tiles, 64)


def packed_tiles(packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Experts a few at a time: unpacking takes many times their size."""
    parts = [int4_tiles(*pair) for pair in zip(packed.split(8), scales.split(8), strict=True)]
    codes, scale = (torch.cat(part) for part in zip(*parts, strict=True))
    return codes, scale


def float64_experts(x: Tensor, index: Tensor, weight: Tensor, mlp: Int4MLP) -> Tensor:
    assert mlp.fc_pre is not None
    assert mlp.proj_pre is not None
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    x = (x * mlp.fc_pre).double()
    for expert in range(mlp.fc.shape[0]):
        rows, slot = (index == expert).nonzero(as_tuple=True)
        if rows.numel():
            up, gate = (x[rows] @ dequantize(mlp.fc[expert], mlp.fc_scales[expert]).double().t()).chunk(2, dim=-1)
            inner = up * F.silu(gate) * mlp.proj_pre.double()
            result = inner @ dequantize(mlp.proj[expert], mlp.proj_scales[expert]).double().t()
            out.index_add_(0, rows, result * weight[rows, slot].unsqueeze(1).double())
    return out


@pytest.mark.gpu
@pytest.mark.parametrize("model", MODELS)
def test_same_as_float64(model: str) -> None:
    config = language_size(model)
    number, top_k = config.n_routed_experts or 0, config.num_experts_per_tok or 0
    width = config.moe_intermediate_size
    mlp = random_mlp(config.hidden_size, width, number, "cuda", scaled=True)
    tiles = (
        *packed_tiles(mlp.fc, mlp.fc_scales), mlp.fc_pre, *packed_tiles(mlp.proj, mlp.proj_scales), mlp.proj_pre, width,
    )  # fmt: skip
    for rows in (1, 16, 200, 1024):
        for kind in KINDS:
            x = torch.randn(rows, config.hidden_size, device="cuda").half()
            index, weight = chosen(rows, number, top_k, kind, "cuda"), torch.rand(rows, top_k, device="cuda")
            out = experts(x, index, weight, *tiles)
            expected = float64_experts(x, index, weight, mlp)
            assert ((out.double() - expected).norm() / expected.norm()).item() < 2e-3, (rows, kind)
            for row in (0, rows // 2, rows - 1):
                one = slice(row, row + 1)
                assert torch.equal(experts(x[one], index[one], weight[one], *tiles), out[one])


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 33, 1000, 4096])
def test_the_plan_is_the_reference_s(rows: int) -> None:
    for number, top_k in ((8, 2), (64, 6), (72, 6)):
        for kind in KINDS:
            index = chosen(rows, number, top_k, kind)
            found, expected = plan_groups(index.cuda(), number), reference_plan(index, number)
            assert torch.equal(found.order.cpu(), expected.order)
            assert torch.equal(found.entries.cpu(), expected.entries)


@pytest.mark.gpu
def test_a_graph_replays_another_routing() -> None:
    mlp = random_mlp(256, 128, 8, "cuda", scaled=True)
    tiles = (*int4_tiles(mlp.fc, mlp.fc_scales), mlp.fc_pre, *int4_tiles(mlp.proj, mlp.proj_scales), mlp.proj_pre, 128)
    x, weight = torch.randn(300, 256, device="cuda").half(), torch.rand(300, 2, device="cuda")
    index = chosen(300, 8, 2, "any", "cuda")
    experts(x, index, weight, *tiles)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = experts(x, index, weight, *tiles)
    index.copy_(chosen(300, 8, 2, "one"))
    graph.replay()
    assert torch.equal(out, experts(x, index, weight, *tiles))
