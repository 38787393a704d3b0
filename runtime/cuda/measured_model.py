"""A language model to measure: weights from a checkpoint or from random numbers, a cache, and its decode program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from trtvlm.model.cache import KVCache, LatentCache
from trtvlm.runtime.cuda.decode import DecodeProgram
from trtvlm.runtime.cuda.measure_decode import fill_cache
from trtvlm.runtime.cuda.weights import Checkpoint, LanguageWeights, load_weights

if TYPE_CHECKING:
    from torch import Tensor

POSITIONS = 4096


@dataclass(frozen=True)
class MeasuredModel:
    """Weights, a cache of random contents, and the program over them; lm_head says how the head is stored."""

    weights: LanguageWeights
    cache: KVCache
    program: DecodeProgram
    lm_head: str

    @classmethod
    def load(cls, checkpoint: Checkpoint, rows: int, positions: int = POSITIONS) -> MeasuredModel:
        """On the current GPU, for steps of up to `rows` rows. UserError: what the kernels do not run."""
        return cls.over(load_weights(checkpoint), checkpoint.lm_head, rows, positions)

    @classmethod
    def over(cls, weights: LanguageWeights, lm_head: str, rows: int, positions: int = POSITIONS) -> MeasuredModel:
        """With weights that are there already."""
        config = weights.config
        device = weights.embedding.device
        cache = KVCache(config, 1, min(positions, config.max_position_embeddings), torch.half, device)
        fill_cache(cache_tensors(cache))
        return cls(weights, cache, DecodeProgram(weights, cache, rows), lm_head)


def cache_tensors(cache: KVCache) -> list[Tensor]:
    """All tensors of a cache."""
    return [
        tensor
        for layer in cache.layers
        for tensor in ((layer.latent, layer.k_pe) if isinstance(layer, LatentCache) else (layer.k, layer.v))
    ]
