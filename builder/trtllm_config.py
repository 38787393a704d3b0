"""config.json of an engine directory, as TensorRT-LLM writes it: version, pretrained_config, build_config."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from trtvlm import __version__
from trtvlm.model.artifacts import FORMAT_VERSION
from trtvlm.model.config import LanguageConfig, ModelConfig
from trtvlm.plugins.int4_linear.packing import GROUP_SIZE
from trtvlm.plugins.quantized_checkpoint import ALGORITHMS, QUANTIZATIONS, Kind

# The release whose formats these are, the last with a TensorRT backend.
TENSORRT_LLM_VERSION = "1.2.1"

_KEPT = ["*router", "*vocab_embedding", "*fused_a", "*kv_b_proj"]


@dataclass(frozen=True)
class BuildConfig:
    """What an engine is built for: the `build_config` of config.json.

    sm: compute capability (86 is 8.6). max_seq_len: positions of the cache. max_draft_len: drafted tokens a step, so
    that decoding is at most max_draft_len + 1 rows wide. engines: whether they were compiled.
    """

    sm: int = 86
    max_seq_len: int = 4096
    max_draft_len: int = 7
    max_batch_size: int = 1
    max_beam_width: int = 1
    strongly_typed: bool = True
    flavour: str = "tensorrt-rtx"
    engines: bool = True

    @property
    def max_width(self) -> int:
        """Rows of the widest decode step."""
        return self.max_draft_len + 1


def engine_config(config: ModelConfig, quant: str, lm_head: Kind, build: BuildConfig) -> dict[str, Any]:
    """The whole config.json."""
    built = dataclasses.asdict(build) | {"max_input_len": build.max_seq_len, "max_num_tokens": build.max_seq_len}
    return {
        "version": TENSORRT_LLM_VERSION,
        "pretrained_config": pretrained_config(config.language, quant, lm_head),
        "build_config": built,
        "trtvlm": {"format_version": FORMAT_VERSION, "trtvlm_version": __version__},
    }


def pretrained_config(config: LanguageConfig, quant: str, lm_head: Kind) -> dict[str, Any]:
    """TensorRT-LLM's PretrainedConfig of the language model, with the keys its DeepseekV2Config adds."""
    # Only keys TensorRT-LLM's QuantConfig has: it refuses others. How the LM head is stored, its tensors' names say.
    quantization: dict[str, Any] = {
        "quant_algo": ALGORITHMS[quant],
        "kv_cache_quant_algo": None,
        "exclude_modules": _KEPT + ([] if lm_head == QUANTIZATIONS[quant] and lm_head != "fp16" else ["*lm_head"]),
    }
    if quant == "int4_awq":
        quantization |= {"group_size": GROUP_SIZE, "has_zero_point": False, "pre_quant_scale": True}
    latent = (config.kv_lora_rank or 0) + config.qk_rope_head_dim
    return {
        "producer": {"name": "trtvlm", "version": __version__},
        "architecture": "DeepseekV2ForCausalLM" if config.use_mla else "DeepseekForCausalLM",
        "dtype": "float16",
        "logits_dtype": "float32",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": 1 if config.use_mla else config.num_key_value_heads,
        "head_size": latent if config.use_mla else config.head_dim,
        "intermediate_size": config.intermediate_size,
        "norm_epsilon": config.rms_norm_eps,
        "hidden_act": "swiglu",
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": config.rope_theta,
        "rotary_scaling": None,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "share_embedding_table": False,
        "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
        "quantization": quantization,
        "kv_lora_rank": config.kv_lora_rank,
        "q_lora_rank": config.q_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
        "moe_inter_size": config.moe_intermediate_size,
        "first_k_dense_replace": config.first_k_dense_replace,
        "moe_layer_freq": config.moe_layer_freq,
        "topk_method": config.topk_method,
        "moe": {
            "num_experts": config.n_routed_experts or 0,
            "shared_expert_intermediate_size": config.moe_intermediate_size * (config.n_shared_experts or 0),
            "top_k": config.num_experts_per_tok or 0,
            # TensorRT-LLM's numbering: 0 takes the scores as they are, 1 renormalises the chosen ones.
            "normalization_mode": int(config.norm_topk_prob),
            "device_limited_n_group": config.n_group or 1,
            "device_limited_topk_group": config.topk_group or 1,
            "device_limited_routed_scaling_factor": config.routed_scaling_factor,
            "topk_method": config.topk_method,
        },
    }
