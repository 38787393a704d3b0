"""What the launches of `trtvlm.plugins.prefill.cuda` mean, in PyTorch on any device; the same arguments and roundings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trtvlm.model.latent_codes import quantize_latent
from trtvlm.model.rope import rotate_adjacent, rotate_half_split
from trtvlm.plugins.int4_moe.reference import Routing

Rope = tuple[Tensor, Tensor]


def add_norm(
    residual: Tensor,
    floats: Tensor | None,
    halves: Tensor | None,
    weight: Tensor,
    eps: float,
    scales: tuple[Tensor | None, ...],
) -> tuple[Tensor, ...]:
    """residual float32 [M, H] += floats + halves, in place; its norm times each scale, rounded once -> half [M, H] each."""
    for part in (floats, halves):
        if part is not None:
            residual += part
    normed = _normalised(residual, weight, eps)
    return tuple((normed if scale is None else normed * scale.float()).half() for scale in scales)


def route(
    residual: Tensor, norm: Tensor, eps: float, router: Tensor, bias: Tensor | None, routing: Routing
) -> tuple[Tensor, Tensor]:
    """Experts int64 [M, k] and their weights float32 [M, k] of the normalised residual stream float32 [M, H]."""
    return routing(F.linear(_normalised(residual, norm, eps), router), bias)


def append_latent(
    q: Tensor,
    kv: Tensor,
    norm: Tensor,
    rope: Rope,
    cursor: Tensor,
    latent_cache: Tensor,
    rope_cache: Tensor,
    scales: Tensor | None = None,
) -> None:
    """Rotate q half [M, heads, nope + rope] in place; append normalised latents (as codes with scales) and rotated key parts."""
    start, rows = int(cursor), q.shape[0]
    rank, turned = latent_cache.shape[1], rope_cache.shape[1]
    cos, sin = (table[start : start + rows] for table in rope)
    part = q[..., -turned:]
    part.copy_(rotate_adjacent(part.float(), cos.unsqueeze(1), sin.unsqueeze(1)))
    latent = _normalised(kv[:, :rank].float(), norm, 1e-6).half()
    if scales is None:
        latent_cache[start : start + rows] = latent
    else:
        latent_cache[start : start + rows], scales[start : start + rows] = quantize_latent(latent)
    rope_cache[start : start + rows] = rotate_adjacent(kv[:, rank:].float(), cos, sin)


def append_heads(qkv: Tensor, heads: int, rope: Rope, cursor: Tensor, key_cache: Tensor, value_cache: Tensor) -> None:
    """Rotate the queries of qkv half [M, heads + 2 * kv_heads, d] in place; append rotated keys, and values."""
    start, rows, kv_heads = int(cursor), qkv.shape[0], key_cache.shape[0]
    cos, sin = (table[start : start + rows].unsqueeze(1) for table in rope)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    q.copy_(rotate_half_split(q.float(), cos, sin))
    key_cache[:, start : start + rows] = rotate_half_split(k.float(), cos, sin).transpose(0, 1).half()
    value_cache[:, start : start + rows] = v.transpose(0, 1)


def attend(
    q: Tensor,
    keys: Tensor,
    shared_keys: Tensor | None,
    values: Tensor,
    cursor: Tensor,
    next_scale: Tensor | None = None,
) -> Tensor:
    """Causal attention of q half [M, heads, d] at the cursor over [S, kv_heads, ...] -> half [M, heads * v]."""
    start, rows, share = int(cursor), q.shape[0], q.shape[1] // keys.shape[1]
    if shared_keys is not None:
        keys = torch.cat((keys, shared_keys.unsqueeze(1).expand(-1, keys.shape[1], -1)), dim=-1)
    keys, values = (part.float().repeat_interleave(share, dim=1) for part in (keys, values))
    scores = torch.einsum("mhd,shd->hms", q.float(), keys) * q.shape[-1] ** -0.5
    position = torch.arange(keys.shape[0], device=q.device)
    unseen = position > start + torch.arange(rows, device=q.device).unsqueeze(1)
    mixed = scores.masked_fill(unseen, -torch.inf).softmax(-1)
    out = torch.einsum("hms,shv->mhv", mixed, values).flatten(1)
    return (out if next_scale is None else out * next_scale.float()).half()


def _normalised(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()
