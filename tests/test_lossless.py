"""The comparison that backs the project's promise: it counts right, and it does find a difference."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.tiny import tiny_checkpoint
from trtvlm.runtime.engine import open_model
from trtvlm.runtime.session import Session
from trtvlm.runtime.torch_executor import TorchExecutor
from trtvlm.scripts.check_lossless import compare


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tiny_checkpoint(tmp_path_factory.mktemp("lossless") / "model", "mla")
    return str(folder)


def pages() -> Iterator[tuple[str, Image.Image]]:
    for number in range(20):
        size = (40 + number, 50)
        noise = torch.randint(0, 256, (size[1], size[0]), generator=torch.Generator().manual_seed(number))
        yield str(number), Image.fromarray(noise.to(torch.uint8).numpy())


def test_nothing_differs(model: str) -> None:
    *_, total = compare(Session(open_model(model, draft=model)), pages(), tokens=60, max_new_tokens=25)
    assert total.mismatches == []
    assert 60 <= total.tokens <= 60 + 25
    assert total.pages == len(range(0, total.tokens, 25))
    assert total.accepted == total.drafted > 0  # a draft that is the target itself
    assert total.accepted_per_step == pytest.approx((total.tokens - total.pages) / total.steps)
    assert total.accepted_per_step > 4


def test_a_difference_is_found(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An executor whose bits depend on the width of a step (here: grossly) does not pass."""
    decode = TorchExecutor.decode

    def careless(self: TorchExecutor, tokens: list[int]) -> torch.Tensor:
        logits = decode(self, tokens)
        return logits.roll(1, -1) if len(tokens) > 1 else logits

    monkeypatch.setattr(TorchExecutor, "decode", careless)
    *_, total = compare(Session(open_model(model, draft=model)), pages(), tokens=20, max_new_tokens=25)
    (mismatch,) = total.mismatches
    assert mismatch["page"] == "0"
    assert mismatch["position"] == 1
    assert mismatch["plain"] != mismatch["speculative"]
