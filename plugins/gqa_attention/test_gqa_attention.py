"""gqa_attention against the model's own attention, in one call and in several, with and without shared key heads."""

import dataclasses
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tiny import tiny_config
from trtvlm.model.attention import MultiHeadAttention, causal_mask
from trtvlm.model.rope import rope_table
from trtvlm.plugins.gqa_attention.op import gqa_attention, gqa_attention_functional

SPAN = 24


def _layer(heads: int, kv_heads: int, generator: torch.Generator) -> MultiHeadAttention:
    config = dataclasses.replace(tiny_config("mha").language, num_attention_heads=heads, num_key_value_heads=kv_heads)
    layer = MultiHeadAttention(config).requires_grad_(False)
    for parameter in layer.parameters():
        parameter.normal_(0.0, 0.2, generator=generator)
    # The operator ends before the output projection; an identity shows what it is given.
    layer.o_proj.weight.copy_(torch.eye(layer.o_proj.in_features))
    return layer


def _arguments(layer: MultiHeadAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)


def _caches(layer: MultiHeadAttention) -> tuple[Tensor, Tensor]:
    # What lies ahead of the cursor is left over from a rollback: it must not be seen.
    return torch.randn(layer.kv_heads, SPAN, layer.head_dim), torch.randn(layer.kv_heads, SPAN, layer.head_dim)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([(2, 2), (4, 2), (4, 1)]),
    st.lists(st.integers(1, 8), min_size=1, max_size=3),
)
def test_equals_the_model_however_it_is_cut(seed: int, heads: tuple[int, int], widths: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = _layer(*heads, generator)
    rows = sum(widths)
    x = torch.randn(rows, 64, generator=generator)
    cos, sin = rope_table(layer.head_dim, rows, 10_000.0)
    mask = causal_mask(rows, 0, None, torch.device("cpu"))
    expected = layer(x.unsqueeze(0), (cos.unsqueeze(0), sin.unsqueeze(0)), mask)[0]
    caches, numbers = _caches(layer), (layer.heads, layer.head_dim**-0.5, 10_000.0)
    outs, cursor = [], 0
    for part in torch.split(x, widths):
        outs.append(gqa_attention(*_arguments(layer, part), *caches, torch.tensor([cursor]), *numbers))
        cursor += len(part)
    # Two orders of adding at most 64 values of size ~1.
    torch.testing.assert_close(torch.cat(outs), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck_and_the_functional_twin(dtype: torch.dtype) -> None:
    layer = _layer(4, 2, torch.Generator().manual_seed(0))
    tensors = [part.to(dtype) for part in (*_arguments(layer, torch.randn(3, 64)), *_caches(layer))]
    rest = (torch.tensor([5]), 4, layer.head_dim**-0.5, 10_000.0)
    before = [cache.clone() for cache in tensors[3:]]
    out, k_cache, v_cache = cast(tuple[Tensor, ...], gqa_attention_functional(*tensors, *rest))
    assert all(torch.equal(cache, old) for cache, old in zip(tensors[3:], before, strict=True))
    torch.library.opcheck(gqa_attention, (*[part.clone() for part in tensors], *rest))
    torch.library.opcheck(gqa_attention_functional, (*tensors, *rest))
    assert torch.equal(gqa_attention(*tensors, *rest), out)
    assert torch.equal(tensors[3], k_cache)
    assert torch.equal(tensors[4], v_cache)
    differs = (tensors[3] != before[0]).any(2).any(0)
    assert differs.nonzero().flatten().tolist() == [5, 6, 7]
