"""Whether a draft can speak for a target: both must see the same tokens at the same positions."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from trtvlm.model.config import ModelConfig
from trtvlm.model.errors import UserError
from trtvlm.model.processor import Processor


def check_pair(target: Path, draft: Path) -> None:
    """Compare two checkpoint folders.

    Raises UserError when the draft's vocabulary, its tokenizer or the way it cuts images differs from the target's.
    """
    ours, theirs = ModelConfig.from_pretrained(target), ModelConfig.from_pretrained(draft)
    if ours.language.vocab_size != theirs.language.vocab_size:
        raise UserError(
            f"The draft {draft} has a vocabulary of {theirs.language.vocab_size} tokens and the target {target} one of "
            f"{ours.language.vocab_size}: a draft must share its target's vocabulary; use another, or train one with "
            "--draft scratch."
        )
    difference = _tokens_differ(_tokenizer(target, ours), _tokenizer(draft, theirs))
    if difference:
        raise UserError(
            f"The draft {draft} has another tokenizer than the target {target} ({difference}): a draft must share its "
            "target's vocabulary; use another, or train one with --draft scratch."
        )
    for what, mine, other in (
        ("tile size", ours.tile_size, theirs.tile_size),
        ("number of tokens a tile", ours.view_tokens_side**2, theirs.view_tokens_side**2),
        ("candidate_resolutions", ours.candidate_resolutions, theirs.candidate_resolutions),
        ("global_view_pos", ours.global_view_pos, theirs.global_view_pos),
    ):
        if mine != other:
            raise UserError(
                f"The draft {draft} cuts images differently from the target {target} (its {what} is not the same): "
                "its image tokens would not line up; use another, or train one with --draft scratch."
            )


def _tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    return Processor.from_pretrained(folder, config).tokenizer


def _tokens_differ(target: Tokenizer, draft: Tokenizer) -> str:
    """Where two tokenizers part, or "". Every token must have the same id, or acceptance compares apples and pears."""
    ours, theirs = target.get_vocab(with_added_tokens=True), draft.get_vocab(with_added_tokens=True)
    if ours == theirs:
        return ""
    token = min(
        (token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token)),
        key=lambda token: (ours.get(token, 1 << 62), theirs.get(token, 1 << 62)),
    )
    return f"token {token!r} has id {theirs.get(token, 'none')} there and {ours.get(token, 'none')} in the target"
