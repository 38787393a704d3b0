"""mla_attention against the model's own attention, in one call and in several."""

from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tiny import tiny_config
from trtvlm.model.attention import MultiHeadLatentAttention, causal_mask
from trtvlm.model.rope import rope_table
from trtvlm.plugins.mla_attention.op import mla_attention, mla_attention_functional

CONFIG = tiny_config("mla").language
SPAN = 24


def _layer(generator: torch.Generator) -> MultiHeadLatentAttention:
    layer = MultiHeadLatentAttention(CONFIG).requires_grad_(False)
    for parameter in layer.parameters():
        parameter.normal_(0.0, 0.2, generator=generator)
    # The operator ends before the output projection; an identity shows what it is given.
    layer.o_proj.weight.copy_(torch.eye(layer.o_proj.in_features))
    return layer


def _arguments(layer: MultiHeadLatentAttention, x: Tensor) -> tuple[Tensor, ...]:
    latent, k_pe = layer.kv_a_proj_with_mqa(x).tensor_split([layer.rank], dim=1)
    return layer.q_proj(x), layer.kv_a_layernorm(latent), k_pe, layer.kv_b_proj.weight


def _caches(layer: MultiHeadLatentAttention) -> tuple[Tensor, Tensor]:
    # What lies ahead of the cursor is left over from a rollback: it must not be seen.
    return torch.randn(SPAN, layer.rank), torch.randn(SPAN, layer.rope)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 8), min_size=1, max_size=3))
def test_equals_the_model_however_it_is_cut(seed: int, widths: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = _layer(generator)
    rows = sum(widths)
    x = torch.randn(rows, CONFIG.hidden_size, generator=generator)
    cos, sin = rope_table(CONFIG.rope_dim, rows, CONFIG.rope_theta)
    mask = causal_mask(rows, 0, None, torch.device("cpu"))
    expected = layer(x.unsqueeze(0), (cos.unsqueeze(0), sin.unsqueeze(0)), mask)[0]
    caches, numbers = _caches(layer), (CONFIG.num_attention_heads, layer.scale, CONFIG.rope_theta)
    outs, cursor = [], 0
    for part in torch.split(x, widths):
        outs.append(mla_attention(*_arguments(layer, part), *caches, torch.tensor([cursor]), *numbers))
        cursor += len(part)
    # Expanded in the model, absorbed here: equal up to rounding of sums of at most 64 values of size ~1.
    torch.testing.assert_close(torch.cat(outs), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck_and_the_functional_twin(dtype: torch.dtype) -> None:
    layer = _layer(torch.Generator().manual_seed(0))
    tensors = [part.to(dtype) for part in (*_arguments(layer, torch.randn(3, CONFIG.hidden_size)), *_caches(layer))]
    rest = (torch.tensor([5]), CONFIG.num_attention_heads, layer.scale, CONFIG.rope_theta)
    before = [cache.clone() for cache in tensors[4:]]
    out, latent_cache, k_pe_cache = cast(tuple[Tensor, ...], mla_attention_functional(*tensors, *rest))
    assert all(torch.equal(cache, old) for cache, old in zip(tensors[4:], before, strict=True))
    torch.library.opcheck(mla_attention, (*[part.clone() for part in tensors], *rest))
    torch.library.opcheck(mla_attention_functional, (*tensors, *rest))
    assert torch.equal(mla_attention(*tensors, *rest), out)
    assert torch.equal(tensors[4], latent_cache)
    assert torch.equal(tensors[5], k_pe_cache)
    changed = [(new != old).any(1).nonzero().flatten().tolist() for new, old in zip(tensors[4:], before, strict=True)]
    assert changed == [[5, 6, 7]] * 2
