"""A language model to measure: weights that are there already, a cache of random contents, and its decode program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from trtvlm.model.cache import KVCache, LatentCache
from trtvlm.runtime.cuda.decode import DecodeProgram

if TYPE_CHECKING:
    from torch import Tensor

    from trtvlm.runtime.cuda.weights import LanguageWeights

POSITIONS = 4096


@dataclass(frozen=True)
class MeasuredModel:
    """Weights, cache and the program over them."""

    weights: LanguageWeights
    cache: KVCache
    program: DecodeProgram

    @classmethod
    def over(cls, weights: LanguageWeights, rows: int, positions: int = POSITIONS) -> MeasuredModel:
        """For steps of up to `rows` rows. What is attended to must be finite, and not all the same."""
        config, device = weights.config, weights.embedding.device
        cache = KVCache(config, 1, min(positions, config.max_position_embeddings), torch.half, device)
        for number, tensor in enumerate(cache_tensors(cache)):
            tensor.normal_(generator=torch.Generator(device).manual_seed(number))
        return cls(weights, cache, DecodeProgram(weights, cache, rows))


def cache_tensors(cache: KVCache) -> list[Tensor]:
    """All tensors of a cache."""
    return [
        tensor
        for layer in cache.layers
        for tensor in ((layer.latent, layer.k_pe) if isinstance(layer, LatentCache) else (layer.k, layer.v))
    ]
