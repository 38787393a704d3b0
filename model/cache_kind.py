"""How the cache holds the latents of latent attention: what `--kv-cache` chooses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from trtvlm.model.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trtvlm.model.config import LanguageConfig

CacheKind = Literal["fp16", "int8"]
"""fp16 holds what was computed, in the model's own type where that is wider; int8 holds codes and a scale a position."""
CACHE_KINDS: tuple[CacheKind, ...] = get_args(CacheKind)


def check_cache_kind(kind: CacheKind, names_and_configs: Iterable[tuple[str, LanguageConfig]]) -> None:
    """UserError: INT8 latents are asked for, and none of these models, a target and perhaps its draft, has latents."""
    if kind == "fp16":
        return
    models = dict(names_and_configs)
    if not any(config.use_mla for config in models.values()):
        has = "has" if len(models) == 1 else "have"
        raise UserError(
            f"--kv-cache int8 is for latent attention, which {' and '.join(models)} {has} not: leave it out."
        )
