"""The operators' CUDA implementations against their definitions: on a GPU, and through the emulator on a CPU."""

import gc
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from trtvlm.model.sizes import language_size
from trtvlm.plugins.cuda.compiler import ARCHITECTURES, PLUGINS, compile_source
from trtvlm.plugins.cuda.emulation.emulator import Schedule, compiler, emulated
from trtvlm.plugins.cuda.repacked import Repacked
from trtvlm.plugins.gqa_attention import device as gqa
from trtvlm.plugins.gqa_attention import reference as gqa_reference
from trtvlm.plugins.gqa_attention.op import gqa_attention, gqa_attention_functional
from trtvlm.plugins.int4_linear import device as int4
from trtvlm.plugins.int4_linear import gemm
from trtvlm.plugins.int4_linear.op import int4_linear
from trtvlm.plugins.int4_linear.packing import dequantize
from trtvlm.plugins.int4_moe import device as moe
from trtvlm.plugins.int4_moe import reference as moe_reference
from trtvlm.plugins.int4_moe.bench import random_mlp
from trtvlm.plugins.int4_moe.op import int4_moe
from trtvlm.plugins.int4_moe.reference import Int4MLP, Routing
from trtvlm.plugins.int8_linear import device as int8
from trtvlm.plugins.int8_linear.op import int8_linear
from trtvlm.plugins.mla_attention import device as mla
from trtvlm.plugins.mla_attention import reference as mla_reference
from trtvlm.plugins.mla_attention.op import mla_attention, mla_attention_functional
from trtvlm.plugins.speculative_accept import device as accept
from trtvlm.plugins.speculative_accept import reference as accept_reference
from trtvlm.plugins.speculative_accept.op import speculative_accept, speculative_accept_greedy

THETA = 10_000.0
MODELS = ("nano", "deepseek-vl2-tiny", "deepseek-vl2-small", "deepseek-vl2")


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if compiler() is None:
        pytest.skip("the emulator needs a C++ compiler")
    monkeypatch.setattr(gemm, "_device", lambda _: (132, 228 * 1024))
    with emulated(Schedule("shuffled")):
        yield


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu().double() - expected.double().cpu()).norm() / expected.double().norm())


def moved(arguments: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    return tuple(one.to(device) if isinstance(one, Tensor) else one for one in arguments)


# ---- repacked weights --------------------------------------------------------------------------------------------------


def test_weights_are_repacked_once_and_again_when_written_to() -> None:
    calls: list[int] = []

    def make(first: Tensor, second: Tensor | None, number: int) -> Tensor:
        calls.append(number)
        return first * number if second is None else first * second

    packed = Repacked(make)
    a, b = torch.ones(3), torch.full((3,), 2.0)
    assert packed(a, b, numbers=(5,)) is packed(a, b, numbers=(5,))
    assert calls == [5]
    b.add_(1)
    assert packed(a, b, numbers=(5,)).tolist() == [3.0] * 3
    assert packed(a, b.clone(), numbers=(5,)).tolist() == [3.0] * 3
    assert packed(a, None, numbers=(6,)).tolist() == [6.0] * 3
    assert calls == [5, 5, 5, 6]
    with torch.inference_mode():
        c = torch.ones(3)
        assert packed(c, None, numbers=(7,)) is packed(c, None, numbers=(7,))
    assert len(packed) == 2
    del a, c
    gc.collect()
    assert len(packed) == 0


# ---- linear layers -----------------------------------------------------------------------------------------------------


def int4_case(outputs: int, inputs: int, rows: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    packed = torch.randint(-128, 128, (outputs // 2, inputs), dtype=torch.int8)
    scales = torch.rand(outputs, inputs // 64).add(0.5).div(4.6 * inputs**0.5).half().float()
    return torch.randn(*rows, inputs).half(), packed, scales, torch.rand(inputs).add(0.5)


def int4_expected(x: Tensor, packed: Tensor, scales: Tensor, pre: Tensor | None) -> Tensor:
    x = x if pre is None else x * pre.half()
    out: Tensor = x.double() @ dequantize(packed, scales).double().t()
    return out


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("rows", [(1,), (2, 8), (17,), (0,)], ids=str)
def test_int4_linear(rows: tuple[int, ...]) -> None:
    x, packed, scales, pre = int4_case(48, 128, rows)
    for given in (None, pre):
        assert int4.supports(x, packed, scales)
        out = int4.int4_linear(x, packed, scales, given)
        assert out.shape == (*rows, 48)
        assert out.numel() == 0 or error(out, int4_expected(x, packed, scales, given)) < 2e-3


def test_int4_linear_refuses() -> None:
    x, packed, scales, _ = int4_case(48, 128, (3,))
    assert not int4.supports(x.float(), packed, scales)
    assert not int4.supports(x, packed, scales[:, :1])
    assert not int4.supports(x, packed[:20], scales[:40])


def int8_case(outputs: int, inputs: int, rows: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    codes = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    return torch.randn(*rows, inputs).half(), codes, torch.rand(outputs).add(0.5).div(73 * inputs**0.5)


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("rows", [(1,), (3, 3), (0,)], ids=str)
def test_int8_linear(rows: tuple[int, ...]) -> None:
    x, codes, scales = int8_case(160, 192, rows)  # sums of 192: their mean is 1 up to rounding only
    assert int8.supports(x, codes)
    out = int8.int8_linear(x, codes, scales)
    assert out.shape == (*rows, 160)
    expected = x.double() @ (codes.double() * scales.double().unsqueeze(1)).t()
    assert out.numel() == 0 or error(out, expected) < 5e-4
    assert not int8.supports(x.float(), codes)
    assert not int8.supports(x.new_empty(17, 192), codes)
    assert not int8.supports(x, codes[:150])


# ---- experts -----------------------------------------------------------------------------------------------------------

Layer = tuple[Tensor, Tensor, Int4MLP, Routing, Int4MLP | None, Tensor | None]


def moe_case(rows: int, hidden: int, width: int, number: int, routing: Routing, *, full: bool) -> Layer:
    """full: a shared expert, pre_quant_scales and a correction bias."""
    torch.manual_seed(rows)
    mlp = random_mlp(hidden, width, number, "cpu", scaled=full)
    shared = random_mlp(hidden, 2 * width, None, "cpu", scaled=full) if full else None
    bias = torch.randn(number) * 0.1 if full else None
    return torch.randn(rows, hidden).half(), torch.randn(rows, number), mlp, routing, shared, bias


def moe_expected(
    x: Tensor, logits: Tensor, mlp: Int4MLP, routing: Routing, shared: Int4MLP | None, bias: Tensor | None
) -> Tensor:
    index, weight = routing(logits, bias)
    return moe_reference.int4_experts(x.double(), index, weight, mlp, shared)


def flat_moe(case: Layer) -> tuple[Any, ...]:
    """The operator's arguments."""
    x, logits, mlp, routing, shared, bias = case

    def parts(one: Int4MLP | None) -> tuple[Tensor | None, ...]:
        if one is None:
            return (None,) * 6
        return one.fc, one.fc_scales, one.proj, one.proj_scales, one.fc_pre, one.proj_pre

    numbers = (routing.top_k, routing.scoring, routing.normalise, routing.scaling, routing.groups, routing.top_groups)
    return (x, logits, *parts(mlp), *parts(shared), bias, *numbers)


ROUTINGS = {
    "softmax": Routing(2),
    "sigmoid": Routing(2, "sigmoid", True, 2.0),
    # Only with a correction bias; the decoding kernels do not know them.
    "groups": Routing(2, "sigmoid", True, 2.0, 4, 2),
}


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize(
    ("rows", "routing", "full"),
    [(3, "sigmoid", True), (20, "sigmoid", True), (9, "softmax", False), (0, "softmax", False), (2, "groups", True)],
)
def test_int4_moe(rows: int, routing: str, full: bool) -> None:
    case = moe_case(rows, 128, 64, 8, ROUTINGS[routing], full=full)
    assert moe.supports(case[0], case[2], case[4])
    out = moe.int4_moe(*case)
    assert out.shape == case[0].shape
    assert out.dtype == torch.half
    assert rows == 0 or error(out, moe_expected(*case)) < 2e-3


def test_int4_moe_refuses() -> None:
    x, _, mlp, _, shared, _ = moe_case(2, 128, 64, 8, ROUTINGS["softmax"], full=True)
    assert not moe.supports(x.float(), mlp, shared)
    narrow = Int4MLP(mlp.fc, mlp.fc_scales[..., :1], mlp.proj, mlp.proj_scales)
    assert not moe.supports(x, narrow, shared)
    assert not moe.supports(x, mlp, narrow)


# ---- attention ---------------------------------------------------------------------------------------------------------


def mla_case(rows: int, cursor: int, positions: int, sizes: tuple[int, int, int, int, int]) -> tuple[Any, ...]:
    heads, nope, rope, value, rank = sizes
    torch.manual_seed(rows)
    kv_b = (torch.randn(heads * (nope + value), rank) * rank**-0.5).half()
    return (
        torch.randn(rows, heads * (nope + rope)).half(), torch.randn(rows, rank).half(), torch.randn(rows, rope).half(), kv_b,
        torch.randn(positions, rank).half(), torch.randn(positions, rope).half(), torch.tensor([cursor]), heads,
        (nope + rope) ** -0.5, THETA,
    )  # fmt: skip


def gqa_case(rows: int, cursor: int, positions: int, sizes: tuple[int, int, int]) -> tuple[Any, ...]:
    heads, kv_heads, width = sizes
    torch.manual_seed(rows)
    q, k, v = (torch.randn(rows, number * width).half() for number in (heads, kv_heads, kv_heads))
    caches = (torch.randn(kv_heads, positions, width).half() for _ in range(2))
    return q, k, v, *caches, torch.tensor([cursor]), heads, width**-0.5, THETA


def wide(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same in float64, on the CPU, with caches of their own."""
    return tuple(
        (one.double() if one.is_floating_point() else one).cpu().clone() if isinstance(one, Tensor) else one
        for one in arguments
    )


NANO_MLA, NANO_GQA = (8, 32, 32, 32, 128), (4, 4, 32)


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize(("rows", "cursor"), [(1, 0), (9, 30), (16, 80)])
def test_mla_attention(rows: int, cursor: int) -> None:
    case = mla_case(rows, cursor, 96, NANO_MLA)
    twin = wide(case)
    expected = mla_reference.mla_attention(*twin)
    q, latent, k_pe, kv_b, latents, rotations, at, heads, scale, theta = case
    assert mla.supports(q, k_pe, kv_b, latents, rotations, heads, scale)
    out = mla.mla_attention(q, latent, k_pe, kv_b, latents, rotations, at, heads, theta)
    for found, wanted in zip((out, latents, rotations), (expected, *twin[4:6]), strict=True):
        assert error(found, wanted) < 2e-3


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize(("rows", "cursor"), [(1, 0), (9, 60), (16, 84)])
def test_gqa_attention(rows: int, cursor: int) -> None:
    case = gqa_case(rows, cursor, 100, NANO_GQA)  # no multiple of what a block takes
    twin = wide(case)
    expected = gqa_reference.gqa_attention(*twin)
    q, k, v, keys, values, at, heads, scale, theta = case
    assert gqa.supports(q, keys, values, heads, scale)
    out = gqa.gqa_attention(q, k, v, keys, values, at, heads, theta)
    for found, wanted in zip((out, keys, values), (expected, *twin[3:5]), strict=True):
        assert error(found, wanted) < 2e-3


def test_attention_refuses() -> None:
    q, _, k_pe, kv_b, latents, rotations, _, heads, scale, _ = mla_case(2, 0, 64, NANO_MLA)
    assert mla.supports(q, k_pe, kv_b, latents, rotations, heads, scale)
    assert not mla.supports(q.float(), k_pe, kv_b, latents, rotations, heads, scale)
    assert not mla.supports(q, k_pe, kv_b, latents, rotations, heads, 2 * scale)
    assert not mla.supports(q.new_empty(17, q.shape[1]), k_pe.new_empty(17, 32), kv_b, latents, rotations, heads, scale)
    for positions in (50, 5024):
        longer = latents.new_empty(positions, 128), rotations.new_empty(positions, 32)
        assert not mla.supports(q, k_pe, kv_b, *longer, heads, scale)
    q, _, _, keys, values, _, heads, scale, _ = gqa_case(2, 0, 64, NANO_GQA)
    assert gqa.supports(q, keys, values, heads, scale)
    assert not gqa.supports(q, keys.float(), values.float(), heads, scale)
    assert not gqa.supports(q, keys, values, heads, 2 * scale)
    assert not gqa.supports(q, keys[:1], values[:1], heads, scale)  # four heads to a key head


# ---- accepting ---------------------------------------------------------------------------------------------------------


def accept_cases(vocab: int, device: str) -> Iterator[tuple[Tensor, ...]]:
    """Probabilities in quarters, so that sums are exact in any order, then any; certainties, and nothing left."""
    torch.manual_seed(vocab)
    for drafted, exact in itertools.product((0, 1, 4, 7), (True, False)):
        p = (torch.randn(drafted + 1, vocab) * 3).softmax(-1)
        q = (p[:drafted].log() + 0.7 * torch.randn(drafted, vocab)).softmax(-1)
        if exact:
            p, q = (torch.stack([quarters(vocab) for _ in range(n)]) if n else q for n in (drafted + 1, drafted))
        tokens = torch.multinomial(q, 1).squeeze(1) if drafted else torch.empty(0, dtype=torch.int64)
        yield moved((tokens, q, p, torch.rand(drafted + 1)), device)
        if drafted:
            same = p.clone()
            yield moved((tokens, same[:drafted], same, torch.ones(drafted + 1) - 2**-24), device)


def quarters(vocab: int) -> Tensor:
    out = torch.zeros(vocab)
    return out.index_add_(0, torch.randint(0, vocab, (4,)), torch.full((4,), 0.25))


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("vocab", [3, 1000])
def test_speculative_accept(vocab: int) -> None:
    for case in accept_cases(vocab, "cpu"):
        assert accept.supports(*case[:3])
        found, expected = accept.speculative_accept(*case), accept_reference.speculative_accept(*case)
        assert torch.stack(found).tolist() == torch.stack(expected).tolist()
        tokens, logits = case[0], case[2]
        found, expected = (which.speculative_accept_greedy(tokens, logits) for which in (accept, accept_reference))
        assert torch.stack(found).tolist() == torch.stack(expected).tolist()
    assert not accept.supports(torch.zeros(32, dtype=torch.int64))
    assert not accept.supports(torch.zeros(2, dtype=torch.int64), torch.zeros(2, 8).half())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_accepting_compiles(arch: str) -> None:
    _, kernels = compile_source((PLUGINS / accept.SOURCE).read_text(), {}, arch)
    assert set(kernels) == {"speculative_accept", "speculative_accept_greedy"}
    for usage in kernels.values():
        assert usage.spilled == 0
        assert usage.registers <= 64


# ---- through the dispatcher, on a GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("rows", [(1,), (2, 8), (300,)], ids=str)
def test_linear_operators_on_a_gpu(rows: tuple[int, ...], model: str) -> None:
    config = language_size(model)
    case = int4_case(1024, config.hidden_size, rows)
    assert error(int4_linear(*moved(case, "cuda")), int4_expected(*case)) < 2e-3
    x, codes, scales = int8_case(2048, config.hidden_size, rows)
    expected = x.double() @ (codes.double() * scales.double().unsqueeze(1)).t()
    assert error(int8_linear(*moved((x, codes, scales), "cuda")), expected) < 2e-3


@pytest.mark.gpu
def test_what_kernels_do_not_take_runs_the_reference() -> None:
    x, packed, scales, pre = int4_case(40, 128, (3,))
    for dtype in (torch.half, torch.float32, torch.bfloat16):
        out = int4_linear(*moved((x.to(dtype), packed, scales, pre), "cuda"))
        assert out.dtype == dtype
        assert error(out, int4_expected(x, packed, scales, pre)) < 2e-2
    case = moe_case(3, 128, 64, 8, ROUTINGS["softmax"], full=False)
    flat = flat_moe((case[0].float(), *case[1:]))
    assert error(int4_moe(*moved(flat, "cuda")), moe_expected(*case)) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("rows", [1, 3, 9, 16, 200])
def test_int4_moe_on_a_gpu(rows: int, routing: str, full: bool) -> None:
    case = moe_case(rows, 256, 128, 8, ROUTINGS[routing], full=full)
    assert error(int4_moe(*moved(flat_moe(case), "cuda")), moe_expected(*case)) < 2e-3


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 5, 16, 40])
def test_attention_operators_on_a_gpu(rows: int) -> None:
    small, tiny = mla_case(rows, 70, 192, (16, 128, 64, 128, 512)), gqa_case(rows, 70, 200, (10, 10, 128))
    cases: list[tuple[Any, Any, Any, tuple[Any, ...], int]] = [
        (mla_attention, mla_attention_functional, mla_reference.mla_attention, small, 4),
        (gqa_attention, gqa_attention_functional, gqa_reference.gqa_attention, tiny, 3),
    ]
    for operator, functional, reference, case, first in cases:
        twin = wide(case)
        expected = reference(*twin)
        mine = moved(case, "cuda")
        before = [cache.clone() for cache in mine[first : first + 2]]
        whole = functional(*mine)
        assert all(torch.equal(now, old) for now, old in zip(mine[first : first + 2], before, strict=True))
        out = operator(*mine)
        for found, again, wanted in zip(
            (out, *mine[first : first + 2]), whole, (expected, *twin[first : first + 2]), strict=True
        ):
            assert error(found, wanted) < 3e-3
            assert torch.equal(found, again)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [3, 1000, 129280])
def test_speculative_accept_on_a_gpu(vocab: int) -> None:
    for case in accept_cases(vocab, "cuda"):
        found = torch.stack(speculative_accept(*case)).tolist()
        assert found == torch.stack(accept_reference.speculative_accept(*(one.cpu() for one in case))).tolist()
        greedy = torch.stack(speculative_accept_greedy(case[0], case[2])).tolist()
        assert greedy == torch.stack(accept_reference.speculative_accept_greedy(case[0].cpu(), case[2].cpu())).tolist()


@pytest.mark.gpu
def test_opcheck_on_a_gpu() -> None:
    checks: list[tuple[Any, tuple[Any, ...]]] = [
        (int4_linear, int4_case(64, 128, (3,))),
        (int8_linear, int8_case(64, 128, (3,))),
        (int4_moe, flat_moe(moe_case(3, 128, 64, 8, ROUTINGS["sigmoid"], full=True))),
        (mla_attention, mla_case(3, 5, 64, NANO_MLA)),
        (mla_attention_functional, mla_case(3, 5, 64, NANO_MLA)),
        (gqa_attention, gqa_case(3, 5, 64, NANO_GQA)),
        (gqa_attention_functional, gqa_case(3, 5, 64, NANO_GQA)),
        (speculative_accept, next(itertools.islice(accept_cases(64, "cpu"), 3, 4))),
    ]
    for operator, arguments in checks:
        torch.library.opcheck(operator, moved(arguments, "cuda"))


@pytest.mark.gpu
def test_a_graph_replays_operators() -> None:
    """Nothing is read back to the host, and weights are repacked before."""
    x, packed, scales, pre = moved(int4_case(64, 128, (3,)), "cuda")
    accepting = moved(next(itertools.islice(accept_cases(1000, "cpu"), 3, 4)), "cuda")
    int4_linear(x, packed, scales, pre)
    speculative_accept(*accepting)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = int4_linear(x, packed, scales, pre)
        count, token = speculative_accept(*accepting)
    x.copy_(torch.randn(3, 128).half())
    accepting[3].fill_(0.25)
    graph.replay()
    assert torch.equal(out, int4_linear(x, packed, scales, pre))
    assert [count.item(), token.item()] == torch.stack(speculative_accept(*accepting)).tolist()
