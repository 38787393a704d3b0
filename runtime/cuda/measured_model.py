"""A language model to measure: weights that are there already, a cache of random contents, and its decode program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from trtvlm.model.cache import HeadCache, KVCache
from trtvlm.runtime.cuda.decode import DecodeProgram

if TYPE_CHECKING:
    from trtvlm.model.cache_kind import CacheKind
    from trtvlm.runtime.cuda.weights import LanguageWeights

POSITIONS = 4096


@dataclass(frozen=True)
class MeasuredModel:
    """Weights, cache and the program over them."""

    weights: LanguageWeights
    cache: KVCache
    program: DecodeProgram

    @classmethod
    def over(
        cls, weights: LanguageWeights, rows: int, positions: int = POSITIONS, kv_cache: CacheKind = "fp16"
    ) -> MeasuredModel:
        """For steps of up to `rows` rows. What is attended to must be finite, and not all the same."""
        config, device = weights.config, weights.embedding.device
        cache = KVCache(config, 1, min(positions, config.max_position_embeddings), torch.half, device, kv_cache)
        generator = torch.Generator(device).manual_seed(0)
        for layer in cache.layers:
            if isinstance(layer, HeadCache):
                for tensor in layer.tensors():
                    tensor.normal_(generator=generator)
            else:
                sizes = layer.latent.shape, layer.k_pe.shape
                layer.write(0, *(torch.randn(size, generator=generator, device=device) for size in sizes))
        return cls(weights, cache, DecodeProgram(weights, cache, rows))
