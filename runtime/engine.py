"""What a session runs on: a target, perhaps a draft, and their processor."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtvlm.model.checkpoint import bundled_draft, load_model, resolve_model
from trtvlm.model.errors import UserError
from trtvlm.model.processor import Processor
from trtvlm.plugins.replace import for_cpu
from trtvlm.runtime.torch_executor import TorchExecutor

if TYPE_CHECKING:
    from trtvlm.model.config import ModelConfig
    from trtvlm.runtime.executor import Executor

# A longer context than this must be asked for: the cache is allocated whole.
DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class Engine:
    """A target executor, its draft if there is one, and the processor they share. `load_ms`: what opening took."""

    name: str
    target: Executor
    draft: Executor | None
    processor: Processor
    load_ms: float


def open_engine(folder: str, device: str = "cpu") -> Engine:
    """Run an engine directory's quantized checkpoint with PyTorch. UserError: it is none, or it is damaged."""
    raise UserError("Engine directories cannot be opened yet; use --model.")


def open_model(model: str, draft: str | None = None, device: str = "cpu", max_length: int | None = None) -> Engine:
    """Run a checkpoint (a bundled name, a folder or a hub name) directly, in float32, without an engine directory.

    draft: likewise; by default the one that a bundled target comes with. max_length: positions of the cache; by default
    the model's context, at most DEFAULT_CONTEXT. UserError: no such model, or a draft that does not fit the target.
    """
    started = time.perf_counter()
    folder = resolve_model(model)
    processor = Processor.from_pretrained(folder)
    target = _load(model, device, max_length)
    draft = draft or bundled_draft(model)
    drafter = _load(draft, device, max_length) if draft else None
    if drafter is not None:
        check_pair(target.config, drafter.config)
    return Engine(model, target, drafter, processor, 1e3 * (time.perf_counter() - started))


def _load(model: str, device: str, max_length: int | None) -> Executor:
    loaded = load_model(model, device=device)
    limit = loaded.config.language.max_position_embeddings
    loaded = for_cpu(loaded) if device == "cpu" else loaded
    return TorchExecutor(loaded, min(max_length or DEFAULT_CONTEXT, limit))


def check_pair(target: ModelConfig, draft: ModelConfig) -> None:
    """UserError unless the two read the very same prompt: the same tokens, and the same tokens for an image."""
    for what, mine, theirs in (
        ("vocabulary size", target.language.vocab_size, draft.language.vocab_size),
        ("tile size", target.tile_size, draft.tile_size),
        ("number of tokens along a view", target.view_tokens_side, draft.view_tokens_side),
        ("list of candidate resolutions", target.candidate_resolutions, draft.candidate_resolutions),
    ):
        if mine != theirs:
            raise UserError(
                f"The draft does not fit the target: its {what} is {theirs}, the target's {mine}; "
                "use a draft that was made for this target."
            )
