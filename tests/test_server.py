"""The HTTP server over a stub: what it accepts, refuses, queues, cancels, counts; and how it begins and ends."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import io
import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import httpx
import hypothesis
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.stub_server import PATIENCE, StubModel, running, until
from trtvlm.model.conversation import DEFAULT_PROMPT
from trtvlm.model.errors import UserError
from trtvlm.model.images import MAX_PIXELS
from trtvlm.runtime.request import Request
from trtvlm.runtime.server.errors import Gone
from trtvlm.runtime.server.limits import Limits
from trtvlm.runtime.server.process import bind
from trtvlm.runtime.server.queue import QueueFull, RequestQueue

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trtvlm.runtime.server.service import Service

CHAT = "/v1/chat/completions"
HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
LIMITS = Limits(body_bytes=300_000, pixels=10_000, images=3, messages=8, tokens=50, characters=1000)


def png(width: int = 8, height: int = 8, form: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(out, form)
    return out.getvalue()


def data_uri(content: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def body(prompt: Any = "say hello", **fields: Any) -> dict[str, Any]:
    return {"model": "stub", "messages": [{"role": "user", "content": prompt}]} | fields


def events(lines: Iterator[str]) -> list[Any]:
    """The data of server-sent events; "[DONE]" as it is."""
    data = [line.removeprefix("data: ") for line in lines if line]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


class Api:
    """A client of a running stub server."""

    def __init__(self, url: str, service: Service, model: StubModel) -> None:
        self.url, self.service, self.model = url, service, model
        self.http = httpx.Client(base_url=url, timeout=PATIENCE, trust_env=False)
        self._threads = concurrent.futures.ThreadPoolExecutor(16)

    def chat(self, prompt: Any = "say hello", **fields: Any) -> httpx.Response:
        return self.http.post(CHAT, json=body(prompt, **fields))

    def later(self, prompt: Any = "say hello", **fields: Any) -> concurrent.futures.Future[httpx.Response]:
        """The same in a thread; returns once the request has a place."""
        queue = self.service.queue
        before = queue.waiting + queue.running
        future = self._threads.submit(self.chat, prompt, **fields)
        until(lambda: queue.waiting + queue.running > before)
        return future

    def metric(self, sample: str) -> float:
        """One line of /metrics; 0 where there is none yet."""
        found = re.search(rf"^{re.escape(sample)} (.*)$", self.http.get("/metrics").text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def raw(self, prompt: str, **fields: Any) -> socket.socket:
        """A request over a bare socket, whose end can be dropped."""
        sock = socket.create_connection(("127.0.0.1", int(self.url.rpartition(":")[2])), timeout=PATIENCE)
        content = json.dumps(body(prompt, **fields)).encode()
        sock.sendall(f"{HEAD}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        return sock

    def idle(self) -> bool:
        return self.service.in_flight == 0 and self.service.queue.running == 0 and self.service.queue.waiting == 0


@contextlib.contextmanager
def served(**options: Any) -> Iterator[Api]:
    model = StubModel()
    with running(model, **options) as (url, service):
        api = Api(url, service, model)
        with api.http:
            yield api


@pytest.fixture(scope="module")
def shared() -> Iterator[Api]:
    """One server for tests that leave it as they found it."""
    with served(limits=LIMITS) as api:
        yield api


@pytest.fixture
def api(shared: Api) -> Api:
    until(shared.idle)
    shared.model.requests.clear()
    return shared


# --- what an answer looks like


def test_a_completion(api: Api) -> None:
    response = api.chat("say hello world")
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    answer = response.json()
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "stub"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hello world", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 1, "image_tokens": 0},
        "completion_tokens_details": {"accepted_prediction_tokens": 6, "rejected_prediction_tokens": 2},
        "drafted_tokens": 8,
        "accepted_tokens": 6,
        "target_steps": 2,
    }


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream(api: Api, usage: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if usage else {}
    with api.http.stream("POST", CHAT, json=body("say a b c", stream=True, **options)) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        *chunks, done = events(response.iter_lines())
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    if usage:
        *chunks, counts = chunks
        assert counts["choices"] == []
        assert counts["usage"]["completion_tokens"] == 3
        assert all(chunk["usage"] is None for chunk in chunks)
    else:
        assert all("usage" not in chunk for chunk in chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [{"role": "assistant", "content": ""}, *({"content": c} for c in ("a ", "b ", "c")), {}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 4 + ["stop"]


def test_characters_of_several_tokens_arrive_whole(api: Api) -> None:
    text = "Grüße, 世界 🏔️ e\u0301 \u2028 \x85 end"
    with api.http.stream("POST", CHAT, json=body(f"bytes {text}", stream=True, max_tokens=50)) as response:
        *chunks, _ = events(response.iter_lines())
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert api.chat(f"bytes {text}").json()["choices"][0]["message"]["content"] == text


def test_length_and_stop(api: Api) -> None:
    choice = api.chat("say a b c d", max_tokens=2).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("a b ", "length")
    for stop in ("c", ["x", "c"]):
        choice = api.chat("say a b c d", stop=stop).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("a b ", "stop")


def test_an_empty_answer(api: Api) -> None:
    assert api.chat("say ").json()["choices"][0]["message"]["content"] == ""
    with api.http.stream("POST", CHAT, json=body("say ", stream=True)) as response:
        *chunks, done = events(response.iter_lines())
    assert done == "[DONE]"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, "stop"]


# --- what reaches the model


def test_settings_reach_the_model(api: Api) -> None:
    api.chat(max_completion_tokens=7, temperature=0.5, top_p=0.25, seed=-3, stop="END")
    api.chat(max_tokens=8, stop=["A", "B"])
    api.chat(temperature=1, seed=None, stop=None, max_tokens=None)
    settings = [(r.max_new_tokens, r.temperature, r.top_p, r.seed, r.stop) for r in api.model.requests]
    assert settings == [
        (7, 0.5, 0.25, -3, ("END",)),
        (8, 0.0, 1.0, None, ("A", "B")),
        (LIMITS.tokens, 1.0, 1.0, None, ()),
    ]


def test_messages_reach_the_model(api: Api) -> None:
    first, second = png(8, 8), png(9, 9, "JPEG")
    messages = [
        {"role": "system", "content": "Be brief.", "name": "operator"},
        {"role": "user", "content": [image_part(data_uri(first)), {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A page.", "refusal": None, "tool_calls": None},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "And", "cache_control": {}},
                {"type": "image_url", "image_url": data_uri(second, "image/jpeg")},
                {"type": "text", "text": "this?"},
            ],
        },
    ]
    answer = api.http.post(CHAT, json={"model": "stub", "messages": messages}).json()
    assert answer["usage"]["prompt_tokens_details"]["image_tokens"] == 20
    assert list(api.model.requests[0].conversation) == [
        {"role": "system", "content": "Be brief.", "images": []},
        {"role": "user", "content": "<image>\nWhat is it?", "images": [first]},
        {"role": "assistant", "content": "A page.", "images": []},
        {"role": "user", "content": "And\n<image>\nthis?", "images": [second]},
        {"role": "assistant", "content": "", "images": []},
    ]


def test_a_begun_answer_is_continued_and_a_developer_is_the_system(api: Api) -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": "say x"},
        {"role": "assistant", "content": "Well"},
    ]
    assert api.http.post(CHAT, json={"model": "stub", "messages": messages}).status_code == 200
    assert [(m["role"], m["content"]) for m in api.model.requests[0].conversation] == [
        ("system", "Be brief."),
        ("user", "say x"),
        ("assistant", "Well"),
    ]


def test_an_image_alone_is_to_be_read(api: Api) -> None:
    api.chat([image_part(data_uri(png()))])
    assert api.model.requests[0].conversation[0]["content"] == f"<image>\n{DEFAULT_PROMPT}"


def test_fields_that_mean_nothing_here(api: Api) -> None:
    neutral = {"n": 1, "presence_penalty": 0, "logit_bias": {}, "response_format": {"type": "text"}, "tools": None}
    assert api.chat(user="me", store=False, metadata={"a": "b"}, **neutral).status_code == 200


# --- what is refused

TEXT = [{"type": "text", "text": "x"}]
ROTTEN = data_uri(png()[:20])
HEADER_ONLY = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("fields", "status", "param", "word"),
    [
        ({"model": "gpt-4"}, 404, "model", "gpt-4"),
        ({"model": None}, 400, "model", "string"),
        ({"model": 5}, 400, "model", "string"),
        ({"messages": []}, 400, "messages", "at least 1"),
        ({"messages": None}, 400, "messages", "list"),
        ({"messages": "hello"}, 400, "messages", "list"),
        ({"messages": ["hello"]}, 400, "messages.0", "dictionary"),
        ({"messages": [{"content": "x"}]}, 400, "messages.0.role", "missing"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role", "user"),
        ({"messages": [{"role": "user", "content": 7}]}, 400, "messages.0.content", "list"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 400, "messages.0.content.0", "audio"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "messages.0.content.0.text", "missing"),
        ({"messages": [{"role": "user", "content": TEXT * 257}]}, 400, "messages.0.content", "256"),
        ({"messages": [{"role": "user", "content": "x"}] * 9}, 400, "messages", "at most 8"),
        ({"messages": [{"role": "user", "content": "x" * 600}] * 2}, 400, "messages", "1,000 characters"),
        ({"messages": [{"role": "user", "content": "<image>"}]}, 400, "messages.0.content.0", "image_url"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}, 400, "messages.0.tool_calls", "0"),
        ({"max_tokens": 0}, 400, "max_tokens", "1"),
        ({"max_tokens": -1}, 400, "max_tokens", "1"),
        ({"max_tokens": "5"}, 400, "max_tokens", "integer"),
        ({"max_tokens": 1.5}, 400, "max_tokens", "integer"),
        ({"max_tokens": True}, 400, "max_tokens", "integer"),
        ({"max_tokens": 51}, 400, "max_tokens", "at most 50"),
        ({"max_completion_tokens": 10**30}, 400, "max_completion_tokens", "at most 50"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 400, "max_tokens", "differ"),
        ({"temperature": -0.1}, 400, "temperature", "0"),
        ({"temperature": 2.1}, 400, "temperature", "2"),
        ({"top_p": 0}, 400, "top_p", "0"),
        ({"top_p": 1.01}, 400, "top_p", "1"),
        ({"seed": 2**63}, 400, "seed", "less than"),
        ({"seed": "x"}, 400, "seed", "integer"),
        ({"stop": ""}, 400, "stop.0", "1 character"),
        ({"stop": [""]}, 400, "stop.0", "1 character"),
        ({"stop": ["x"] * 17}, 400, "stop", "16"),
        ({"stop": {"a": 1}}, 400, "stop", "list"),
        ({"stream": "yes"}, 400, "stream", "boolean"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", "stream"),
        ({"n": 2}, 400, "n", "only 1 is"),
        ({"n": 0}, 400, "n", "only 1 is"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "not supported"),
        ({"logprobs": True}, 400, "logprobs", "not supported"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", "not supported"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty", "not supported"),
        ({"max_tokns": 5}, 400, "max_tokns", "unknown"),
        ({"k" * 500: 5}, 400, "k" * 77 + "...", "unknown"),
    ],
)
def test_wrong_fields(api: Api, fields: dict[str, Any], status: int, param: str, word: str) -> None:
    response = api.http.post(CHAT, json=body() | fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert word in error["message"]
    assert len(error["message"]) < 500
    assert set(error) == {"message", "type", "param", "code"}
    assert not api.model.requests


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("https://example.com/a.png", "fetches nothing"),
        ("http://127.0.0.1/a.png", "fetches nothing"),
        ("file:///etc/passwd", "fetches nothing"),
        ("/etc/passwd", "fetches nothing"),
        ("", "fetches nothing"),
        ("data:", "base64 in the form"),
        ("data:image/png;base64", "base64 in the form"),
        ("data:image/png,abc", "base64 in the form"),
        ("data:image/png;base64,", "not an image"),
        ("data:image/png;base64,%%%%", "valid base64"),
        ("data:image/png;base64,abc", "valid base64"),
        ("data:image/png;base64,€", "valid base64"),
        ("data:text/html;base64,YWJj", "media type"),
        (data_uri(b"no image at all"), "not an image"),
        (data_uri(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "image/eps"), "not an image"),
        (ROTTEN, "not an image"),
        (data_uri(png(101, 100)), "10,000"),
    ],
)
def test_wrong_images(api: Api, url: str, word: str) -> None:
    response = api.chat([image_part(url)])
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "messages.0.content.0.image_url.url")
    assert word in error["message"]
    assert not api.model.requests


def test_a_decompression_bomb(api: Api) -> None:
    bomb = bytearray(png())
    bomb[16:24] = (2**31 - 1).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")  # else it would be merely damaged
    response = api.chat([image_part(data_uri(bytes(bomb)))])
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "image_too_large"


def test_images_where_none_may_be_and_one_too_many(api: Api) -> None:
    picture = image_part(data_uri(png()))
    response = api.chat([picture] * 4)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "too_many_images")
    assert api.chat([picture] * 3).status_code == 200
    for role in ("system", "assistant"):
        response = api.http.post(CHAT, json=body() | {"messages": [{"role": role, "content": [picture]}]})
        assert response.status_code == 400
        assert "only user messages" in response.json()["error"]["message"]


@pytest.mark.parametrize("spaced", [False, True])
def test_forms_of_data_uris(api: Api, spaced: bool) -> None:
    uri = data_uri(png()).replace("image/png", "" if spaced else "IMAGE/PNG; charset=x")
    uri = uri[:40] + "\r\n " + uri[40:] if spaced else uri.replace("data:", "DATA:")
    assert api.chat([image_part(uri)]).status_code == 200
    assert api.model.requests[0].conversation[0]["images"] == [png()]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe{}",
        b'{"model": "\\ud800"}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"model": ' + b"9" * 10_000 + b"}",
        b'{"model": "stub", "messages": [' + b"{}," * 80_000 + b"{}]}",
        b'{"model": "stub", "temperature": NaN, "messages": [{"role": "user", "content": "x"}]}',
        b'{"model": "stub", "temperature": 1e999, "messages": [{"role": "user", "content": "x"}]}',
        json.dumps(body()).encode("utf-16"),
    ],
)
def test_malformed_bodies(api: Api, content: bytes) -> None:
    response = api.http.post(CHAT, content=content, headers=HEADER_ONLY)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_other_content_types(api: Api) -> None:
    """A web page may send these to a local server without asking first."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        response = api.http.post(CHAT, content=json.dumps(body()), headers={"content-type": kind})
        assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_media_type")
    response = api.http.post(CHAT, content=json.dumps(body()), headers={"content-type": "Application/JSON; charset=x"})
    assert response.status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_too_large(api: Api, chunked: bool) -> None:
    content = json.dumps(body("x" * 2_000_000)).encode()
    sent = iter([content[:1_000_000], content[1_000_000:]]) if chunked else content
    response = api.http.post(CHAT, content=sent, headers=HEADER_ONLY)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")
    assert api.chat().status_code == 200


def test_a_body_that_does_not_come() -> None:
    with served(limits=Limits(upload=0.1)) as api:
        with socket.create_connection(("127.0.0.1", int(api.url.rpartition(":")[2])), timeout=PATIENCE) as sock:
            sock.sendall(f"{HEAD}Content-Length: 100\r\n\r\n{{".encode())
            assert b" 408 " in sock.recv(4096).splitlines()[0]
        until(api.idle)
        assert api.metric(f'trtvlm_requests_total{{path="{CHAT}",status="408"}}') == 1


def test_too_many_bodies_at_once() -> None:
    with served(limits=Limits(uploads=0)) as api:
        assert api.chat().status_code == 429


def test_other_paths(api: Api) -> None:
    for method, path, status in [("GET", "/", 404), ("GET", CHAT, 405), ("POST", "/v1/completions", 404)]:
        response = api.http.request(method, path)
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = sorted(["role", "content", "type", "text", "image_url", "url", "include_usage", *body()])
NEARLY = st.recursive(
    JSON | st.sampled_from(["user", "system", "text", "image_url", "stub", data_uri(png()), ROTTEN, "<image>"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=5),
    max_leaves=20,
)
PART = st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=20)}) | st.just(
    image_part(data_uri(png()))
)
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "system", "assistant"]),
        "content": st.text() | st.lists(PART | NEARLY, max_size=4),
    }
)
VALID = {
    "max_tokens": st.integers(1, 50),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0.001, 1),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stop": st.text(min_size=1) | st.lists(st.text(min_size=1), max_size=4),
    "stream": st.booleans(),
    "user": JSON,
    "n": st.just(1),
    "tools": st.just([]),
}
# Mostly right, or only the first of many checks would ever be reached.
BODIES = st.fixed_dictionaries(
    {"model": st.just("stub"), "messages": st.lists(MESSAGE, min_size=1, max_size=3) | st.lists(MESSAGE | NEARLY)},
    optional=VALID | {"stream_options": NEARLY, "top_p": VALID["top_p"] | NEARLY, "stop": VALID["stop"] | NEARLY},
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=BODIES | JSON)
def test_no_json_breaks_the_server(shared: Api, content: Any) -> None:
    response = shared.http.post(CHAT, content=json.dumps(content), headers=HEADER_ONLY)
    hypothesis.event(str(response.status_code))
    assert response.status_code in (200, 400, 404)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=st.binary(max_size=200) | st.text().map(lambda text: json.dumps(body(text))[:-3].encode()))
def test_no_bytes_break_the_server(shared: Api, content: bytes) -> None:
    assert shared.http.post(CHAT, content=content, headers=HEADER_ONLY).status_code == 400


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about what it makes of the damage
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    at=st.integers(0, 200),
    junk=st.binary(max_size=30),
    form=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "ICO"]),
)
def test_no_damaged_image_breaks_the_server(shared: Api, at: int, junk: bytes, form: str) -> None:
    content = png(form=form)
    damaged = content[:at] + junk + content[at + len(junk) :]
    assert shared.chat([image_part(data_uri(damaged))]).status_code in (200, 400)


# --- what goes wrong behind it


def test_what_the_model_refuses(api: Api) -> None:
    for stream in (False, True):
        response = api.chat("refuse The page is upside down.", stream=stream)
        assert response.status_code == 400
        assert response.json()["error"]["message"] == "The page is upside down."


@pytest.mark.parametrize("prompt", ["fail", "fail late", "exit", "silent"])
def test_a_failure_fails_one_request(api: Api, prompt: str) -> None:
    response = api.chat(prompt)
    assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
    assert "secret" not in response.text
    assert api.chat().status_code == 200


def test_a_failure_in_a_stream(api: Api) -> None:
    with api.http.stream("POST", CHAT, json=body("fail late", stream=True)) as response:
        *_, piece, error, done = events(response.iter_lines())
    assert piece["choices"][0]["delta"] == {"content": "one "}
    assert error["error"]["code"] == "generation_failed"
    assert done == "[DONE]"


@pytest.mark.parametrize("prompt", ["hold x", "begin x"])
def test_a_request_that_takes_too_long(prompt: str) -> None:
    with served(limits=Limits(request=0.1)) as api:
        response = api.chat(prompt)
        assert response.status_code == 504
        assert "was not finished" in response.json()["error"]["message"]
        until(api.idle)
        assert api.model.ended == [prompt]
        assert api.chat().status_code == 200
        assert api.metric("trtvlm_cancelled_total") == 1


def test_a_request_that_waits_too_long() -> None:
    with served(limits=Limits(request=0.2)) as api:
        first = api.later("deaf x")
        second = api.later("say never")
        assert "did not come up" in second.result(PATIENCE).json()["error"]["message"]
        assert first.result(PATIENCE).status_code == 504  # though the model goes on
        assert api.service.queue.running == 1
        api.model.release("x")
        until(api.idle)
        assert len(api.model.requests) == 1


# --- the queue


def test_answers_come_in_order() -> None:
    with served() as api:
        futures = [api.later(f"hold {n}") for n in range(6)]
        assert api.metric("trtvlm_queue_depth") == 5
        assert api.metric("trtvlm_running") == 1
        for n in reversed(range(6)):
            api.model.release(str(n))
        assert [f.result(PATIENCE).json()["choices"][0]["message"]["content"] for f in futures] == list("012345")
        assert api.model.ended == [f"hold {n}" for n in range(6)]


def test_a_full_queue() -> None:
    with served(capacity=1) as api:
        first = api.later("hold x")
        second = api.later("say second")
        response = api.chat("say third")
        assert (response.status_code, response.json()["error"]["type"]) == (429, "rate_limit_error")
        assert 1 <= int(response.headers["retry-after"]) <= 60
        large = api.chat("x" * 1_000_000)  # the refusal reaches a client that is still writing
        assert large.status_code == 429
        api.model.release("x")
        assert first.result(PATIENCE).status_code == second.result(PATIENCE).status_code == 200
        assert api.chat("say third").status_code == 200
        assert len(api.model.requests) == 3


def test_no_place_to_wait() -> None:
    with served(capacity=0) as api:
        for _ in range(20):  # the place is free as soon as the answer is there
            assert api.chat().status_code == 200
        first = api.later("hold x")
        assert api.chat().status_code == 429
        api.model.release("x")
        assert first.result(PATIENCE).status_code == 200


def test_a_client_that_leaves_the_queue_frees_its_place() -> None:
    with served(capacity=1) as api:
        first = api.later("hold x")
        waiting = api.raw("say never")
        until(lambda: api.service.queue.waiting == 1)
        assert api.chat().status_code == 429
        waiting.close()
        until(lambda: api.service.queue.waiting == 0)
        second = api.later("say second")
        api.model.release("x")
        assert first.result(PATIENCE).status_code == second.result(PATIENCE).status_code == 200
        assert [request.conversation[0]["content"] for request in api.model.requests] == ["hold x", "say second"]
        assert api.metric("trtvlm_cancelled_total") == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_its_answer_ends_it(stream: bool) -> None:
    with served() as api:
        sock = api.raw("begin x", stream=stream)
        if stream:
            until(lambda: b"begun" in sock.recv(65536))
        else:
            until(lambda: api.service.queue.running)
        assert not api.model.ended
        sock.close()
        until(lambda: api.model.ended)
        until(api.idle)
        assert api.chat().status_code == 200
        assert api.metric("trtvlm_cancelled_total") == 1
        status = 200 if stream else 499
        assert api.metric(f'trtvlm_requests_total{{path="{CHAT}",status="{status}"}}') == (2 if stream else 1)


def test_a_client_that_leaves_its_upload() -> None:
    with served() as api:
        sock = socket.create_connection(("127.0.0.1", int(api.url.rpartition(":")[2])), timeout=PATIENCE)
        sock.sendall(f"{HEAD}Content-Length: 100\r\n\r\n{{".encode())
        until(lambda: api.service.uploads == 1)
        sock.close()
        until(lambda: api.service.in_flight == 0)
        assert api.service.uploads == 0
        assert not api.model.requests


def test_the_queue_by_itself() -> None:
    got: list[Any] = []
    queue = RequestQueue(1)
    model = StubModel()
    conversation = [{"role": "user", "content": "say a"}]
    queue.submit(Request(conversation), got.append)  # before anybody answers
    job = queue.submit(Request(conversation), got.append)
    with pytest.raises(QueueFull):
        queue.submit(Request(conversation), got.append)
    queue.cancel(job, Gone())
    queue.cancel(job, Gone())  # a second time does nothing
    assert [type(event) for event in got] == [Gone]
    queue.start(model)
    queue.stop(PATIENCE)  # what waits is still answered
    assert not queue.alive
    assert got[1:3] == ["a", ""]
    assert got[3].text == "a"
    assert len(got) == 4
    with pytest.raises(RuntimeError, match="started before"):
        queue.start(model)


# --- what it says about itself


def test_models(api: Api) -> None:
    listed = api.http.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["stub"]
    assert api.http.get("/v1/models/stub").json() == listed["data"][0]
    response = api.http.get("/v1/models/owner/other")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


def test_loading() -> None:
    with served(load=False) as api:
        assert api.http.get("/health").status_code == 200
        assert api.http.get("/v1/models").status_code == 200
        for response in (api.http.get("/ready"), api.chat()):
            assert (response.status_code, response.json()["error"]["code"]) == (503, "loading")
            assert int(response.headers["retry-after"]) > 0
        assert api.metric("trtvlm_ready") == 0
        api.service.load(lambda: api.model)
        until(lambda: api.http.get("/ready").status_code == 200)
        assert api.metric("trtvlm_ready") == 1
        assert api.chat().status_code == 200


def test_metrics() -> None:
    with served() as api:
        api.chat("say a b c")
        api.chat([image_part(data_uri(png())), {"type": "text", "text": "hello"}])
        api.http.post(CHAT, content=b"{", headers=HEADER_ONLY)
        api.http.get("/nowhere")
        expected = {
            f'trtvlm_requests_total{{path="{CHAT}",status="200"}}': 2,
            f'trtvlm_requests_total{{path="{CHAT}",status="400"}}': 1,
            'trtvlm_requests_total{path="other",status="404"}': 1,
            "trtvlm_prompt_tokens_total": 4 + 12,
            "trtvlm_image_tokens_total": 10,
            "trtvlm_generated_tokens_total": 4,
            "trtvlm_drafted_tokens_total": 16,
            "trtvlm_accepted_tokens_total": 12,
            "trtvlm_target_steps_total": 4,
            "trtvlm_request_seconds_count": 2,
            "trtvlm_time_to_first_token_seconds_count": 2,
            "trtvlm_queue_seconds_count": 2,
            "trtvlm_queue_depth": 0,
            "trtvlm_queue_capacity": 16,
            "trtvlm_ready": 1,
        }
        assert {sample: api.metric(sample) for sample in expected} == expected


def test_a_second_server_counts_for_itself() -> None:
    with served() as one, served() as other:
        one.chat()
        assert (one.metric("trtvlm_request_seconds_count"), other.metric("trtvlm_request_seconds_count")) == (1, 0)


def test_defaults_belong_together() -> None:
    assert Limits.pixels == MAX_PIXELS


def test_small_answers_are_sent_at_once() -> None:
    with bind("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_ports_that_cannot_be_had() -> None:
    with bind("127.0.0.1", 0) as taken, pytest.raises(UserError, match="choose another"):
        bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UserError, match="Cannot listen on"):
        bind("no such host.invalid", 0)


# --- its life as a process


class Process:
    """The stub server as a program. What it prints goes to a file: a pipe that nobody reads would fill and stop it."""

    def __init__(self, output: IO[str], *arguments: str) -> None:
        self._output = output
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "tests.stub_server", *arguments],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def output(self) -> str:
        return Path(self._output.name).read_text()

    def url(self) -> str:
        until(lambda: re.search(r"http://\S+/v1\n", self.output()))
        return str(re.findall(r"(http://\S+)/v1\n", self.output())[0])

    def release(self, name: str) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(f"{name}\n")
        self.popen.stdin.flush()

    def end(self) -> tuple[int, str]:
        return self.popen.wait(PATIENCE), self.output()


@contextlib.contextmanager
def process(*arguments: str) -> Iterator[Process]:
    with tempfile.NamedTemporaryFile("w+") as output:
        started = Process(output, *arguments)
        try:
            yield started
        finally:
            started.popen.kill()
            started.popen.communicate()


@contextlib.contextmanager
def client(url: str, ready: bool = True) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=PATIENCE, trust_env=False) as http:
        if ready:
            until(lambda: http.get("/ready").status_code == 200)
        yield http


def running_now(http: httpx.Client) -> float:
    found = re.search(r"^trtvlm_running (.*)$", http.get("/metrics").text, re.MULTILINE)
    assert found
    return float(found[1])


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_what_is_in_flight(sig: signal.Signals) -> None:
    with process() as server, client(server.url()) as http, concurrent.futures.ThreadPoolExecutor() as threads:
        running = threads.submit(http.post, CHAT, json=body("hold one"))
        until(lambda: running_now(http))
        waiting = threads.submit(http.post, CHAT, json=body("say two", stream=True))
        until(lambda: "trtvlm_queue_depth 1.0" in http.get("/metrics").text)
        server.popen.send_signal(sig)
        until(lambda: http.get("/ready").status_code == 503)
        assert http.get("/health").status_code == 200
        late = http.post(CHAT, json=body())
        assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
        assert int(late.headers["retry-after"]) > 0
        server.release("one")
        assert running.result(PATIENCE).json()["choices"][0]["message"]["content"] == "one"
        assert waiting.result(PATIENCE).text.endswith("data: [DONE]\n\n")
        code, errors = server.end()
    assert code == 0, errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("prompt", ["hold x", "deaf x"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_drain_has_an_end(prompt: str, stream: bool) -> None:
    with process("--drain-timeout", "0.2") as server, client(server.url()) as http:
        with concurrent.futures.ThreadPoolExecutor() as threads:
            future = threads.submit(http.post, CHAT, json=body(prompt, stream=stream))
            until(lambda: running_now(http))
            server.popen.send_signal(signal.SIGTERM)
            response = future.result(PATIENCE)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "draining")
        assert server.end()[0] == 0


def test_a_second_signal_does_not_wait() -> None:
    with process() as server, client(server.url()) as http:
        with concurrent.futures.ThreadPoolExecutor() as threads:
            future = threads.submit(http.post, CHAT, json=body("deaf x"))
            until(lambda: running_now(http))
            server.popen.send_signal(signal.SIGTERM)
            until(lambda: http.get("/ready").status_code == 503)
            server.popen.send_signal(signal.SIGTERM)
            assert future.result(PATIENCE).status_code == 503
        assert server.end()[0] == 0


def test_a_signal_while_loading() -> None:
    with process("--load", "never") as server, client(server.url(), ready=False) as http:
        until(lambda: http.get("/health").status_code == 200)
        server.popen.send_signal(signal.SIGTERM)
        assert server.end()[0] == 0


@pytest.mark.parametrize(("how", "word"), [("fails", "There is no such model."), ("breaks", "RuntimeError: broken")])
def test_a_model_that_cannot_be_loaded_ends_the_server(how: str, word: str) -> None:
    with process("--load", how) as server:
        code, errors = server.end()
    assert code != 0
    assert word in errors


@pytest.mark.slow
def test_ten_thousand_requests_leave_no_memory_behind() -> None:
    picture = image_part(data_uri(png(300, 300)))
    with process() as server, client(server.url()) as http:

        def memory() -> int:
            """Resident, in KiB."""
            status = Path(f"/proc/{server.popen.pid}/status").read_text()
            return int(status.partition("VmRSS:")[2].split()[0])

        def some(count: int) -> None:
            for n in range(count):
                kind = n % 5
                if kind == 0:
                    assert http.post(CHAT, json=body([picture])).status_code == 200
                elif kind == 1:
                    assert http.post(CHAT, json=body("say a b c", stream=True)).status_code == 200
                elif kind == 2:
                    assert http.post(CHAT, json=body("fail")).status_code == 500
                elif kind == 3:
                    assert http.post(CHAT, json=body([image_part(ROTTEN)])).status_code == 400
                else:
                    with http.stream("POST", CHAT, json=body("say a b c d", stream=True)) as left:
                        next(left.iter_raw())

        some(1000)  # caches and pools fill
        before = memory()
        some(10_000)
        assert memory() - before < 16 * 1024
        server.popen.send_signal(signal.SIGTERM)
        assert server.end()[0] == 0
