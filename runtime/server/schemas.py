"""The body of a chat completion request: OpenAI's fields, those that mean something here, read strictly."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class ImageUrl(_Strict):
    """Where an image is: a data: URI. `detail` is not looked at."""

    url: str


class TextPart(_Strict):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImagePart(_Strict):
    """An image between the pieces of text."""

    type: Literal["image_url"]
    image_url: Annotated[ImageUrl, BeforeValidator(lambda value: {"url": value} if isinstance(value, str) else value)]


def _parts(content: Any) -> Any:
    if content is None:
        return []
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(_Strict):
    """One turn. Its content is always a list of parts here."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[Annotated[TextPart | ImagePart, Field(discriminator="type")]],
        Field(max_length=256, fail_fast=True),
        BeforeValidator(_parts),
    ] = []
    tool_calls: Annotated[list[Any] | None, Field(max_length=0)] = None
    function_call: None = None


class StreamOptions(_Strict):
    """`include_usage`: a last chunk that counts the tokens."""

    include_usage: bool | None = None


def _several(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class ChatRequest(_Strict):
    """What is left once the fields that mean nothing here are gone."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=1000)]] | None,
        Field(max_length=16),
        BeforeValidator(_several),
    ] = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of counts."""
        return bool(self.stream_options and self.stream_options.include_usage)
