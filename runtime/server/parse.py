"""The body of a chat completion request -> what the model is asked; or the first thing that is wrong with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pydantic_core
from pydantic import ValidationError

from trtvlm.runtime.request import Request
from trtvlm.runtime.server.errors import ApiError
from trtvlm.runtime.server.messages import conversation
from trtvlm.runtime.server.schemas import ChatRequest

if TYPE_CHECKING:
    from trtvlm.runtime.server.limits import Limits

# These change nothing about the answer of a server that has one model and keeps nothing.
IGNORED = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "reasoning_effort",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    }
)

# These would change it, and are not supported: only what is the same as leaving them out is accepted.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_p": (0,),
    "modalities": (["text"],),
    "n": (1,),
    "prediction": (),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_k": (0, -1),
    "top_logprobs": (0,),
    "web_search_options": (),
}


def parse(body: bytes, model: str, limits: Limits) -> tuple[ChatRequest, Request]:
    """JSON -> what was asked and how, and the request for the model. Costs CPU time: not for the event loop.

    ApiError 400: no JSON, a field that is wrong, unknown or unsupported, or more than `limits` allow. 404: a model that
    is not `model`.
    """
    chat = _validate(_read_json(body, limits), limits)
    if chat.model != model:
        message = f"The model {_short(chat.model)} does not exist; this server has {_short(model)}."
        raise ApiError(404, message, param="model", code="model_not_found")
    tokens = _max_tokens(chat, limits)
    if chat.stream_options is not None and not chat.stream:
        raise ApiError(400, "stream_options goes with stream: true only.", param="stream_options")
    request = Request(
        conversation(chat.messages, limits),
        max_new_tokens=tokens,
        temperature=Request.temperature if chat.temperature is None else chat.temperature,
        top_p=Request.top_p if chat.top_p is None else chat.top_p,
        seed=chat.seed,
        stop=tuple(chat.stop or ()),
    )
    return chat, request


def _read_json(body: bytes, limits: Limits) -> dict[str, Any]:
    # Base64 has none of these characters and text comes to few, so a body of nothing but brackets, which would take
    # fifty times its size in memory, is told from one with large images without parsing it.
    if sum(body.count(mark) for mark in b"[{,:") > limits.characters + 50_000:
        raise ApiError(400, "The body has too many JSON elements, or too much text.", code="too_many_elements")
    try:
        data = pydantic_core.from_json(body)
    except ValueError as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(data, dict):
        raise ApiError(400, "The body must be a JSON object.", code="invalid_json")
    return data


def _validate(data: dict[str, Any], limits: Limits) -> ChatRequest:
    for name, value in data.items():
        if name in ChatRequest.model_fields or name in IGNORED:
            continue
        if name not in NEUTRAL:
            message = f"The field {_short(name)} is unknown; leave it out."
            raise ApiError(400, message, param=_short(name), code="unknown_parameter")
        if value is not None and value not in NEUTRAL[name]:
            only = f"; only {_listed(NEUTRAL[name])} is accepted" if NEUTRAL[name] else ""
            message = f"{name} is not supported{only}: leave it out."
            raise ApiError(400, message, param=name, code="unsupported_parameter")
    messages = data.get("messages")
    if isinstance(messages, list) and len(messages) > limits.messages:
        message = f"There are {len(messages)} messages; at most {limits.messages} are accepted."
        raise ApiError(400, message, param="messages", code="too_many_messages")
    try:
        return ChatRequest.model_validate(data)
    except ValidationError as error:
        raise _first(error) from None


def _first(error: ValidationError) -> ApiError:
    """The first thing wrong, as one sentence."""
    details = error.errors(include_url=False, include_context=False, include_input=False)[0]
    # A part's own type stands in pydantic's path after its index: no part of the field's name.
    names = ("text", "image_url")
    path = details["loc"]
    location = [str(key) for at, key in enumerate(path) if not (key in names and at and isinstance(path[at - 1], int))]
    param = ".".join(location)
    if details["type"] == "missing":
        return ApiError(400, f"The field {param} is missing.", param=param, code="missing_parameter")
    return ApiError(400, f"{param}: {_short(details['msg'], 300)}.", param=param, code="invalid_value")


def _max_tokens(chat: ChatRequest, limits: Limits) -> int:
    if chat.max_tokens is not None and chat.max_completion_tokens not in (None, chat.max_tokens):
        message = "max_tokens and max_completion_tokens mean the same and differ: give one of them."
        raise ApiError(400, message, param="max_tokens")
    wanted = chat.max_completion_tokens if chat.max_completion_tokens is not None else chat.max_tokens
    if wanted is None:
        return limits.tokens
    if wanted > limits.tokens:
        param = "max_tokens" if chat.max_completion_tokens is None else "max_completion_tokens"
        message = f"{param} is {_short(wanted)}; this server gives at most {limits.tokens} tokens an answer."
        raise ApiError(400, message, param=param, code="too_many_tokens")
    return wanted


def _listed(values: tuple[Any, ...]) -> str:
    return " or ".join(pydantic_core.to_json(value).decode() for value in values)


def _short(value: object, length: int = 80) -> str:
    """A client's value for a sentence: never long."""
    text = str(value)
    return text if len(text) <= length else text[: length - 3] + "..."
