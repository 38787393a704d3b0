"""What gqa_attention means."""

import torch
from torch import Tensor

from trtvlm.model.rope import rotate_half_split
from trtvlm.plugins.mla_attention.reference import rope_of


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
    """Causal attention of M new rows at positions cursor + row; heads / kv_heads query heads share a key head.

    q [M, heads * d], k and v [M, kv_heads * d], not rotated: q and k are rotated here, whole heads in half-split pairs.
    k_cache (rotated) and v_cache [kv_heads, S, d] get the new rows at cursor..cursor + M - 1, in place; row i sees
    positions 0..cursor + i. cursor: integer tensor [1], as it lies on the device. What the caches hold further on must
    be finite. Softmax in float32 -> [M, heads * d] in q's dtype.
    """
    rows = q.shape[0]
    kv_heads, span, width = k_cache.shape
    positions = cursor.long() + torch.arange(rows, device=q.device)
    cos, sin = (part.unsqueeze(1) for part in rope_of(positions, width, rope_theta))
    queries = rotate_half_split(q.view(rows, heads, width), cos, sin)
    keys = rotate_half_split(k.view(rows, kv_heads, width), cos, sin)
    k_cache.index_copy_(1, positions, keys.transpose(0, 1).to(k_cache.dtype))
    v_cache.index_copy_(1, positions, v.view(rows, kv_heads, width).transpose(0, 1).to(v_cache.dtype))

    # Query head h reads key head h // (heads / kv_heads).
    grouped = queries.view(rows, kv_heads, -1, width)
    scores = torch.einsum("mkgd,ksd->mkgs", grouped, k_cache.to(q.dtype)).float() * scale
    ahead = torch.arange(span, device=q.device) > positions.view(-1, 1, 1, 1)
    probabilities = scores.masked_fill(ahead, float("-inf")).softmax(-1).to(q.dtype)
    return torch.einsum("mkgs,ksd->mkgd", probabilities, v_cache.to(q.dtype)).flatten(1)
