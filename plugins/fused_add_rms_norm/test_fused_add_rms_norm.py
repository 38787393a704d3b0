"""fused_add_rms_norm against the model's own addition and norm."""

import pytest
import torch

from trtvlm.model.norm import RMSNorm
from trtvlm.plugins.fused_add_rms_norm.op import fused_add_rms_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (5, 96), (2, 3, 256)])
def test_same_bits_as_adding_and_then_normalising(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    norm = RMSNorm(shape[-1], 1e-6).to(dtype)
    norm.weight.data.uniform_(0.5, 1.5)
    x, residual = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    normalised, added = fused_add_rms_norm(x, residual, norm.weight.detach(), norm.eps)
    assert torch.equal(added, x + residual)
    assert torch.equal(normalised, norm(x + residual).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    x = torch.randn(3, 64, dtype=dtype)
    torch.library.opcheck(fused_add_rms_norm, (x, torch.randn_like(x), torch.ones(64, dtype=dtype), 1e-6))
