"""What mla_attention means."""

import torch
from torch import Tensor

from trtvlm.model.rope import rotate_adjacent


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
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) of M new rows at positions cursor + row.

    q [M, heads * (nope + rope)], per head [nope | rope]; latent [M, rank], already normalised; k_pe [M, rope], one for
    all heads. The rope parts come in the checkpoint's order (adjacent pairs) and are rotated here. kv_b_proj
    [heads * (nope + v), rank], per head [nope | v]; its key half is absorbed into the query and its value half applied
    after the sum, so that nothing is expanded.

    latent_cache [S, rank] and k_pe_cache [S, rope] (rotated, in half-split order) get the new rows at
    cursor..cursor + M - 1, in place; row i sees positions 0..cursor + i. cursor: integer tensor [1], as it lies on the
    device. What the caches hold further on must be finite. Softmax in float32 -> [M, heads * v] in q's dtype.
    """
    rows, rope = k_pe.shape
    nope = q.shape[1] // heads - rope
    positions = cursor.long() + torch.arange(rows, device=q.device)
    cos, sin = rope_of(positions, rope, rope_theta)
    q_nope, q_pe = q.view(rows, heads, nope + rope).tensor_split([nope], dim=-1)
    q_pe = rotate_adjacent(q_pe, cos.unsqueeze(1), sin.unsqueeze(1))
    latent_cache.index_copy_(0, positions, latent.to(latent_cache.dtype))
    k_pe_cache.index_copy_(0, positions, rotate_adjacent(k_pe, cos, sin).to(k_pe_cache.dtype))

    key, value = kv_b_proj.view(heads, -1, kv_b_proj.shape[1]).to(q.dtype).tensor_split([nope], dim=1)
    q_latent = torch.einsum("mhn,hnr->mhr", q_nope, key)
    cached, cached_pe = latent_cache.to(q.dtype), k_pe_cache.to(q.dtype)
    scores = torch.einsum("mhr,sr->mhs", q_latent, cached) + torch.einsum("mhp,sp->mhs", q_pe, cached_pe)
    ahead = torch.arange(cached.shape[0], device=q.device) > positions.view(-1, 1, 1)
    probabilities = (scores.float() * scale).masked_fill(ahead, float("-inf")).softmax(-1).to(q.dtype)
    mixed = torch.einsum("mhs,sr->mhr", probabilities, cached)
    return torch.einsum("mhr,hvr->mhv", mixed, value).flatten(1)


def rope_of(positions: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Float32 cosines and sines [M, dim / 2] of integer positions [M], as `trtvlm.model.rope.rope_table` has them."""
    steps = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
    angles = torch.outer(positions.float(), 1.0 / theta**steps)
    return angles.cos(), angles.sin()
