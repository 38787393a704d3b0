"""torch.ops.trtvlm.gqa_attention; CUDA has kernels, other devices and what these do not take run the reference."""

import torch
from torch import Tensor

from trtvlm.plugins.gqa_attention import reference
from trtvlm.plugins.shapes import require


@torch.library.custom_op("trtvlm::gqa_attention", mutates_args=("k_cache", "v_cache"))
def gqa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cursor: Tensor,
    heads: int,
    scale: float,
    rope_theta: float,
) -> Tensor:
    """`reference.gqa_attention`: writes the caches in place."""
    return reference.gqa_attention(q, k, v, k_cache, v_cache, cursor, heads, scale, rope_theta)


@gqa_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cursor: Tensor,
    heads: int,
    scale: float,
    rope_theta: float,
) -> Tensor:
    require(q.shape[1] == heads * k_cache.shape[2], "q and the cache disagree on the width of a head")
    require(heads % k_cache.shape[0] == 0, "query heads must share key heads evenly")
    return torch.empty_like(q)


@gqa_attention.register_kernel("cuda")
def _on_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cursor: Tensor,
    heads: int,
    scale: float,
    rope_theta: float,
) -> Tensor:
    from trtvlm.plugins.gqa_attention import device

    if not device.supports(q, k_cache, v_cache, heads, scale):
        return reference.gqa_attention(q, k, v, k_cache, v_cache, cursor, heads, scale, rope_theta)
    return device.gqa_attention(q, k, v, k_cache, v_cache, cursor, heads, rope_theta)


@torch.library.custom_op("trtvlm::gqa_attention_functional", mutates_args=())
def gqa_attention_functional(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cursor: Tensor,
    heads: int,
    scale: float,
    rope_theta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """For export, where values are never overwritten: returns the caches too, which a plugin aliases to its inputs."""
    caches = k_cache.clone(), v_cache.clone()
    return gqa_attention(q, k, v, *caches, cursor, heads, scale, rope_theta), *caches


@gqa_attention_functional.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cursor: Tensor,
    heads: int,
    scale: float,
    rope_theta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k_cache), torch.empty_like(v_cache)
