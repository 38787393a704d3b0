"""Speculative decoding on one page: the draft proposes, the target verifies, both caches follow by moving a cursor.

Between steps, the caches hold everything but the newest token: `target` needs exactly `newest`, and `draft` needs
`unread` (that token, and before it the last drafted one whenever all were accepted, which the draft proposed but never
read). A step decodes K tokens one by one with the draft and K + 1 at once with the target. Without a draft, K is 0 and
the very same step is plain decoding, so the two can only differ if an executor's rows depend on their number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtvlm.runtime.executor import MAX_DECODE_WIDTH

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from trtvlm.runtime.executor import Decoder
    from trtvlm.runtime.sampling import Sampler

DEFAULT_DRAFT_TOKENS = 4
MAX_DRAFT_TOKENS = MAX_DECODE_WIDTH - 1


@dataclass(frozen=True)
class Step:
    """One pass of the target: its new tokens (1 to drafted + 1), and how many of the drafted ones it accepted."""

    tokens: list[int]
    drafted: int
    accepted: int


def speculate(
    target: Decoder,
    draft: Decoder | None,
    newest: int,
    sampler: Sampler,
    *,
    max_tokens: int,
    draft_tokens: int = DEFAULT_DRAFT_TOKENS,
    eos: int | None = None,
) -> Iterator[Step]:
    """Continue after the token `newest`, which neither cache holds yet, by at most `max_tokens` tokens, up to `eos`.

    Both caches hold the same prompt. Greedy: the tokens are those of plain decoding, bit for bit. Sampled: they have
    its distribution. The last token given may still be missing from the caches, or be followed by refused ones.
    ValueError if the target's context cannot hold `max_tokens` more.
    """
    if target.length + max_tokens > target.max_length:
        raise ValueError(f"{target.length} + {max_tokens} tokens do not fit a context of {target.max_length}")
    unread = [newest]
    while max_tokens > 0:
        start = target.length
        k = width(draft, unread, min(draft_tokens, max_tokens - 1))
        drafted, draft_probs = propose(draft, unread, k, sampler)
        out = sampler.accept(drafted, draft_probs, target.decode([newest, *drafted]))
        accepted = len(out) - 1
        target.rollback(start + 1 + accepted)
        if draft is not None and k:
            # The draft has read all it proposed but the last: nothing to undo when that one is accepted.
            draft.rollback(min(draft.length, start + 1 + accepted))
            unread = out[-2:] if accepted == k else out[-1:]
        if eos in out:
            out = out[: out.index(eos) + 1]
            max_tokens = len(out)
        newest = out[-1]
        max_tokens -= len(out)
        yield Step(out, drafted=k, accepted=min(accepted, len(out)))


def width(draft: Decoder | None, unread: list[int], wanted: int) -> int:
    """How many tokens to draft: as many as wanted, but no more than the draft's own context has room for."""
    if draft is None:
        return 0
    return max(0, min(wanted, draft.max_length - draft.length - len(unread) + 1))


def propose(draft: Decoder | None, unread: list[int], k: int, sampler: Sampler) -> tuple[list[int], list[Tensor]]:
    """K tokens of the draft after `unread`, each with the distribution it was drawn from."""
    tokens: list[int] = []
    probs: list[Tensor] = []
    while draft is not None and len(tokens) < k:
        logits = draft.decode(tokens[-1:] or unread)
        token, distribution = sampler.choose(logits[-1])
        tokens.append(token)
        probs.append(distribution)
    return tokens, probs
