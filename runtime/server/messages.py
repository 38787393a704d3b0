"""OpenAI's messages -> the conversation that the processor takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trtvlm.model.conversation import DEFAULT_PROMPT, IMAGE
from trtvlm.runtime.server.errors import ApiError
from trtvlm.runtime.server.images import read_data_uri
from trtvlm.runtime.server.schemas import TextPart

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trtvlm.runtime.server.limits import Limits
    from trtvlm.runtime.server.schemas import Message


def conversation(messages: Sequence[Message], limits: Limits) -> list[dict[str, Any]]:
    """Messages {"role", "content", "images"}: parts in order, one a line, an image as its tag.

    The last one is the assistant's: the client's own, which is continued, or an empty one. A last user message of
    nothing but images means the default prompt.

    ApiError 400: an image where none may be, one too many, or not an image; too much text; a tag in the text, which
    would stand for an image that is not there.
    """
    turns: list[dict[str, Any]] = []
    characters = 0
    count = 0
    for number, message in enumerate(messages):
        lines: list[str] = []
        images: list[bytes] = []
        for position, part in enumerate(message.content):
            param = f"messages.{number}.content.{position}"
            if isinstance(part, TextPart):
                characters += len(part.text)
                _check_text(part.text, characters, param, limits)
                lines.append(part.text)
                continue
            count += 1
            if message.role != "user":
                raise ApiError(400, f"{param} is an image, but only user messages may show images.", param=param)
            if count > limits.images:
                text = f"There are more than {limits.images} images in the request; leave some out."
                raise ApiError(400, text, param=param, code="too_many_images")
            images.append(read_data_uri(part.image_url.url, f"{param}.image_url.url", limits.pixels))
            lines.append(IMAGE)
        role = "system" if message.role == "developer" else message.role
        turns.append({"role": role, "content": "\n".join(lines), "images": images})
    last = turns[-1]
    if last["images"] and not last["content"].replace(IMAGE, "").strip():
        last["content"] += f"\n{DEFAULT_PROMPT}"
    if last["role"] != "assistant":
        turns.append({"role": "assistant", "content": "", "images": []})
    return turns


def _check_text(text: str, characters: int, param: str, limits: Limits) -> None:
    if characters > limits.characters:
        message = f"The messages have more than {limits.characters:,} characters of text: shorten them."
        raise ApiError(400, message, param="messages", code="prompt_too_long")
    if IMAGE in text:
        message = f"{param} contains {IMAGE}: send the image itself as a part of type image_url instead."
        raise ApiError(400, message, param=param)
