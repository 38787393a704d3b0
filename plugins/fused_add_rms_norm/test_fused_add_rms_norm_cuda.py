"""The kernel of fused_add_rms_norm compiles everywhere, and gives what the reference gives."""

import pytest
import torch

from trtvlm.plugins.cuda.compiler import ARCHITECTURES, PLUGINS, SHARED_LIMIT, compile_source
from trtvlm.plugins.fused_add_rms_norm import cuda, reference
from trtvlm.plugins.fused_add_rms_norm.op import fused_add_rms_norm

DEVICE = "cuda"
WIDTHS = (128, 256, 1280, 2048, 2560)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles(arch: str) -> None:
    for width in WIDTHS:
        for kind in cuda.TYPES.values():
            _, kernels = compile_source((PLUGINS / cuda.KERNEL).read_text(), {"N": width, "TYPE": kind}, arch)
            assert kernels["fused_add_rms_norm"].spilled == 0
            assert kernels["fused_add_rms_norm"].shared <= SHARED_LIMIT


def test_the_widest_rows_stay_in_registers() -> None:
    for kind, width in ((0, cuda.MAX_WIDTH), (2, cuda.MAX_WIDTH)):
        _, kernels = compile_source((PLUGINS / cuda.KERNEL).read_text(), {"N": width, "TYPE": kind}, "sm_86")
        assert kernels["fused_add_rms_norm"].spilled == 0


def test_refuses_what_it_cannot_do() -> None:
    x = torch.zeros(2, 100, dtype=torch.float16)
    with pytest.raises(ValueError, match="100"):
        cuda.fused_add_rms_norm(x, x, x[0], 1e-6, x, x)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", cuda.TYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 128), (16, 256), (3, 5, 1280), (7, 2048), (1000, 2560)], ids=str)
def test_same_as_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight = torch.rand(shape[-1]).add(0.5).to(dtype)
    expected, sums = reference.fused_add_rms_norm(x, residual, weight, 1e-6)
    normalised, added = torch.full_like(x, torch.nan).to(DEVICE), torch.full_like(x, torch.nan).to(DEVICE)
    cuda.fused_add_rms_norm(x.to(DEVICE), residual.to(DEVICE), weight.to(DEVICE), 1e-6, normalised, added)
    assert torch.equal(added.cpu(), sums)
    # Two roundings to the type; the sums of squares are added in another order before them.
    torch.testing.assert_close(normalised.cpu(), expected, rtol=max(2 * torch.finfo(dtype).eps, 2e-6), atol=1e-30)


@pytest.mark.gpu
def test_a_row_does_not_depend_on_the_others() -> None:
    x, residual = (torch.randn(16, 2048, dtype=torch.float16).to(DEVICE) for _ in range(2))
    weight = torch.rand(2048).half().to(DEVICE)
    out, alone, added = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    cuda.fused_add_rms_norm(x, residual, weight, 1e-6, out, added)
    for row in range(16):
        one = slice(row, row + 1)
        cuda.fused_add_rms_norm(x[one], residual[one], weight, 1e-6, alone[one], added[one])
    assert torch.equal(out, alone)


@pytest.mark.gpu
def test_the_operator_uses_it_and_falls_back() -> None:
    for width in (100, 256):
        x, residual, weight = torch.randn(3, width), torch.randn(3, width), torch.rand(width)
        expected = reference.fused_add_rms_norm(x.half(), residual.half(), weight.half(), 1e-6)
        found = fused_add_rms_norm(x.half().cuda(), residual.half().cuda(), weight.half().cuda(), 1e-6)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine.cpu(), theirs)
