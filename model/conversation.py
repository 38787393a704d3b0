"""The chat template: messages -> the texts that are tokenized one by one (the official "deepseek" template)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from trtvlm.model.errors import UserError

USER: Final = "<|User|>"
ASSISTANT: Final = "<|Assistant|>"
IMAGE: Final = "<image>"

DEFAULT_PROMPT: Final = "Read the text in the image."

_ROLES = {
    USER: USER,
    "user": USER,
    ASSISTANT: ASSISTANT,
    "assistant": ASSISTANT,
    "system": "system",
    "deepseekapi-sys": "system",
}

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Turn:
    """A text tokenized on its own; `ends` says whether the end-of-sequence token follows."""

    text: str
    ends: bool


def render(conversation: Sequence[Message]) -> list[Turn]:
    """Messages {"role", "content"} -> turns.

    Contents are stripped. A user's turn carries the assistant's name at its end; the answer follows it with nothing in
    between. A system message stands first, bare. Keys other than role and content are not looked at.

    UserError: no message, an unknown role, a system message elsewhere, a content that is no string, an image tag
    outside a user's message, a last message that is not the assistant's.
    """
    if not conversation:
        raise UserError("The conversation is empty: give at least a user and an (empty) assistant message.")
    turns = [_turn(index, message) for index, message in enumerate(conversation)]
    if not turns[-1].ends:
        raise UserError("The conversation must end with an assistant message: append one (empty to ask for an answer).")
    return turns


def _turn(index: int, message: Message) -> Turn:
    where = f"Message {index + 1} of the conversation"
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise UserError(f'{where} must have a "role" and a "content".')
    role = _ROLES.get(message["role"]) if isinstance(message["role"], str) else None
    if role is None:
        raise UserError(f'{where} has the unknown role {message["role"]!r}: use "user", "assistant" or "system".')
    if not isinstance(message["content"], str):
        raise UserError(f"{where} has a content of type {type(message['content']).__name__}: give a string.")
    content = message["content"].strip()
    if role == USER:
        return Turn(user_turn(content), ends=False)
    if IMAGE in content:
        raise UserError(f"{where} ({message['role']}) contains {IMAGE}: only user messages may show images.")
    if role == "system" and index > 0:
        raise UserError(f"{where} is a system message: it must be the first.")
    return Turn(content, ends=role == ASSISTANT)


def user_turn(content: str) -> str:
    """A user's message, up to where the answer begins; an empty one leaves only the two names."""
    said = f" {content}\n\n" if content else ""
    return f"{USER}:{said}{ASSISTANT}:"
