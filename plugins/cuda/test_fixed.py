"""Activations as fixed point (include/fixed.cuh): how near they are to the halves, and products that are exact."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trtvlm.plugins.cuda.emulation.emulator import compiler, emulated, emulated_kernel
from trtvlm.plugins.cuda.tiles import int4_tiles
from trtvlm.plugins.int4_linear.packing import pack

pytestmark = pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++ compiler")

GROUP, MOST = 64, 127 * 256 + 127
KERNELS = """
#include "fixed.cuh"
extern "C" __global__ void __launch_bounds__(32) fix(char* groups, float* scales, int count) {
    fix_groups<5>(groups, scales, count);
}

// One tile of codes for one group: of eight rows, and of the first row alone.
extern "C" __global__ void __launch_bounds__(32)
    product(const uint4* codes, const u32* weight_scales, const char* rows, const float* scales, float* out, float* alone) {
    const int g = lane_id() >> 2, t = lane_id() & 3;
    float sum[4] = {0.f, 0.f, 0.f, 0.f}, first[2] = {0.f, 0.f};
    const float2 of_columns = {scales[2 * t], scales[2 * t + 1]};
    fixed_tile(sum, codes[lane_id()], weight_scales[g], load_fixed(rows + g * GROUP_BYTES), of_columns);
    fixed_row_tile(first, codes[lane_id()], weight_scales[g], load_fixed_row(rows), scales[0]);
    for (int i = 0; i < 4; ++i) out[(2 * t + (i & 1)) * 16 + g + 8 * (i >> 1)] = sum[i];
    if (t == 0) alone[g] = first[0], alone[g + 8] = first[1];
}
"""
Launch = Callable[..., None]


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    file = tmp_path_factory.mktemp("kernels") / "fixed.cu"
    file.write_text(KERNELS)

    def call(name: str, *arguments: Tensor | int) -> None:
        with emulated():
            emulated_kernel(str(file), name)((1,), 32, *arguments)

    return call


def fixed(launch: Launch, x: Tensor) -> tuple[Tensor, Tensor]:
    """x half [groups, 64] -> its bytes and scales by the kernel."""
    codes, scales = x.clone(), torch.full((len(x),), torch.nan)
    launch("fix", codes, scales, len(x))
    return codes.view(torch.int8), scales


def values(codes: Tensor) -> Tensor:
    """int8 [groups, 128] -> the numbers [groups, 64], in the order of the inputs."""
    high, low = codes.view(-1, 2, GROUP).long().unbind(1)
    return (256 * high + low).view(-1, GROUP // 4, 4)[..., [0, 2, 1, 3]].flatten(1)


@pytest.mark.parametrize("count", [1, 4, 5])
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 6e4])
def test_a_value_is_rounded_to_a_part_of_its_groups_largest(launch: Launch, count: int, size: float) -> None:
    torch.manual_seed(count)
    x = (torch.rand(count, GROUP) * 2 - 1).mul(size).half()
    codes, scales = fixed(launch, x)
    numbers, largest = values(codes), x.abs().amax(1, keepdim=True)
    torch.testing.assert_close(16 * scales * MOST, largest.float().flatten(), rtol=1e-6, atol=0)
    assert numbers.abs().amax(1).eq(MOST).all()
    assert ((numbers * (16 * scales.double()).unsqueeze(1) - x.double()).abs() <= 0.51 * largest.double() / MOST).all()


def test_a_group_of_zeros_stays_one_and_outliers_keep_their_sign(launch: Launch) -> None:
    x = torch.zeros(3, GROUP).half()
    x[1, 7], x[1, 8], x[2, 63] = 65504.0, -65504.0, -(2.0**-24)
    numbers = values(fixed(launch, x)[0])
    assert numbers[0].eq(0).all()
    assert [int(number) for number in numbers[numbers != 0]] == [MOST, -MOST, -MOST]
    assert numbers.ne(0).sum() == 3


def test_products_are_exact_and_a_row_alone_has_the_same_bits(launch: Launch) -> None:
    torch.manual_seed(0)
    codes = torch.randint(-8, 8, (16, GROUP), dtype=torch.int8)
    codes[0], codes[1] = -8, 7
    weight_scales = torch.rand(16, 1).add(0.5).half()
    x = torch.randn(8, GROUP).half()
    x[0] = 1.0  # all at the largest: the largest sums there are
    rows, scales = [torch.cat(parts) for parts in zip(fixed(launch, x[:4]), fixed(launch, x[4:]), strict=True)]
    out, alone = torch.full((8, 16), torch.nan), torch.full((16,), torch.nan)
    launch("product", *int4_tiles(pack(codes), weight_scales), rows, scales, out, alone)
    exact = 16 * (values(rows) @ codes.long().t())
    assert torch.equal(out, exact.float() * (weight_scales.flatten().float() * scales.unsqueeze(1)))
    assert torch.equal(alone, out[0])
    assert exact.abs().max() == 16 * GROUP * 8 * MOST
