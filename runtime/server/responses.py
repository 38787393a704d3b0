"""What goes back: OpenAI's completion, its chunks, its usage, as JSON."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from trtvlm.runtime.result import Result

DONE = b"data: [DONE]\n\n"


class Json(JSONResponse):
    """ASCII only: no line break of Unicode's that a client may split on, nothing that cannot be encoded."""

    def render(self, content: Any) -> bytes:
        """Content -> bytes."""
        return dumps(content)


def dumps(content: Any) -> bytes:
    """Compact JSON in ASCII."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii")


def event(content: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + dumps(content) + b"\n\n"


def usage(result: Result) -> dict[str, Any]:
    """Tokens of prompt and answer; of the drafted ones, how many were accepted, in OpenAI's place and in ours."""
    generated = len(result.token_ids)
    return {
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": result.prompt_tokens + generated,
        "prompt_tokens_details": {"cached_tokens": result.reused_tokens, "image_tokens": result.image_tokens},
        "completion_tokens_details": {
            "accepted_prediction_tokens": result.accepted,
            "rejected_prediction_tokens": result.drafted - result.accepted,
        },
        "drafted_tokens": result.drafted,
        "accepted_tokens": result.accepted,
        "target_steps": result.steps,
    }


@dataclass(frozen=True)
class Completion:
    """One answer on its way out. `include_usage`: its stream ends with the counts."""

    model: str
    include_usage: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, result: Result) -> dict[str, Any]:
        """Not streamed."""
        message = {"role": "assistant", "content": result.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": result.finish_reason}
        return self._head("chat.completion") | {"choices": [choice], "usage": usage(result)}

    def first(self) -> bytes:
        """The chunk that says who speaks."""
        return self._chunk({"role": "assistant", "content": ""})

    def piece(self, text: str) -> bytes:
        """A chunk of text."""
        return self._chunk({"content": text})

    def last(self, result: Result) -> bytes:
        """The chunk with the reason, the one with the counts where asked for, and the end."""
        chunks = self._chunk({}, result.finish_reason)
        if self.include_usage:
            chunks += event(self._head("chat.completion.chunk") | {"choices": [], "usage": usage(result)})
        return chunks + DONE

    def _chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        chunk = self._head("chat.completion.chunk") | {"choices": [choice]}
        return event(chunk | {"usage": None} if self.include_usage else chunk)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}
