"""The key-value cache: preallocated, contiguous, rolled back by moving a cursor."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trtvlm.model.cache_kind import CacheKind
from trtvlm.model.config import LanguageConfig
from trtvlm.model.latent_codes import dequantize_latent, quantize_latent


@dataclass
class LatentCache:
    """One MLA layer: normalised latent [B, S, kv_lora_rank] and the rotated key part all heads share [B, S, rope].

    With `scales` half [B, S], the latent is held as int8 codes (`trtvlm.model.latent_codes`).
    """

    latent: Tensor
    k_pe: Tensor
    scales: Tensor | None = None

    def write(self, start: int, latent: Tensor, k_pe: Tensor) -> None:
        """Put latents [B, T, kv_lora_rank] and key parts [B, T, rope] at positions `start` and on."""
        place = slice(start, start + latent.shape[1])
        if self.scales is None:
            self.latent[:, place] = latent
        else:
            self.latent[:, place], self.scales[:, place] = quantize_latent(latent)
        self.k_pe[:, place] = k_pe

    def read(self, end: int) -> tuple[Tensor, Tensor]:
        """What attention sees of the first `end` positions: latents and key parts, both in the key parts' type."""
        latent, k_pe = self.latent[:, :end], self.k_pe[:, :end]
        if self.scales is None:
            return latent, k_pe
        return dequantize_latent(latent, self.scales[:, :end], k_pe.dtype), k_pe

    def tensors(self) -> list[Tensor]:
        """All of it."""
        return [tensor for tensor in (self.latent, self.k_pe, self.scales) if tensor is not None]


@dataclass
class HeadCache:
    """One MHA layer: rotated keys and values, each [B, kv_heads, S, head_dim]."""

    k: Tensor
    v: Tensor

    def tensors(self) -> list[Tensor]:
        """All of it."""
        return [self.k, self.v]


LayerCache = LatentCache | HeadCache


class KVCache:
    """Room for `max_len` positions of `batch` sequences in every layer; `length` positions of it are filled.

    Layers write at `length`, the model advances it, and `rollback` forgets: nothing is copied or zeroed. `kind` int8 holds
    latents as codes; keys and values of plain attention are held in `dtype` whatever it is.
    """

    def __init__(
        self,
        config: LanguageConfig,
        batch: int,
        max_len: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        kind: CacheKind = "fp16",
    ) -> None:
        self.batch = batch
        self.max_len = max_len
        self.length = 0
        self.layers: list[LayerCache] = []
        for _ in range(config.num_hidden_layers):
            if config.use_mla:
                assert config.kv_lora_rank is not None
                coded = kind == "int8"
                held = torch.int8 if coded else dtype
                latent = torch.zeros(batch, max_len, config.kv_lora_rank, dtype=held, device=device)
                k_pe = torch.zeros(batch, max_len, config.qk_rope_head_dim, dtype=dtype, device=device)
                scales = torch.zeros(batch, max_len, dtype=torch.half, device=device) if coded else None
                self.layers.append(LatentCache(latent, k_pe, scales))
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
