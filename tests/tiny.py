"""Small random DeepSeek-VL2 models and whole checkpoint folders of them, for tests that need no trained weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from trtvlm.model.checkpoint import save_model
from trtvlm.model.config import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from trtvlm.model.vlm import DeepseekVL2

GOLDEN = Path(__file__).parent / "golden" / "official"

# Every dimension that INT4 groups of 64 divide is a multiple of 64.
_COMMON: dict[str, Any] = {
    "vocab_size": 544,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_shared_experts": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_MLA: dict[str, Any] = {"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
_KINDS: dict[str, dict[str, Any]] = {
    "mla": _MLA,
    "mha": {"use_mla": False, "kv_lora_rank": None, "qk_nope_head_dim": 0, "qk_rope_head_dim": 0, "v_head_dim": 0},
    "base": _MLA
    | {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 2.0}
    | {"n_group": 1, "topk_group": 1},
}
_TILE = 32


def tiny_config(kind: str) -> ModelConfig:
    """A configuration of `kind` "mla" (as Small), "mha" (as Tiny) or "base" (as the 27B: sigmoid routing, a bias)."""
    grids = [(w, h) for w in range(1, 5) for h in range(1, 5)]
    return ModelConfig(
        vision=VisionConfig(image_size=_TILE, patch_size=8, width=64, layers=2, heads=2, mlp_ratio=2.0),
        projector=ProjectorConfig(input_dim=64, n_embed=64),
        language=LanguageConfig(**_COMMON, **_KINDS[kind]),
        candidate_resolutions=tuple(
            (w * _TILE, h * _TILE) for w, h in sorted(grids, key=lambda grid: grid[0] * grid[1])
        ),
        torch_dtype="float32",
    )


def tiny_model(kind: str, seed: int = 0) -> DeepseekVL2:
    """A random model in float32, spread enough for its logits to have clear winners."""
    generator = torch.Generator().manual_seed(seed)
    model = DeepseekVL2(tiny_config(kind)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith("e_score_correction_bias"):
            parameter.uniform_(-0.1, 0.1, generator=generator)
        else:
            scale = 1.0 if "embed_tokens" in name else parameter.shape[-1] ** -0.5
            parameter.normal_(0.0, scale, generator=generator)
    return model


def tiny_checkpoint(folder: Path, kind: str, seed: int = 0, dtype: torch.dtype = torch.float16) -> Path:
    """Write `tiny_model` with a tokenizer and processor configuration: a whole checkpoint folder."""
    model = tiny_model(kind, seed)
    save_model(model, folder, dtype)
    source = GOLDEN / "tiny-like" / "model"
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(source / name, folder / name)
    processor = json.loads((source / "processor_config.json").read_text(encoding="utf-8"))
    processor |= {
        "candidate_resolutions": [list(size) for size in model.config.candidate_resolutions],
        "patch_size": model.config.vision.patch_size,
    }
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=1), encoding="utf-8")
    return folder
