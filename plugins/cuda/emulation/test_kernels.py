"""Every kernel on a CPU, at the bundled models' sizes, against its definition; and rows that do not depend on each other.

The tests that a GPU runs are called here as they are, with DEVICE moved and fewer cases.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from _pytest.mark import ParameterSet
from torch import Tensor

from trtvlm.model.rope import rope_table
from trtvlm.model.sizes import language_size
from trtvlm.plugins.cuda import launch
from trtvlm.plugins.cuda.emulation.emulator import ORDERS, Schedule, compiler, emulated
from trtvlm.plugins.cuda.occupancy import Device, Multiprocessor
from trtvlm.plugins.cuda.tiles import half_tiles, int4_tiles
from trtvlm.plugins.cuda.turns import Turns
from trtvlm.plugins.embedding import test_embedding_cuda as embedding
from trtvlm.plugins.fused_add_rms_norm import test_fused_add_rms_norm_cuda as fused_add_rms_norm
from trtvlm.plugins.gqa_attention import test_gqa_attention_cuda as gqa
from trtvlm.plugins.int4_linear import decode, gemm
from trtvlm.plugins.int4_linear.decode import LinearWeight, Norm
from trtvlm.plugins.int4_linear.packing import dequantize
from trtvlm.plugins.int4_moe import grouped
from trtvlm.plugins.int4_moe import test_int4_moe_cuda as moe
from trtvlm.plugins.int4_moe.bench import random_mlp
from trtvlm.plugins.int4_moe.reference import Routing
from trtvlm.plugins.int4_moe.test_grouped_cuda import KINDS, chosen, float64_experts
from trtvlm.plugins.int8_linear.decode import HeadWeight, candidates, head
from trtvlm.plugins.mla_attention import test_mla_attention_cuda as mla
from trtvlm.plugins.prefill import cuda as prefill
from trtvlm.plugins.prefill import reference as prefill_reference
from trtvlm.plugins.sampling import test_sampling_cuda as sampling
from trtvlm.plugins.speculative_accept import test_speculative_accept_cuda as speculative_accept

pytestmark = pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++ compiler")

EPS = 1e-6
H200 = 132, 228 * 1024


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (embedding, fused_add_rms_norm, gqa, moe, mla, sampling, speculative_accept):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    for function in (gqa.make, gqa.launch):
        monkeypatch.setattr(function, "__defaults__", ("cpu",))
    for module in (gqa, mla):
        monkeypatch.setattr(module, "POSITIONS", 128)
    monkeypatch.setattr(gemm, "_device", lambda _: H200)


@pytest.fixture(params=ORDERS)
def in_any_order(request: pytest.FixtureRequest) -> Iterator[None]:
    with emulated(Schedule(request.param)):
        yield


@pytest.fixture
def in_random_order() -> Iterator[None]:
    with emulated(Schedule("shuffled")):
        yield


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def packed(outputs: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """An INT4 weight as tiles (codes, scales), and as float64 [outputs, inputs]."""
    one = random_mlp(inputs, 64, None, "cpu", scaled=False)
    codes = torch.randint(-128, 128, (outputs // 2, inputs), dtype=torch.int8)
    scales = one.fc_scales.flatten()[0] * torch.rand(outputs, inputs // 64).add(0.5).half()
    return *int4_tiles(codes, scales), dequantize(codes, scales).double()


def normalised(residual: Tensor, weight: Tensor) -> Tensor:
    x = residual.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.double()


def sums_of_16(residual: Tensor) -> Tensor:
    sums: Tensor = residual.square().unflatten(-1, (-1, 16)).sum(-1)
    return sums


# ---- linear layers -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_any_order")
@pytest.mark.parametrize(("inputs", "outputs"), [(256, 96), (2560, 32)])
def test_linear_of_both_kinds_after_a_norm(inputs: int, outputs: int) -> None:
    # Long rows become fixed point.
    torch.manual_seed(0)
    codes, scales, weight = packed(outputs, inputs)
    halves = torch.randn(48, inputs).half()
    pre, norm_weight = torch.rand(inputs).add(0.5).half(), torch.rand(inputs).add(0.5).half()
    both = LinearWeight(codes, scales, pre, half_tiles(halves))
    residual = torch.randn(9, inputs)
    alone: list[Tensor] = []
    for first, rows in (*((row, 1) for row in range(9)), (0, 2), (0, 3), (0, 5), (0, 8), (0, 9)):
        x = residual[first : first + rows].clone()
        out, half_out = torch.full((rows, outputs), torch.nan).half(), torch.full((rows, 48), torch.nan).half()
        decode.linear(x, both, out, rows, Norm(norm_weight, sums_of_16(x), EPS), half_out)
        wide = normalised(x, norm_weight)
        assert error(out, wide * pre.double() @ weight.t()) < 2e-3
        assert error(half_out, wide @ halves.double().t()) < 2e-3
        if len(alone) < 9:
            alone.append(torch.cat([out, half_out], -1))
        else:
            assert torch.equal(torch.cat([out, half_out], -1), torch.cat(alone[:rows]))


@pytest.mark.usefixtures("in_random_order")
def test_linear_that_adds_with_the_inputs_of_a_real_model() -> None:
    torch.manual_seed(0)
    inputs = language_size("deepseek-vl2").hidden_size
    codes, scales, weight = packed(32, inputs)
    x, residual = torch.randn(9, inputs).half(), torch.randn(9, 32)
    sums, added = torch.full((9, 2), torch.nan), residual.clone()
    decode.add_linear(x, LinearWeight(codes, scales), added, sums, 9)
    assert error(added - residual, x.double() @ weight.t()) < 1e-3
    torch.testing.assert_close(sums, sums_of_16(added), rtol=1e-5, atol=0)


@pytest.mark.usefixtures("in_random_order")
@pytest.mark.parametrize("inputs", [192, 2560])
def test_linear_that_gates(inputs: int) -> None:
    torch.manual_seed(0)
    codes, scales, weight = packed(128, inputs)
    both, after = LinearWeight(codes, scales), torch.rand(64).add(0.5).half()
    residual, norm_weight = torch.randn(9, inputs), torch.rand(inputs).add(0.5).half()
    x = residual.half()
    norm = Norm(norm_weight, sums_of_16(residual), EPS)
    for source, wide, of in ((x, x.double(), None), (residual, normalised(residual, norm_weight), norm)):
        gated, alone = torch.full((9, 64), torch.nan).half(), torch.full((1, 64), torch.nan).half()
        decode.gated_linear(source, both, gated, 9, of, after)
        up, gate = (wide @ weight.t()).chunk(2, -1)
        assert error(gated, up * F.silu(gate) * after.double()) < 2e-3
        decode.gated_linear(source[:1], both, alone, 1, of and Norm(norm_weight, norm.square_sums[:1], EPS), after)
        assert torch.equal(alone[0], gated[0])


def slow(*values: object) -> list[ParameterSet]:
    """Cases of a test for which a kernel has to be compiled anew."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.usefixtures("in_random_order")
@pytest.mark.parametrize("kind", ["int8", *slow("fp16", "int4")])
def test_head(kind: str) -> None:
    vocab, hidden = 1024, 128
    codes, scales, weight = torch.empty(0), None, torch.empty(0)
    if kind == "fp16":
        codes = torch.randn(vocab, hidden).half()
        weight = codes.double()
    elif kind == "int8":
        codes, scales = torch.randint(-127, 128, (vocab, hidden), dtype=torch.int8), torch.rand(vocab).half().float()
        weight = codes.double() * scales.double().unsqueeze(1)
    else:
        codes = torch.randint(-128, 128, (vocab // 2, hidden), dtype=torch.int8)
        scales = torch.rand(vocab, hidden // 64).half()
        weight = dequantize(codes, scales).double()
    packed_head = HeadWeight.pack(kind, codes, scales)
    norm_weight, residual = torch.rand(hidden).add(0.5).half(), torch.randn(9, hidden)
    norm = Norm(norm_weight, sums_of_16(residual), EPS)
    logits = torch.full((9, vocab), torch.nan)
    values, tokens = candidates(vocab, 9, "cpu")
    head(residual, norm, packed_head, (values, tokens), 9, logits)
    assert error(logits, normalised(residual, norm_weight) @ weight.t()) < 2e-3
    best = values.argmax(-1, keepdim=True)
    assert torch.equal(tokens.gather(1, best).squeeze(1).long(), logits.argmax(-1))
    alone = torch.full((1, vocab), torch.nan)
    head(residual[8:], Norm(norm_weight, norm.square_sums[8:], EPS), packed_head, candidates(vocab, 1, "cpu"), 1, alone)
    assert torch.equal(alone[0], logits[8])


@pytest.mark.usefixtures("in_any_order")
@pytest.mark.parametrize("shape", [*slow(*gemm.SHAPES[:2]), gemm.SHAPES[2]], ids=str)
def test_products_of_many_rows(shape: gemm.Shape) -> None:
    torch.manual_seed(0)
    # Five groups: the last one is in the first of four stages, where the finished tile goes.
    codes, scales, weight = packed(96, 320)
    x, pre = torch.randn(37, 320).half(), torch.rand(320).add(0.5).half()
    out, row = torch.full((37, 96), torch.nan).half(), torch.full((1, 96), torch.nan).half()
    gemm.gemm(x, codes, scales, out, pre, shape)
    assert error(out, (x * pre).double() @ weight.t()) < 2e-3
    gemm.gemm(x[20:21], codes, scales, row, pre, shape)
    assert torch.equal(row[0], out[20])


# ---- experts -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_any_order")
def test_experts() -> None:
    moe.test_same_as_the_definition("nano")


@pytest.mark.usefixtures("in_random_order")
def test_experts_of_a_row_do_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "ROWS", (*range(1, 9), 9))
    moe.test_a_row_does_not_depend_on_the_others("nano")


class OneQueue:
    """Launches one after the other."""

    def begin(self) -> None: ...

    def into(self, queue: int) -> AbstractContextManager[object]:
        return nullcontext()

    def mark(self, queue: int) -> None: ...

    def follow(self, queue: int, mark: None) -> None: ...


@pytest.mark.usefixtures("in_random_order")
@pytest.mark.parametrize("multiprocessors", [None, 12, 18, 40])
def test_a_row_alone_after_attention(multiprocessors: int | None) -> None:
    # Of 16 tiles a block has one or two; of the shared expert's parts some or none are left to blocks that had tiles.
    turns = None
    if multiprocessors:
        room = Device(multiprocessors, Multiprocessor(1 << 16, 2048, 228 << 10, 32))
        turns = Turns(64, "cpu", OneQueue(), room)
        turns.begin()
    moe.assert_same_alone(moe.make(language_size("nano")), 3, turns)
    assert turns is None or turns.overlapped == turns.taken - 1


@pytest.mark.parametrize("resident", [1, 16])
def test_a_row_alone_waits_for_blocks_before_it_only(resident: int) -> None:
    with emulated(Schedule(resident=resident)):
        moe.assert_same_alone(moe.make(language_size("nano-draft")), 1)


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("model", ["nano", "nano-draft"])
def test_experts_wait_for_blocks_before_them_only(model: str, rows: int) -> None:
    # However little room there is: blocks are given out in order.
    layer = moe.make(language_size(model))
    residual = moe.residuals(layer, rows)
    with emulated(Schedule(resident=1)):
        out, _ = layer.run(residual, rows)
    moe.assert_close(out, residual, layer.expected(residual))


@pytest.mark.usefixtures("in_random_order")
def test_experts_chosen_by_all_and_experts_chosen_by_index() -> None:
    moe.test_all_rows_to_the_same_experts("nano")
    moe.test_of_equals_the_lower_index_is_chosen("nano")


@pytest.mark.slow
@pytest.mark.usefixtures("in_random_order")
@pytest.mark.parametrize(("shared", "scaled"), [(False, True), (True, False), (False, False)])
def test_experts_without_a_shared_one_or_pre_quant_scales(shared: bool, scaled: bool) -> None:
    moe.test_without_a_shared_expert_or_pre_quant_scales("nano", shared, scaled)
    moe.test_a_row_alone_without_a_shared_expert_or_pre_quant_scales("nano", shared, scaled)


@pytest.mark.usefixtures("in_random_order")
@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_of_many_rows(kind: str) -> None:
    for rows in (1, 33, 200):
        index = chosen(rows, 8, 2, kind)
        expected = grouped.reference_plan(index, 8)
        order, entries = torch.full_like(expected.order, -1), torch.full_like(expected.entries, -1)
        macros = launch.defines(EXPERTS=8, TOP_K=2, BLOCK_ROWS=grouped.SHAPE.rows)
        plan = launch.kernel(grouped.PLAN_SOURCE, "plan_groups", macros)
        plan((1,), 1024, index, order, entries, index.numel(), len(entries))
        assert torch.equal(order, expected.order)
        assert torch.equal(entries, expected.entries)


@pytest.mark.usefixtures("in_any_order")
def test_experts_of_many_rows() -> None:
    torch.manual_seed(0)
    mlp = random_mlp(128, 64, 8, "cpu", scaled=True)
    tiles = (*int4_tiles(mlp.fc, mlp.fc_scales), mlp.fc_pre, *int4_tiles(mlp.proj, mlp.proj_scales), mlp.proj_pre, 64)
    x, index, weight = torch.randn(19, 128).half(), chosen(19, 8, 2, "half"), torch.rand(19, 2)
    out = grouped.experts(x, index, weight, *tiles)
    assert error(out, float64_experts(x, index, weight, mlp)) < 2e-3
    assert torch.equal(grouped.experts(x[7:8], index[7:8], weight[7:8], *tiles)[0], out[7])


# ---- attention ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_any_order")
@pytest.mark.parametrize(
    ("cursor", "rows", "coded"), [(0, 1, False), (25, 9, False), (112, 16, False), (0, 1, True), (25, 9, True)]
)
def test_mla_attention(cursor: int, rows: int, coded: bool) -> None:
    mla.test_same_as_the_reference_and_as_a_row_alone(rows, cursor, mla.SIZES["nano"], coded)


@pytest.mark.slow
@pytest.mark.usefixtures("in_random_order")
@pytest.mark.parametrize("coded", [False, True])
def test_mla_attention_of_a_real_model(coded: bool) -> None:
    mla.test_same_as_the_reference_and_as_a_row_alone(2, 40, mla.SIZES["small"], coded)


@pytest.mark.usefixtures("in_any_order")
@pytest.mark.parametrize(("cursor", "rows"), [(0, 1), (56, 16), (60, 5)])
def test_gqa_attention(cursor: int, rows: int) -> None:
    gqa.test_same_as_the_reference_and_as_a_row_alone(rows, cursor, gqa.SIZES["nano-draft"])


@pytest.mark.slow
@pytest.mark.usefixtures("in_random_order")
def test_gqa_attention_of_shared_keys() -> None:
    gqa.test_same_as_the_reference_and_as_a_row_alone(3, 62, gqa.SIZES["odd"])


# ---- the rest of a step ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_any_order")
@pytest.mark.parametrize("chosen_first", [False, True])
def test_embedding(chosen_first: bool) -> None:
    embedding.test_same_as_the_reference(256, 9, chosen_first)


@pytest.mark.usefixtures("in_random_order")
@pytest.mark.parametrize("dtype", [torch.bfloat16, *slow(torch.float16, torch.float32)], ids=str)
def test_fused_add_rms_norm(dtype: torch.dtype) -> None:
    fused_add_rms_norm.test_same_as_the_reference((3, 256), dtype)


@pytest.mark.parametrize("order", ORDERS)
def test_sampling(order: str) -> None:
    # Three blocks a row, of which the last to finish does the rest.
    with emulated(Schedule(order, together=True)):
        sampling.test_equal_tokens_on_the_border_and_exact_draws()


@pytest.mark.slow
@pytest.mark.usefixtures("in_random_order")
def test_sampling_of_any_logits() -> None:
    sampling.test_same_as_the_reference(1024)


@pytest.mark.usefixtures("in_random_order")
def test_accepting() -> None:
    speculative_accept.test_choose(5)
    speculative_accept.test_greedy_steps_move_the_state_as_the_reference(4, False)
    speculative_accept.test_sampled_steps_move_the_state_as_the_reference(4, 1024)


# ---- what stands between a prompt's products ---------------------------------------------------------------------------


def near_one(width: int) -> Tensor:
    return torch.rand(width).add(0.5).half()


@pytest.mark.usefixtures("in_any_order")
def test_attention_of_a_prompt() -> None:
    q, values = torch.randn(70, 2, 64).half(), torch.randn(100, 2, 32).half()
    keys, shared = torch.randn(2, 100, 64).half().transpose(0, 1)[..., :32], torch.randn(100, 32).half()
    cursor, scale = torch.tensor([30], dtype=torch.int32), near_one(64)
    out = prefill.attend(q, keys, shared, values, cursor, scale)
    assert error(out, prefill_reference.attend(q, keys, shared, values, cursor, scale)) < 2e-3
    cursor[0] = 66
    assert torch.equal(prefill.attend(q[36:37], keys[:67], shared[:67], values[:67], cursor, scale)[0], out[36])


@pytest.mark.slow
@pytest.mark.usefixtures("in_random_order")
def test_norms_routing_and_appending_of_a_prompt() -> None:
    torch.manual_seed(0)
    residual, weight, scale = torch.randn(11, 256), near_one(256), near_one(256)
    floats, halves = torch.randn(11, 256), torch.randn(11, 256).half()
    runs = [
        module.add_norm(residual.clone(), floats, halves, weight, EPS, (scale, None))
        for module in (prefill, prefill_reference)
    ]
    assert all(error(*pair) < 1e-3 for pair in zip(*runs, strict=True))
    router = torch.randn(8, 256) / 16
    routed = [module.route(residual, weight, EPS, router, None, Routing(2)) for module in (prefill, prefill_reference)]
    assert torch.equal(routed[0][0], routed[1][0])
    assert error(routed[0][1], routed[1][1]) < 1e-3
    rope, cursor = rope_table(32, 64, 1e4), torch.tensor([33], dtype=torch.int32)
    q, kv, norm = torch.randn(11, 8, 64).half(), torch.randn(11, 160).half(), near_one(128)
    qkv = torch.randn(11, 12, 32).half()
    appended: list[list[Tensor]] = []
    for module in (prefill, prefill_reference):
        mine, caches = q.clone(), [torch.zeros(64, width).half() for width in (128, 32)]
        module.append_latent(mine, kv, norm, rope, cursor, *caches)
        heads, others = qkv.clone(), [torch.zeros(4, 64, 32).half() for _ in range(2)]
        module.append_heads(heads, 4, rope, cursor, *others)
        appended.append([mine, *caches, heads, *others])
    assert all(error(*pair) < 1e-3 for pair in zip(*appended, strict=True))
