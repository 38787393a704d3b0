"""A draft from nothing: a smaller configuration that speaks the target's tokens, and first weights for it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trtvlm.model.config import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from trtvlm.model.errors import UserError
from trtvlm.model.norm import RMSNorm
from trtvlm.model.vlm import DeepseekVL2

# Every dimension of the language model stays a multiple of this, so that INT4 groups of 64 divide it.
_GROUP = 64
# What must stay the target's: the draft reads the very same tokens at the very same positions.
_KEPT = {
    "vision_config": {"image_size", "patch_size"},
    "projector_config": {"downsample_ratio", "input_dim", "n_embed"},
    "language_config": {"vocab_size", "bos_token_id", "eos_token_id", "max_position_embeddings"},
}


def shrunk_config(target: ModelConfig, overrides: dict[str, Any] | None = None) -> ModelConfig:
    """The configuration of a draft for `target`: the same tokens and tiles, plain attention, about an eighth the size.

    Half the width, layers and experts of the language model; two thirds of the vision tower's width and depth, which
    a draft can spare least: it has to read too. `overrides` is laid out as config.json ({"language_config": {...},
    "vision_config": {...}, "projector_config": {...}}) and wins.

    Raises UserError for an override that is unknown, would change the tokens, or makes no valid model.
    """
    tower, text = target.vision, target.language
    width = _rounded(tower.width * 2 / 3)
    hidden = _rounded(text.hidden_size / 2)
    heads = hidden // (128 if hidden >= 1024 else 64 if hidden >= 512 else 32)
    experts: dict[str, int | None] = {"n_routed_experts": None, "num_experts_per_tok": None, "n_shared_experts": None}
    if text.n_routed_experts is not None:
        routed = max(2, text.n_routed_experts // 2)
        top_k = min(text.num_experts_per_tok or 2, routed)
        experts = {"n_routed_experts": routed, "num_experts_per_tok": top_k, "n_shared_experts": text.n_shared_experts}
    raw = target.to_dict()
    sections: dict[str, dict[str, Any]] = {
        "vision_config": {
            "width": width,
            "heads": max(1, width // _head_width(tower)),
            "layers": max(1, round(tower.layers * 2 / 3)),
        },
        "projector_config": {},
        "language_config": {
            "hidden_size": hidden,
            "intermediate_size": _rounded(text.intermediate_size / 2),
            "moe_intermediate_size": _rounded(text.moe_intermediate_size / 2),
            "num_hidden_layers": max(2, text.num_hidden_layers // 2),
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "first_k_dense_replace": min(1, text.first_k_dense_replace),
            "use_mla": False,
            "q_lora_rank": None,
            "kv_lora_rank": None,
            "qk_nope_head_dim": 0,
            "qk_rope_head_dim": 0,
            "v_head_dim": 0,
            # The Tiny's routing, whatever the target's: a bias learned apart needs a long training.
            "scoring_func": "softmax",
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
            **experts,
        },
    }
    _check(overrides or {})
    for name, values in sections.items():
        raw[name] |= values | (overrides or {}).get(name, {})
    raw["projector_config"] |= {
        "input_dim": raw["vision_config"]["width"],
        "n_embed": raw["language_config"]["hidden_size"],
    }
    return ModelConfig.from_dict(raw)


def read_overrides(path: str | Path) -> dict[str, Any]:
    """Read the JSON file of a scratch draft's sizes. Raises UserError when it is no JSON object."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"The draft's sizes in {path} cannot be read as JSON ({error}).") from None
    if not isinstance(raw, dict):
        raise UserError(f"The draft's sizes in {path} must be a JSON object laid out as config.json.")
    return raw


def scratch_draft(config: ModelConfig, seed: int) -> DeepseekVL2:
    """A model of `config` in float32 with first weights drawn from `seed`."""
    model = DeepseekVL2(config)
    initialise(model, seed)
    return model


@torch.no_grad()
def initialise(model: DeepseekVL2, seed: int) -> None:
    """First weights: norms 1, biases 0, matrices normal with deviation 0.7 / sqrt(inputs).

    Matrices that write into a residual stream start smaller by sqrt(2 * layers), as GPT-2 does; embeddings and gates
    start at 0.02.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = {id(p) for m in model.modules() if isinstance(m, RMSNorm | nn.LayerNorm) for p in [m.weight]}
    for name, parameter in model.named_parameters():
        if id(parameter) in norms:
            parameter.fill_(1.0)
        elif name.endswith(("bias", "e_score_correction_bias")):
            parameter.zero_()
        else:
            parameter.normal_(0.0, _deviation(name, parameter, model.config), generator=generator)


def _deviation(name: str, parameter: nn.Parameter, config: ModelConfig) -> float:
    if "pos_embed" in name or "embed_tokens" in name or parameter.dim() == 1 or name.endswith("gate.weight"):
        return 0.02
    inputs = parameter[0].numel()
    deviation = 0.7 / math.sqrt(inputs)
    if name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight", "fc2.weight")):
        layers = config.vision.layers if name.startswith("vision.") else config.language.num_hidden_layers
        deviation /= math.sqrt(2 * layers)
    return deviation


def _rounded(size: float) -> int:
    return max(_GROUP, round(size / _GROUP) * _GROUP)


def _head_width(tower: VisionConfig) -> int:
    # The target's own, where it divides a multiple of 64 (SigLIP's 72 does not).
    width = tower.width // tower.heads
    return width if _GROUP % width == 0 else _GROUP


def _check(overrides: dict[str, Any]) -> None:
    kinds = {"vision_config": VisionConfig, "projector_config": ProjectorConfig, "language_config": LanguageConfig}
    for section, values in overrides.items():
        if section not in kinds or not isinstance(values, dict):
            raise UserError(f"The draft's sizes have no section '{section}'; sections: {', '.join(kinds)}.")
        known = {field.name for field in dataclasses.fields(kinds[section])} - _KEPT[section]
        for key in values:
            if key not in known:
                fixed = key in _KEPT[section]
                why = "which must be the target's or follows from other sizes" if fixed else "which does not exist"
                raise UserError(f"The draft's sizes set {section}.{key}, {why}; remove it.")
