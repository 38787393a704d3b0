"""int4_linear: operator, module and float weight agree."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trtvlm.plugins.int4_linear import packing
from trtvlm.plugins.int4_linear.module import Int4Linear
from trtvlm.plugins.int4_linear.op import int4_linear


@given(st.integers(0, 2**31), st.booleans(), st.sampled_from([(1,), (7,), (2, 3)]))
def test_is_the_product_with_the_dequantized_weight(seed: int, scaled: bool, leading: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(seed)
    pre = torch.rand(128, generator=generator) + 0.5 if scaled else None
    rounded = Int4Linear.from_float(torch.randn(6, 128, generator=generator))
    layer = Int4Linear(rounded.weight, rounded.scales, pre)
    x = torch.randn(*leading, 128, generator=generator)
    expected = x.double() @ layer.dequantized().double().t()
    # 128 products of size ~1 in float32.
    torch.testing.assert_close(layer(x), expected.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_opcheck(dtype: torch.dtype, scaled: bool) -> None:
    layer = Int4Linear.from_float(torch.randn(6, 128))
    pre = torch.ones(128) if scaled else None
    torch.library.opcheck(int4_linear, (torch.randn(3, 128, dtype=dtype), layer.weight, layer.scales, pre))


def test_module_refuses_scales_of_another_layer() -> None:
    with pytest.raises(ValueError, match="outputs"):
        Int4Linear(torch.zeros(3, 64, dtype=torch.int8), torch.ones(3, 1))


def test_uint8_bytes_are_the_same_weight() -> None:
    layer = Int4Linear.from_float(torch.randn(6, 64))
    twin = Int4Linear(layer.weight.view(torch.uint8), layer.scales)
    assert torch.equal(twin.dequantized(), layer.dequantized())
    assert torch.equal(layer.dequantized(), packing.dequantize(layer.weight, layer.scales))
