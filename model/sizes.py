"""The published sizes of the official models, to plan for and measure without their checkpoints."""

from __future__ import annotations

from trtvlm.model.checkpoint import resolve_model
from trtvlm.model.config import LanguageConfig, ModelConfig
from trtvlm.model.errors import UserError

# DeepSeek-VL2 (arXiv 2412.10302, table 1) and the published config.json files. What is absent has the official default.
_LANGUAGE: dict[str, dict[str, object]] = {
    "deepseek-vl2-tiny": {
        "vocab_size": 129280, "hidden_size": 1280, "intermediate_size": 6848, "moe_intermediate_size": 896,
        "num_hidden_layers": 12, "num_attention_heads": 10, "num_key_value_heads": 10, "use_mla": False,
        "kv_lora_rank": None, "qk_nope_head_dim": 0, "qk_rope_head_dim": 0, "v_head_dim": 0,
    },
    "deepseek-vl2-small": {
        "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
        "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    },
    "deepseek-vl2": {
        "vocab_size": 129280, "hidden_size": 2560, "intermediate_size": 12288, "moe_intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 32, "num_key_value_heads": 32, "n_routed_experts": 72,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 2.0,
    },
}  # fmt: skip
_COMMON: dict[str, object] = {
    "n_shared_experts": 2, "n_routed_experts": 64, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
    "q_lora_rank": None, "n_group": 1, "topk_group": 1, "max_position_embeddings": 4096, "bos_token_id": 0,
    "eos_token_id": 1, "topk_method": "greedy",
}  # fmt: skip

SIZES = tuple(_LANGUAGE)


def language_size(name: str) -> LanguageConfig:
    """The language model of an official size, or of any model that can be resolved. UserError: neither."""
    if name in _LANGUAGE:
        return LanguageConfig(**(_COMMON | _LANGUAGE[name]))  # type: ignore[arg-type]
    try:
        return ModelConfig.from_pretrained(resolve_model(name)).language
    except UserError as error:
        raise UserError(f"'{name}' is none of {', '.join(SIZES)}, and no model either: {error}") from None
