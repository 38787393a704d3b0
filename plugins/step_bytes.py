"""Bytes that one decode step must move between the GPU's memory and its chip, tensor by tensor.

The planner adds them up by part of the model, the benchmark by kernel: both count the same bytes.
"""

from __future__ import annotations

import math

from trtvlm.model.cache_kind import CacheKind
from trtvlm.model.config import LanguageConfig
from trtvlm.plugins.quantized_checkpoint import PREQUANT, SCALES, Kind, Spec, layer_prefix, layout

CACHE = "KV cache"
EMBEDDING = "transformer.vocab_embedding.weight"
_HALF = 2


def device_bytes(name: str, spec: Spec) -> int:
    """A tensor as the kernels keep it: INT4's scales in half, and AWQ's scale once for all experts of a layer."""
    dtype, shape = spec
    if name.endswith(SCALES["int4"]):
        return _HALF * math.prod(shape)
    if name.endswith(PREQUANT):
        return shape[-1] * dtype.itemsize
    return math.prod(shape) * dtype.itemsize


def expected_experts(experts: int, chosen: int, rows: int) -> float:
    """Distinct experts of `experts` after `rows` independent, even draws of `chosen` different ones.

    An expert is missed by one row with probability 1 - chosen / experts, and so by all with that to the power of rows.
    """
    return experts * (1 - (1 - chosen / experts) ** rows)


def position_bytes(config: LanguageConfig, kv_cache: CacheKind) -> int:
    """Bytes a position takes in one layer: the latent and the shared rotated key, or all heads' keys and values."""
    if not config.use_mla:
        return _HALF * 2 * config.num_key_value_heads * config.head_dim
    rank = config.kv_lora_rank or 0
    latent = rank + _HALF if kv_cache == "int8" else _HALF * rank  # codes and a scale
    return latent + _HALF * config.qk_rope_head_dim


def moved_bytes(
    config: LanguageConfig, kind: Kind, lm_head: Kind, rows: int, context: int, kv_cache: CacheKind = "fp16"
) -> dict[str, float]:
    """Expected bytes of one step of `rows` tokens over `context` cached positions: of each tensor of the checkpoint, and CACHE.

    Every weight that is needed is read once, whatever the rows: all but the experts that no row chose, and of the embeddings
    a row a token. The cache is read once and grows by `rows`. Activations stay in the chip's caches and are left out.
    """
    experts, chosen = config.n_routed_experts or 0, config.num_experts_per_tok or 0
    share = expected_experts(experts, chosen, rows) / experts if experts else 0.0
    routed = {
        layer_prefix(layer) + part for layer in range(config.num_hidden_layers) if config.is_moe(layer)
        for part in ("mlp.fc", "mlp.proj")
    }  # fmt: skip
    found: dict[str, float] = {}
    for name, spec in layout(config, kind, lm_head).items():
        size = device_bytes(name, spec)
        found[name] = size * share if name.rpartition(".")[0] in routed else size
    found[EMBEDDING] = _HALF * rows * config.hidden_size
    found[CACHE] = (context + rows) * config.num_hidden_layers * position_bytes(config, kv_cache)
    return found
