"""int8_linear: codes, operator and module."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trtvlm.plugins.int8_linear import packing
from trtvlm.plugins.int8_linear.module import Int8Linear
from trtvlm.plugins.int8_linear.op import int8_linear


@given(st.integers(0, 2**31), st.sampled_from([torch.float32, torch.float16]))
def test_codes_are_within_half_a_step_and_stable(seed: int, dtype: torch.dtype) -> None:
    weight = torch.randn(5, 48, generator=torch.Generator().manual_seed(seed))
    weight[0] = 0.0
    scales = packing.row_scales(weight, dtype)
    codes = packing.quantize_int8(weight, scales)
    restored = packing.dequantize(codes, scales)
    # A scale rounded down to float16 leaves amax at most 127 * 2**-11 steps out of reach.
    assert ((restored - weight).abs() <= 0.57 * scales.unsqueeze(1)).all()
    assert torch.equal(packing.quantize_int8(restored, scales), codes)


@given(st.integers(0, 2**31))
def test_is_the_product_with_the_dequantized_weight(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = Int8Linear.from_float(torch.randn(5, 48, generator=generator))
    x = torch.randn(2, 3, 48, generator=generator)
    expected = x.double() @ layer.dequantized().double().t()
    torch.testing.assert_close(layer(x), expected.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    layer = Int8Linear.from_float(torch.randn(5, 48))
    torch.library.opcheck(int8_linear, (torch.randn(3, 48, dtype=dtype), layer.weight, layer.scales))


def test_module_refuses_float_weights() -> None:
    with pytest.raises(ValueError, match="float32"):
        Int8Linear(torch.zeros(3, 64), torch.ones(3))
