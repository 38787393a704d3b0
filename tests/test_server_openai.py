"""The official `openai` client against a running server."""

from __future__ import annotations

import asyncio
import base64
import io
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from PIL import Image

from tests.stub_server import PATIENCE, StubModel, running, until
from trtvlm.runtime.server.limits import Limits

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def model() -> StubModel:
    return StubModel()


@pytest.fixture(scope="module")
def url(model: StubModel) -> Iterator[str]:
    with running(model, Limits(body_bytes=100_000), capacity=0) as (url, _):
        yield f"{url}/v1"


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    http = httpx.Client(trust_env=False)
    with openai.OpenAI(base_url=url, api_key="none", timeout=PATIENCE, max_retries=0, http_client=http) as client:
        yield client


def ask(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["stub"]
    assert client.models.retrieve("stub").owned_by == "trtvlm"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_completion(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="stub", messages=ask("say Grüße 🏔️"), temperature=0, seed=1)
    assert answer.choices[0].message.content == "Grüße 🏔️"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens == 5
    details = answer.usage.completion_tokens_details
    assert details is not None
    assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (6, 2)
    assert answer.usage.model_extra == {"drafted_tokens": 8, "accepted_tokens": 6, "target_steps": 2}


def test_an_image_in_a_conversation(client: openai.OpenAI, model: StubModel) -> None:
    out = io.BytesIO()
    Image.new("L", (30, 20)).save(out, "PNG")
    uri = f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
    answer = client.chat.completions.create(
        model="stub",
        messages=[
            {"role": "system", "content": "Read."},
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": uri, "detail": "high"}},
                    {"type": "text", "text": "What does it say?"},
                ],
            },
        ],
        max_tokens=5,
    )
    assert answer.choices[0].message.content == "ok"
    assert model.requests[-1].conversation[1]["images"] == [out.getvalue()]


def test_a_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="stub",
        messages=ask("bytes naïve 世界"),
        stream=True,
        stream_options={"include_usage": True},
        max_completion_tokens=50,
        stop=["世界!"],
    )
    *chunks, counts = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "naïve 世界"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert counts.choices == []
    assert counts.usage is not None
    assert counts.usage.completion_tokens == len("naïve 世界".encode())


def test_the_stream_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="stub", messages=ask("say a b c")) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(pieces) == "a b c"
    assert final.choices[0].message.content == "a b c"


def test_leaving_a_stream_ends_it(client: openai.OpenAI, model: StubModel) -> None:
    stream = client.chat.completions.create(model="stub", messages=ask("begin leaving"), stream=True)
    next(chunk for chunk in stream if chunk.choices[0].delta.content)
    stream.close()
    until(lambda: "begin leaving" in model.ended)


def test_errors(client: openai.OpenAI, model: StubModel) -> None:
    def raised(kind: type[openai.APIError], text: str = "say x", **settings: Any) -> Any:
        with pytest.raises(kind) as caught:
            client.chat.completions.create(**({"model": "stub", "messages": ask(text)} | settings))
        return caught.value

    assert raised(openai.NotFoundError, model="other").code == "model_not_found"
    assert raised(openai.BadRequestError, max_tokens=-1).param == "max_tokens"
    assert raised(openai.BadRequestError, n=2).param == "n"
    assert "upside down" in raised(openai.BadRequestError, "refuse It is upside down.").message
    assert raised(openai.APIStatusError, "x" * 200_000).status_code == 413
    assert raised(openai.InternalServerError, "fail").code == "generation_failed"
    remote = [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]
    assert (
        raised(openai.BadRequestError, messages=[{"role": "user", "content": remote}]).code == "unsupported_image_url"
    )

    stream = client.chat.completions.create(model="stub", messages=ask("fail late"), stream=True)
    with pytest.raises(openai.APIError, match="could not be generated"):
        list(stream)

    held = client.chat.completions.create(model="stub", messages=ask("begin held"), stream=True)
    assert raised(openai.RateLimitError).response.headers["retry-after"]
    model.release("held")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in held) == "begun held"


def test_a_full_queue_is_tried_again(url: str, model: StubModel, client: openai.OpenAI) -> None:
    """The client's own retries, with the server's Retry-After, are enough to get through."""
    refused: list[int] = []

    def watch(response: httpx.Response) -> None:
        if response.status_code == 429:
            refused.append(int(response.headers["retry-after"]))
            model.release("retried")

    held = client.chat.completions.create(model="stub", messages=ask("begin retried"), stream=True)
    http = httpx.Client(trust_env=False, event_hooks={"response": [watch]})
    with openai.OpenAI(base_url=url, api_key="none", timeout=PATIENCE, max_retries=2, http_client=http) as patient:
        answer = patient.chat.completions.create(model="stub", messages=ask("say through"))
    assert answer.choices[0].message.content == "through"
    assert len(refused) == 1
    held.close()


def test_many_at_once() -> None:
    model = StubModel()

    async def ask_all(url: str) -> list[str | None]:
        http = httpx.AsyncClient(trust_env=False)
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", http_client=http) as client:
            calls = [client.chat.completions.create(model="stub", messages=ask(f"say {n}")) for n in range(20)]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*calls)]

    with running(model, capacity=20) as (url, _):
        assert asyncio.run(ask_all(url)) == [str(n) for n in range(20)]
