"""The byte layouts: exact inverses, and the very bytes that other programs expect."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trtvlm.plugins.int4_linear import packing


@st.composite
def codes(draw: st.DrawFn) -> torch.Tensor:
    leading = draw(st.sampled_from([(), (3,), (2, 2)]))
    shape = (*leading, 2 * draw(st.integers(1, 5)), 2 * draw(st.integers(1, 9)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randint(-8, 8, shape, dtype=torch.int8, generator=generator)


@given(codes())
def test_unpack_inverts_pack(codes: torch.Tensor) -> None:
    packed = packing.pack(codes)
    assert packed.shape == (*codes.shape[:-2], codes.shape[-2] // 2, codes.shape[-1])
    assert packed.dtype == torch.int8
    assert torch.equal(packing.unpack(packed), codes)
    assert torch.equal(packing.unpack(packed.view(torch.uint8)), codes)


@given(codes())
def test_unpack_onnx_inverts_pack_onnx(codes: torch.Tensor) -> None:
    assert torch.equal(packing.unpack_onnx(packing.pack_onnx(codes)), codes)


@given(codes())
def test_stacked_experts_pack_as_each_alone(codes: torch.Tensor) -> None:
    experts = torch.stack((codes, codes.flip(-1)))
    assert torch.equal(packing.pack(experts)[1], packing.pack(experts[1]))


def test_layout_byte_by_byte() -> None:
    codes = torch.tensor([[1, -1, 7], [2, -8, 0]], dtype=torch.int8)
    # Low nibble: the even row. -1 is 0xF, -8 is 0x8.
    assert packing.pack(codes).view(torch.uint8).tolist() == [[0x21, 0x8F, 0x07]]
    assert packing.pack_onnx(torch.tensor([[1, -1, 7, -8]], dtype=torch.int8)).tolist() == [[0xF1, 0x87]]


@given(st.integers(0, 2**31), st.sampled_from([(), (3,)]))
def test_quantizing_is_exact_on_what_it_made_and_close_elsewhere(seed: int, leading: tuple[int, ...]) -> None:
    weight = torch.randn(*leading, 4, 128, generator=torch.Generator().manual_seed(seed))
    scales = packing.group_scales(weight, dtype=torch.float16)
    packed = packing.pack(packing.quantize_int4(weight, scales))
    restored = packing.dequantize(packed, scales)
    # Half a step; 7.5 steps reach amax even when float16 rounded the scale down by 2**-11.
    assert ((restored - weight).abs() <= 0.5001 * scales.repeat_interleave(64, -1)).all()
    assert torch.equal(packing.pack(packing.quantize_int4(restored, scales)), packed)


def test_pre_quant_scale_multiplies_input_channels() -> None:
    weight, pre = torch.randn(2, 64), torch.rand(64) + 0.5
    scales = packing.group_scales(weight)
    packed = packing.pack(packing.quantize_int4(weight, scales))
    folded = packing.dequantize(packed, scales, pre)
    assert torch.equal(folded, packing.dequantize(packed, scales) * pre)


def test_same_bytes_as_modelopt() -> None:
    quant_utils = pytest.importorskip("modelopt.torch.export.quant_utils")
    weight = torch.randn(8, 128)
    scales = packing.group_scales(weight)
    theirs = quant_utils.pack_int4_in_uint8(weight, scales, packing.GROUP_SIZE)
    assert torch.equal(theirs, packing.pack(packing.quantize_int4(weight, scales)).view(torch.uint8))


@pytest.mark.parametrize(
    "call",
    [
        lambda: packing.pack(torch.zeros(3, 2, dtype=torch.int8)),
        lambda: packing.pack(torch.full((2, 2), 8, dtype=torch.int8)),
        lambda: packing.pack_onnx(torch.zeros(2, 3, dtype=torch.int8)),
        lambda: packing.group_scales(torch.zeros(2, 100)),
        lambda: packing.quantize_int4(torch.zeros(2, 100), torch.ones(2, 3)),
    ],
)
def test_shapes_that_cannot_be_packed_are_refused(call: object) -> None:
    with pytest.raises(ValueError, match=r"\d"):
        call()  # type: ignore[operator]
