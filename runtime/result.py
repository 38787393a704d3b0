"""What a session answers. Imports nothing heavy: the server counts with it, whatever answers behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Result:
    """An answer, whole, and what it took.

    token_ids: all generated tokens, with the end-of-sequence token or those that completed a stop string.
    finish_reason: "stop" (end of sequence or stop string) or "length" (max_new_tokens or the context).
    prompt_tokens: of which image_tokens stand for images, and reused_tokens were in the cache from the turn before.
    steps: target passes after the prefill; drafted tokens were proposed in them, and accepted ones kept.
    timings: ms; load (of the engine), image (vision towers), prefill, decode, first_token, total. The draft reads the
    prompt after the first token is out, so image and prefill may add up to more than first_token.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    image_tokens: int
    reused_tokens: int
    drafted: int
    accepted: int
    steps: int
    timings: dict[str, float]

    @property
    def accepted_per_step(self) -> float:
        """Tokens that came out of a target step, on average: 1 without speculation, at most 1 + draft tokens.

        The first token comes from the prefill and does not count. 0 when there was no step.
        """
        return (len(self.token_ids) - 1) / self.steps if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens decoded after the first, by the second of decoding; 0 when there were none."""
        decode = self.timings["decode"]
        return 1e3 * (len(self.token_ids) - 1) / decode if self.steps and decode else 0.0
