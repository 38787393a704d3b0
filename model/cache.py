"""The key-value cache: preallocated, contiguous, rolled back by moving a cursor."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trtvlm.model.config import LanguageConfig


@dataclass
class LatentCache:
    """One MLA layer: normalised latent [B, S, kv_lora_rank] and the rotated key part all heads share [B, S, rope]."""

    latent: Tensor
    k_pe: Tensor


@dataclass
class HeadCache:
    """One MHA layer: rotated keys and values, each [B, kv_heads, S, head_dim]."""

    k: Tensor
    v: Tensor


LayerCache = LatentCache | HeadCache


class KVCache:
    """Room for `max_len` positions of `batch` sequences in every layer; `length` positions of it are filled.

    Layers write at `length`, the model advances it, and `rollback` forgets: nothing is copied or zeroed.
    """

    def __init__(
        self,
        config: LanguageConfig,
        batch: int,
        max_len: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.batch = batch
        self.max_len = max_len
        self.length = 0
        self.layers: list[LayerCache] = []
        for _ in range(config.num_hidden_layers):
            if config.use_mla:
                assert config.kv_lora_rank is not None
                latent = torch.zeros(batch, max_len, config.kv_lora_rank, dtype=dtype, device=device)
                k_pe = torch.zeros(batch, max_len, config.qk_rope_head_dim, dtype=dtype, device=device)
                self.layers.append(LatentCache(latent, k_pe))
            else:
                shape = (batch, config.num_key_value_heads, max_len, config.head_dim)
                k, v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
                self.layers.append(HeadCache(k, v))

    def advance(self, positions: int) -> None:
        """Count `positions` newly written ones. Raises ValueError past `max_len`."""
        if self.length + positions > self.max_len:
            raise ValueError(f"{self.length} + {positions} positions exceed the cache's {self.max_len}")
        self.length += positions

    def rollback(self, length: int) -> None:
        """Forget every position from `length` on. Raises ValueError when there are not that many."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot roll back to {length}: {self.length} positions are filled")
        self.length = length
