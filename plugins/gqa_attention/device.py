"""`gqa_attention` on the device: the decoding kernels, for few rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trtvlm.plugins.gqa_attention.decode import MOST_POSITIONS, GQAWorkspace, gqa_decode
from trtvlm.plugins.int4_linear.decode import MOST_ROWS
from trtvlm.plugins.mla_attention.device import rope_tables


def supports(q: Tensor, k_cache: Tensor, v_cache: Tensor, heads: int, scale: float) -> bool:
    """Whether the kernels take these: up to 16 rows of halves over halves, the usual scale, heads of 16 to 128."""
    kv_heads, positions, width = k_cache.shape
    return (
        q.dtype == k_cache.dtype == v_cache.dtype == torch.half
        and 0 < q.shape[0] <= MOST_ROWS
        and k_cache.is_contiguous()
        and v_cache.is_contiguous()
        and positions <= MOST_POSITIONS
        and heads % kv_heads == 0
        and heads // kv_heads <= 2
        and width % 16 == 0
        and 0 < width <= 128
        and math.isclose(scale, width**-0.5, rel_tol=1e-6)
    )


def gqa_attention(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cursor: Tensor, heads: int, rope_theta: float
) -> Tensor:
    """`reference.gqa_attention` of what `supports` allows."""
    rows = q.shape[0]
    _, positions, width = k_cache.shape
    workspace = GQAWorkspace.allocate(rows, positions, heads, width, q.device)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    gqa_decode(
        (q.contiguous(), k.half().contiguous(), v.half().contiguous()), heads,
        rope_tables(width, positions, rope_theta, q.device), k_cache, v_cache, cursor.to(torch.int32), out, workspace,
        rows, positions,
    )  # fmt: skip
    return out
