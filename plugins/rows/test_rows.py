"""Layers whose rows do not depend on their number: each alone, with every kernel, and the checks that guard them."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trtvlm.plugins.rows import linear
from trtvlm.plugins.rows.attention import BUCKET, LatentAttention, head_attention
from trtvlm.plugins.rows.elementwise import by_rows, rms_norm, rotate
from trtvlm.plugins.rows.experts import MLPWeights, RowwiseExperts
from trtvlm.plugins.rows.linear import RowwiseLinear, check_row_invariance

SIZES = st.sampled_from([16, 40, 64, 96, 100, 128, 200, 256])
ROWS = st.integers(1, linear.MAX_ROWS)


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def _threads(request: pytest.FixtureRequest) -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def _alone(function: linear.Kernel, x: Tensor) -> Tensor:
    """Each row in memory of its own, as a call with one row has it."""
    return torch.cat([function(row.clone()) for row in torch.split(x, 1)])


@pytest.mark.usefixtures("_threads")
class TestLinear:
    @settings(max_examples=40, deadline=None)
    @given(SIZES, SIZES, ROWS, st.integers(0, 2**31), st.sampled_from([torch.float16, torch.float32]))
    def test_rows_do_not_depend_on_their_number(
        self, inputs: int, outputs: int, rows: int, seed: int, dtype: torch.dtype
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        layer = RowwiseLinear(torch.randn(outputs, inputs, generator=generator), dtype)
        x = torch.randn(rows, inputs, generator=generator)
        assert torch.equal(layer(x), _alone(layer, x))

    @settings(max_examples=20, deadline=None)
    @given(SIZES, SIZES, st.integers(1, 40), st.integers(0, 2**31))
    def test_is_the_product(self, inputs: int, outputs: int, rows: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(outputs, inputs, generator=generator)
        x = torch.randn(2, rows, inputs, generator=generator)
        for dtype in (torch.float16, torch.float32):
            expected = x.double() @ weight.to(dtype).double().t()
            torch.testing.assert_close(RowwiseLinear(weight, dtype)(x), expected.float(), atol=2e-4, rtol=2e-4)

    def test_every_kernel_of_the_table_here_is_invariant(self) -> None:
        weight = torch.randn(96, 128).half().float()
        for make in (linear.half_kernel, linear.half_kernel_dispatched, linear.row_by_row_kernel):
            assert check_row_invariance(make(weight), 128)


def test_the_check_finds_a_product_whose_rows_vary() -> None:
    calls = []

    def varies(x: Tensor) -> Tensor:
        calls.append(x.shape[0])
        return x + (x.shape[0] == 7) * 2**-20

    assert not check_row_invariance(varies, 4)
    assert set(range(1, 8)) <= set(calls)
    assert check_row_invariance(lambda x: 2 * x, 4)


def test_a_kernel_that_varies_or_is_missing_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(weight: Tensor) -> linear.Kernel:
        raise RuntimeError("not on this machine")

    monkeypatch.setattr(linear, "half_kernel", lambda weight: lambda x: x @ weight.t() + x.shape[0])
    monkeypatch.setattr(linear, "half_kernel_dispatched", missing)
    weight, x = torch.randn(24, 64), torch.randn(5, 64)
    layer = RowwiseLinear(weight)
    assert layer.kernel_name == "row_by_row_kernel"
    # It still multiplies by what an engine holds.
    torch.testing.assert_close(layer(x), x @ weight.half().float().t())
    assert torch.equal(layer(x), _alone(layer, x))


def test_weights_stay_float32_where_float16_would_lose_something_that_matters() -> None:
    exact, x = torch.randn(8, 64), torch.randn(3, 64)
    torch.testing.assert_close(RowwiseLinear(exact, torch.float32)(x), x @ exact.t())
    huge = exact * 1e6  # beyond float16
    torch.testing.assert_close(RowwiseLinear(huge)(x), x @ huge.t(), rtol=1e-4, atol=1e2)
    half = exact.half().float()
    assert RowwiseLinear(half, torch.float32).kernel_name == RowwiseLinear(half).kernel_name


@given(SIZES, ROWS, st.integers(0, 2**31))
def test_steps_between_products_keep_rows_apart(width: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 2 * width, generator=generator)
    weight = torch.rand(2 * width, generator=generator)
    cos, sin = torch.randn(2, 1, 2 * width, generator=generator)
    functions: list[linear.Kernel] = [
        lambda part: by_rows(F.silu, part),
        lambda part: by_rows(torch.sigmoid, part[:, :width]),
        lambda part: rms_norm(part, weight, 1e-6),
        lambda part: rotate(part, cos, sin),
    ]
    for function in functions:
        assert torch.equal(function(x), _alone(function, x))


def test_activations_longer_than_a_thread_takes_keep_rows_apart() -> None:
    x = torch.randn(8, 8192)
    assert torch.equal(by_rows(F.silu, x), _alone(F.silu, x))


def _experts(generator: torch.Generator, count: int, hidden: int, width: int) -> list[MLPWeights]:
    def one() -> MLPWeights:
        gate, up, down = (torch.randn(width, hidden, generator=generator) * 0.1 for _ in range(3))
        return gate, up, down.t().contiguous()

    return [one() for _ in range(count)]


@settings(max_examples=30, deadline=None)
@given(ROWS, st.booleans(), st.booleans(), st.integers(0, 2**31), st.sampled_from([24, 32]))
def test_experts_sum_the_chosen_ones(rows: int, shared: bool, all_at_once: bool, seed: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    experts = _experts(generator, 5, 64, width)
    common = _experts(generator, 1, 64, 48)[0] if shared else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trtvlm.plugins.rows.experts.DENSE_LIMIT", 10**9 if all_at_once else 0)
        layer = RowwiseExperts(experts, common)
    assert (layer.all is not None) == all_at_once
    x = torch.randn(rows, 64, generator=generator)
    index = torch.rand(rows, 5, generator=generator).topk(2, dim=1).indices
    weight = torch.rand(rows, 2, generator=generator)
    got = layer(x, index, weight)
    alone = [layer(x[i : i + 1].clone(), index[i : i + 1], weight[i : i + 1]) for i in range(rows)]
    assert torch.equal(got, torch.cat(alone))

    def mlp(part: Tensor, weights: MLPWeights) -> Tensor:
        gate, up, down = (matrix.half().double() for matrix in weights)
        return (F.silu(part @ gate.t()) * (part @ up.t())) @ down.t()

    wide = x.double()
    expected = torch.stack(
        [
            sum((mlp(row, experts[int(e)]) * w for e, w in zip(chosen, share, strict=True)), torch.zeros(64))
            for row, chosen, share in zip(wide, index, weight.double(), strict=True)
        ]
    )
    if common is not None:
        expected = expected + mlp(wide, common)
    torch.testing.assert_close(got, expected.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("_threads")
@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([(4, 128, 32), (2, 64, 16), (3, 40, 8)]),
    st.integers(0, 5 * BUCKET),
    st.integers(1, 8),
    st.integers(0, 2**31),
)
def test_latent_attention_rows_do_not_depend_on_their_number(
    sizes: tuple[int, int, int], start: int, rows: int, seed: int
) -> None:
    heads, rank, rope = sizes
    generator = torch.Generator().manual_seed(seed)
    attend = LatentAttention(heads, rank, rope, 0.1)
    room = 5 * BUCKET + 20  # the last bucket is cut short by the cache's end
    latent, k_pe = torch.randn(room, rank, generator=generator), torch.randn(room, rope, generator=generator)
    q, q_pe = (torch.randn(rows, heads, width, generator=generator) for width in (rank, rope))
    got = attend(q.flatten(1), q_pe, latent, k_pe, start)
    alone = [attend(q[i : i + 1].flatten(1), q_pe[i : i + 1], latent, k_pe, start + i) for i in range(rows)]
    assert torch.equal(got, torch.cat(alone))
    for i in range(rows):
        seen = start + i + 1
        scores = q[i].double() @ latent[:seen].double().t() + q_pe[i].double() @ k_pe[:seen].double().t()
        expected = (scores * 0.1).softmax(-1) @ latent[:seen].double()
        torch.testing.assert_close(got[i], expected.flatten().float(), atol=1e-4, rtol=1e-4)


def test_latent_attention_goes_row_by_row_where_products_vary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trtvlm.plugins.rows.attention.check_row_invariance", lambda *_: False)
    attend = LatentAttention(2, 16, 8, 0.1)
    assert [(first, last) for first, last, _ in attend._runs(3, 3, 200)] == [(0, 1), (1, 2), (2, 3)]
    monkeypatch.undo()
    monkeypatch.setattr("trtvlm.plugins.rows.attention.check_row_invariance", lambda *_: True)
    attend = LatentAttention(2, 16, 8, 0.1)
    runs = list(attend._runs(BUCKET - 2, 5, 200))
    assert runs == [(0, 2, BUCKET), (2, 5, 2 * BUCKET)]


@given(st.sampled_from([(4, 4), (4, 2)]), st.integers(0, 90), st.integers(1, 8), st.integers(0, 2**31))
def test_head_attention_is_plain_attention(heads: tuple[int, int], start: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, heads[1], 100, 32, generator=generator)
    q = torch.randn(rows, heads[0], 32, generator=generator)
    got = head_attention(q, k, v, start, 0.2)
    for i in range(rows):
        assert torch.equal(head_attention(q[i : i + 1].clone(), k, v, start + i, 0.2)[0], got[i])
        keys, values = (part[:, : start + i + 1].double().repeat_interleave(heads[0] // heads[1], 0) for part in (k, v))
        scores = torch.einsum("hd,hsd->hs", q[i].double(), keys) * 0.2
        expected = torch.einsum("hs,hsd->hd", scores.softmax(-1), values)
        torch.testing.assert_close(got[i], expected.flatten().float(), atol=1e-4, rtol=1e-4)
