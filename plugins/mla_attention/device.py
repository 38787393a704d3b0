"""`mla_attention` on the device: the decoding kernels, for few rows."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from trtvlm.model.rope import rope_table
from trtvlm.plugins.cuda.repacked import Repacked
from trtvlm.plugins.int4_linear.decode import MOST_ROWS
from trtvlm.plugins.mla_attention.decode import CHUNK, MOST_POSITIONS, MLAWeights, MLAWorkspace, mla_decode

_MOST_RANK = 512


def _pack(kv_b: Tensor, heads: int, nope: int, rope: int) -> MLAWeights:
    return MLAWeights.pack(kv_b.half(), None, heads, nope, rope)


_weights = Repacked(_pack)


def supports(
    q: Tensor, k_pe: Tensor, kv_b_proj: Tensor, latent_cache: Tensor, k_pe_cache: Tensor, heads: int, scale: float
) -> bool:
    """Whether the kernels take these: up to 16 rows of halves over halves, the usual scale, and sizes in whole tiles."""
    rows, rope = k_pe.shape
    nope = q.shape[1] // heads - rope
    value, rank = kv_b_proj.shape[0] // heads - nope, kv_b_proj.shape[1]
    caches = (latent_cache, k_pe_cache)
    return (
        q.dtype == latent_cache.dtype == k_pe_cache.dtype == torch.half
        and 0 < rows <= MOST_ROWS
        and all(cache.is_contiguous() for cache in caches)
        and 0 < latent_cache.shape[0] <= MOST_POSITIONS
        and latent_cache.shape[0] % CHUNK == 0  # whole chunks are read, wherever the cursor is
        and rank % 64 == rope % 16 == value % 16 == nope % 16 == 0
        and 0 < rank <= _MOST_RANK
        and -(-nope // 64) * 64 <= nope + rope
        and math.isclose(scale, (nope + rope) ** -0.5, rel_tol=1e-6)
    )


def mla_attention(
    q: Tensor,
    latent: Tensor,
    k_pe: Tensor,
    kv_b_proj: Tensor,
    latent_cache: Tensor,
    k_pe_cache: Tensor,
    cursor: Tensor,
    heads: int,
    rope_theta: float,
) -> Tensor:
    """`reference.mla_attention` of what `supports` allows."""
    rows, rope = k_pe.shape
    weights = _weights(kv_b_proj, numbers=(heads, q.shape[1] // heads - rope, rope))
    positions = latent_cache.shape[0]
    workspace = MLAWorkspace.allocate(rows, positions, heads, weights.rank, rope, q.device)
    out = q.new_empty(rows, heads * weights.value)
    mla_decode(
        q.contiguous(), (latent.half().contiguous(), k_pe.half().contiguous()), weights,
        rope_tables(rope, positions, rope_theta, q.device), latent_cache, k_pe_cache, cursor.to(torch.int32), out,
        workspace, rows, positions,
    )  # fmt: skip
    return out


@lru_cache(maxsize=16)
def rope_tables(dim: int, positions: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """`rope_table` on a device, kept for the next call."""
    # Made outside of any inference mode: what is kept may be used in and out of it.
    with torch.inference_mode(False):
        return rope_table(dim, positions, theta, device)
