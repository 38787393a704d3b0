"""Rotary position embedding (Su et al., arXiv 2104.09864) in the two pairings DeepSeek-VL2 uses."""

import torch
from torch import Tensor


def rope_table(dim: int, length: int, theta: float, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [length, dim / 2], of position * theta^(-2i / dim).

    Always float32: in bfloat16 neighbouring positions past 256 would share a rotation.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
    return angles.cos(), angles.sin()


def rotate_half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + d/2) of the last dimension: x [..., d], cos and sin broadcastable to [..., d/2]."""
    low, high = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def rotate_adjacent(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (2i, 2i + 1) of the last dimension: the result is in half-split order, as in the official cache."""
    de_interleaved = torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)
    return rotate_half_split(de_interleaved, cos, sin)
