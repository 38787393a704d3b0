"""`trtvlm serve` on a small random pair: a real model behind the port, and what it refuses before opening one."""

from __future__ import annotations

import base64
import io
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from click.testing import CliRunner
from PIL import Image

from tests.stub_server import PATIENCE, until
from tests.tiny import tiny_checkpoint
from trtvlm.model.errors import UserError
from trtvlm.scripts.commands.serve import command

if TYPE_CHECKING:
    from collections.abc import Iterator

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, subprocess.Popen[str]]]:
    folder: Path = tmp_path_factory.mktemp("serve")
    pair = [tiny_checkpoint(folder / name, kind) for name, kind in (("target", "mla"), ("draft", "mha"))]
    arguments = ["--model", str(pair[0]), "--draft", str(pair[1]), "--port", "0", "--max-pixels", "9000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "trtvlm.scripts.cli", "serve", *arguments],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    url = process.stdout.readline().split(" at ")[1].strip().removesuffix("/v1")
    try:
        with httpx.Client(base_url=url, timeout=PATIENCE, trust_env=False) as http:
            until(lambda: http.get("/ready").status_code == 200)
            yield http, process
    finally:
        process.kill()
        process.communicate()


def page(width: int = 60, height: int = 40) -> dict[str, Any]:
    out = io.BytesIO()
    Image.effect_noise((width, height), 80).convert("RGB").save(out, "PNG")
    uri = f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": uri}}


def body(*parts: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "target", "messages": [{"role": "user", "content": list(parts)}], "max_tokens": 12} | fields


def test_an_image_is_answered_with_speculation(server: tuple[httpx.Client, subprocess.Popen[str]]) -> None:
    http, _ = server
    picture = page()
    answer = http.post(CHAT, json=body(picture)).json()
    usage = answer["usage"]
    assert answer["choices"][0]["finish_reason"] in ("length", "stop")
    assert usage["completion_tokens"] <= 12
    assert 0 < usage["prompt_tokens_details"]["image_tokens"] < usage["prompt_tokens"]
    assert usage["drafted_tokens"] > 0
    again = http.post(CHAT, json=body(picture)).json()
    assert again["choices"] == answer["choices"]

    with http.stream("POST", CHAT, json=body(picture, stream=True)) as response:
        *lines, done = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    deltas = [json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines]
    assert "".join(deltas) == answer["choices"][0]["message"]["content"]
    assert done == "[DONE]"


def test_a_conversation_over_several_turns(server: tuple[httpx.Client, subprocess.Popen[str]]) -> None:
    http, _ = server
    messages = [
        {"role": "system", "content": "Read."},
        {"role": "user", "content": [page(), page(30, 90), {"type": "text", "text": "Which?"}]},
        {"role": "assistant", "content": "The first."},
        {"role": "user", "content": "Why?"},
    ]
    response = http.post(CHAT, json=body() | {"messages": messages})
    assert response.status_code == 200


def test_what_only_the_model_can_refuse(server: tuple[httpx.Client, subprocess.Popen[str]]) -> None:
    http, _ = server
    response = http.post(CHAT, json=body({"type": "text", "text": "word " * 3000}))
    assert response.status_code == 400
    assert "context" in response.json()["error"]["message"]
    response = http.post(CHAT, json=body(page(100, 100)))
    assert "at most 9,000" in response.json()["error"]["message"]


def test_a_signal_ends_it(server: tuple[httpx.Client, subprocess.Popen[str]]) -> None:
    _, process = server
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0


def test_what_is_refused_before_a_port_is_opened(tmp_path: Path) -> None:
    for arguments, word in (
        ([], "either --engine DIR or --model NAME"),
        (["--engine", "a", "--model", "b"], "either --engine DIR or --model NAME"),
        (["--engine", "a", "--draft", "b"], "--draft goes with --model"),
        (["--model", "a", "--port", "99999"], "--port"),
        (["--model", "a", "--max-body-mb", "0"], "--max-body-mb"),
    ):
        result = CliRunner().invoke(command, arguments)
        assert result.exit_code == 2
        assert word in result.output
    with pytest.raises(UserError, match="no engine directory"):
        CliRunner().invoke(command, ["--engine", str(tmp_path / "none")], catch_exceptions=False)


def test_a_model_that_is_not_there_ends_it() -> None:
    arguments = ["serve", "--model", "/no/such/model", "--port", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "trtvlm.scripts.cli", *arguments],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 2
    assert "There is no model '/no/such/model'" in done.stderr
    assert "Traceback" not in done.stderr
