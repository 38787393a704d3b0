"""What can be asked of a session. Imports nothing heavy: the command line reads its defaults from here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtvlm.model.errors import UserError
from trtvlm.runtime.speculate import DEFAULT_DRAFT_TOKENS, MAX_DRAFT_TOKENS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trtvlm.model.conversation import Message
    from trtvlm.model.images import ImageSource


@dataclass(frozen=True)
class Request:
    """One answer wanted.

    conversation: as `Processor.__call__` takes it, all turns so far, the last one the assistant's (empty or begun).
    max_new_tokens: at most this many tokens, fewer where the context ends before.
    temperature 0 is greedy; seed makes sampled answers repeatable on the same engine and speculation settings.
    stop: the text ends before the first of these. draft_tokens: proposed a step; 0 turns speculation off.
    """

    conversation: Sequence[Message]
    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    draft_tokens: int = DEFAULT_DRAFT_TOKENS

    def __post_init__(self) -> None:
        """UserError: a setting out of its range."""
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1.")
        if not all(self.stop):
            raise UserError("A stop string is empty; leave it out.")
        if not 0 <= self.draft_tokens <= MAX_DRAFT_TOKENS:
            raise UserError(f"draft_tokens is {self.draft_tokens}; it must be 0 (none) to {MAX_DRAFT_TOKENS}.")


def question(images: Sequence[ImageSource], prompt: str | None = None) -> list[Message]:
    """The conversation that asks one question about images: by default, to read them.

    A prompt without `<image>` tags gets one line with a tag for each image in front.
    """
    from trtvlm.model.conversation import IMAGE
    from trtvlm.model.processor import DEFAULT_PROMPT

    text = DEFAULT_PROMPT if prompt is None else prompt
    if IMAGE not in text:
        text = f"{IMAGE}\n" * len(images) + text
    return [{"role": "user", "content": text, "images": list(images)}, {"role": "assistant", "content": ""}]
