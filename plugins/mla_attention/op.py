"""torch.ops.trtvlm.mla_attention; CUDA has kernels, other devices and what these do not take run the reference."""

import torch
from torch import Tensor

from trtvlm.plugins.mla_attention import reference
from trtvlm.plugins.shapes import require


@torch.library.custom_op("trtvlm::mla_attention", mutates_args=("latent_cache", "k_pe_cache"))
def mla_attention(
    q: Tensor,
    latent: Tensor,
    k_pe: Tensor,
    kv_b_proj: Tensor,
    latent_cache: Tensor,
    k_pe_cache: Tensor,
    cursor: Tensor,
    heads: int,
    scale: float,
    rope_theta: float,
) -> Tensor:
    """`reference.mla_attention`: writes the caches in place."""
    return reference.mla_attention(
        q, latent, k_pe, kv_b_proj, latent_cache, k_pe_cache, cursor, heads, scale, rope_theta
    )


@mla_attention.register_fake
def _(
    q: Tensor,
    latent: Tensor,
    k_pe: Tensor,
    kv_b_proj: Tensor,
    latent_cache: Tensor,
    k_pe_cache: Tensor,
    cursor: Tensor,
    heads: int,
    scale: float,
    rope_theta: float,
) -> Tensor:
    require(latent.shape[1] == kv_b_proj.shape[1], "latent and kv_b_proj disagree on the rank")
    nope = q.shape[1] // heads - k_pe.shape[1]
    return q.new_empty(q.shape[0], kv_b_proj.shape[0] - heads * nope)


@mla_attention.register_kernel("cuda")
def _on_cuda(
    q: Tensor,
    latent: Tensor,
    k_pe: Tensor,
    kv_b_proj: Tensor,
    latent_cache: Tensor,
    k_pe_cache: Tensor,
    cursor: Tensor,
    heads: int,
    scale: float,
    rope_theta: float,
) -> Tensor:
    from trtvlm.plugins.mla_attention import device

    if not device.supports(q, k_pe, kv_b_proj, latent_cache, k_pe_cache, heads, scale):
        return reference.mla_attention(
            q, latent, k_pe, kv_b_proj, latent_cache, k_pe_cache, cursor, heads, scale, rope_theta
        )
    return device.mla_attention(q, latent, k_pe, kv_b_proj, latent_cache, k_pe_cache, cursor, heads, rope_theta)


@torch.library.custom_op("trtvlm::mla_attention_functional", mutates_args=())
def mla_attention_functional(
    q: Tensor,
    latent: Tensor,
    k_pe: Tensor,
    kv_b_proj: Tensor,
    latent_cache: Tensor,
    k_pe_cache: Tensor,
    cursor: Tensor,
    heads: int,
    scale: float,
    rope_theta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """For export, where values are never overwritten: returns the caches too, which a plugin aliases to its inputs."""
    caches = latent_cache.clone(), k_pe_cache.clone()
    return mla_attention(q, latent, k_pe, kv_b_proj, *caches, cursor, heads, scale, rope_theta), *caches


@mla_attention_functional.register_fake
def _(
    q: Tensor,
    latent: Tensor,
    k_pe: Tensor,
    kv_b_proj: Tensor,
    latent_cache: Tensor,
    k_pe_cache: Tensor,
    cursor: Tensor,
    heads: int,
    scale: float,
    rope_theta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    nope = q.shape[1] // heads - k_pe.shape[1]
    out = q.new_empty(q.shape[0], kv_b_proj.shape[0] - heads * nope)
    return out, torch.empty_like(latent_cache), torch.empty_like(k_pe_cache)
