"""The official models as configurations, so that one can plan for them and measure them without their checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from trtvlm.model.checkpoint import resolve_model
from trtvlm.model.config import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from trtvlm.model.errors import UserError
from trtvlm.model.sizes import SIZES, language_size

PRESETS = SIZES

_TILE = 384
# Every grid of up to nine tiles, in the order of the published config.json: ties go to the earliest.
_GRIDS = (
    (1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (4, 1), (2, 2), (1, 5), (5, 1), (1, 6), (6, 1), (2, 3), (3, 2), (1, 7),
    (7, 1), (1, 8), (8, 1), (2, 4), (4, 2), (1, 9), (9, 1), (3, 3),
)  # fmt: skip


def preset(name: str) -> ModelConfig:
    """The configuration of an official model. KeyError: there is none of that name."""
    if name not in PRESETS:
        raise KeyError(name)
    language = language_size(name)
    return ModelConfig(
        vision=VisionConfig(image_size=_TILE, patch_size=14, width=1152, layers=27, heads=16, mlp_ratio=3.7362),
        projector=ProjectorConfig(input_dim=1152, n_embed=language.hidden_size),
        language=language,
        candidate_resolutions=tuple((_TILE * wide, _TILE * high) for wide, high in _GRIDS),
    )


def read_config(name_or_path: str) -> ModelConfig:
    """The configuration of a preset, a bundled model, a folder or a hub name; of a hub name, only config.json is fetched.

    UserError: there is no such model, or its config.json is not supported.
    """
    if name_or_path in PRESETS:
        return preset(name_or_path)
    if _is_hub_name(name_or_path):
        return ModelConfig.from_pretrained(_fetch_config(name_or_path).parent)
    try:
        folder = resolve_model(name_or_path)
    except UserError as error:
        raise UserError(f"{str(error).rstrip('.')}; configurations known by name: {', '.join(PRESETS)}.") from None
    return ModelConfig.from_pretrained(folder)


def preset_of(language: LanguageConfig) -> str | None:
    """The preset whose language model has the very same sizes, if there is one; special tokens and the context may differ."""
    return next((name for name in PRESETS if _sizes(language_size(name)) == _sizes(language)), None)


def _sizes(language: LanguageConfig) -> LanguageConfig:
    other = LanguageConfig()
    # Absent and one group are the same; what plain attention does with latent sizes is nothing.
    changed = dataclasses.replace(
        language,
        bos_token_id=other.bos_token_id,
        eos_token_id=other.eos_token_id,
        max_position_embeddings=other.max_position_embeddings,
        n_group=language.n_group or 1,
        topk_group=language.topk_group or 1,
    )
    if language.use_mla:
        return dataclasses.replace(changed, num_key_value_heads=language.num_attention_heads)
    return dataclasses.replace(changed, kv_lora_rank=None, qk_nope_head_dim=0, qk_rope_head_dim=0, v_head_dim=0)


def _is_hub_name(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def _fetch_config(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json"))
    except Exception as error:  # the hub client raises many kinds; all mean: not to be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"The config.json of '{name}' is not here and could not be fetched from the Hugging Face hub ({reason}); give a "
            f"folder, or one of the configurations known by name: {', '.join(PRESETS)}."
        ) from None
