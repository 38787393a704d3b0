"""Bytes that one decode step moves between the GPU's memory and its chip, by part."""

from __future__ import annotations

from trtvlm.builder.planner.parts import EMBEDDINGS, LANGUAGE, ROUTED, language_parts
from trtvlm.model.config import LanguageConfig
from trtvlm.plugins.quantized_checkpoint import Kind

CACHE = "KV cache"
_HALF = 2


def expected_experts(experts: int, chosen: int, rows: int) -> float:
    """Distinct experts of `experts` after `rows` independent, even draws of `chosen` different ones.

    An expert is missed by one row with probability 1 - chosen / experts, and so by all with that to the power of rows.
    """
    return experts * (1 - (1 - chosen / experts) ** rows)


def cache_width(config: LanguageConfig) -> int:
    """Halves a position takes in one layer: the latent and the shared rotated key, or all heads' keys and values."""
    if config.use_mla:
        return (config.kv_lora_rank or 0) + config.qk_rope_head_dim
    return 2 * config.num_key_value_heads * config.head_dim


def step_bytes(config: LanguageConfig, kind: Kind, lm_head: Kind, rows: int, context: int) -> dict[str, float]:
    """Expected bytes of one step of `rows` tokens over `context` cached positions, by part.

    Every weight that is needed is read once, whatever the rows: all but the experts that no row chose, and of the embeddings
    a row a token. The cache is read once and grows by `rows`. Activations stay in the chip's caches and are left out.
    """
    weights = language_parts(config, kind, lm_head)
    found: dict[str, float] = {name: weights[name].device_bytes for name in LANGUAGE}
    found[EMBEDDINGS] = _HALF * rows * config.hidden_size
    experts, chosen = config.n_routed_experts or 0, config.num_experts_per_tok or 0
    if experts:
        found[ROUTED] *= expected_experts(experts, chosen, rows) / experts
    found[CACHE] = _HALF * (context + rows) * config.num_hidden_layers * cache_width(config)
    return found
