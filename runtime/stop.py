"""Tokens to text as it streams: nothing is shown that a later token could still change or take back."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Turns tokens into pieces of text, and ends at the first stop string.

    The pieces joined are the decoded text, cut before the first stop string. Held back: bytes of an unfinished
    character, and text that may turn out to begin a stop string.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        self._shown = 0  # tokens whose text is out of the decoder
        self._context = 0  # where decoding starts again: some decoders treat the first token of a text specially
        self._held = ""  # text out of the decoder, not yet out of here
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token makes certain (often empty). After a stop string (`stopped`), nothing more."""
        self._tokens.append(token)
        text = self._new_text()
        if text.endswith(UNFINISHED):
            return ""
        return self._advance(text)

    def finish(self) -> str:
        """What was held back, now that no token follows."""
        piece = self._advance(self._new_text())
        held, self._held = self._held, ""
        return piece + held

    def _new_text(self) -> str:
        context = self._decode(self._tokens[self._context : self._shown])
        return self._decode(self._tokens[self._context :])[len(context) :]

    def _advance(self, text: str) -> str:
        if text:
            self._context, self._shown = self._shown, len(self._tokens)
        if self.stopped:
            return ""
        self._held += text
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            piece, self._held = self._held[: min(found)], ""
            return piece
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        piece, self._held = self._held[:cut], self._held[cut:]
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, without being all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
