"""The comparison that backs the project's promise: it counts right, and it does find a difference."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.tiny import tiny_checkpoint
from trtvlm.model.cache_kind import CACHE_KINDS, CacheKind
from trtvlm.runtime.engine import open_model
from trtvlm.runtime.sampling import Sampler
from trtvlm.runtime.session import Session
from trtvlm.runtime.torch_executor import TorchExecutor
from trtvlm.scripts.check_lossless import SampledComparison, compare, compare_sampled, two_sample_p


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tiny_checkpoint(tmp_path_factory.mktemp("lossless") / "model", "mla")
    return str(folder)


def pages() -> Iterator[tuple[str, Image.Image]]:
    for number in range(20):
        size = (40 + number, 50)
        noise = torch.randint(0, 256, (size[1], size[0]), generator=torch.Generator().manual_seed(number))
        yield str(number), Image.fromarray(noise.to(torch.uint8).numpy())


@pytest.mark.parametrize("kv_cache", CACHE_KINDS)
def test_nothing_differs(model: str, kv_cache: CacheKind) -> None:
    opened = open_model(model, draft=model, kv_cache=kv_cache)
    *_, total = compare(Session(opened), pages(), tokens=60, max_new_tokens=25)
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


def sampled(model: str, tmp_path: Path) -> SampledComparison:
    draft = tiny_checkpoint(tmp_path / "draft", "mha", seed=4)
    _, image = next(pages())
    engine = open_model(model, draft=str(draft))
    return compare_sampled(engine, image, 300, temperature=0.4, top_p=0.9, draft_tokens=3)


def test_sampled_tokens_of_a_model_pair(model: str, tmp_path: Path) -> None:
    """Executors and all; the exact distributions are in test_sampling."""
    result = sampled(model, tmp_path)
    assert min(result.p_values) > 1e-3
    assert min(result.kinds) > 2


def test_a_careless_sampler_is_found(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that keeps whatever the draft says."""

    def careless(self: Sampler, drafted: list[int], _: object, logits: torch.Tensor) -> list[int]:
        return [*drafted, self.choose(logits[-1])[0]]

    monkeypatch.setattr(Sampler, "accept", careless)
    result = sampled(model, tmp_path)
    assert result.p_values[0] > 1e-3  # the prefill's token is not speculated
    assert result.p_values[1] < 1e-6


def test_the_two_sample_test() -> None:
    assert two_sample_p(Counter({1: 500, 2: 500}), Counter({1: 510, 2: 490})) > 0.1
    assert two_sample_p(Counter({1: 500, 2: 500}), Counter({1: 1000, 2: 1000})) == pytest.approx(1)
    assert two_sample_p(Counter({1: 500, 2: 500}), Counter({1: 600, 2: 400})) < 1e-4
    assert two_sample_p(Counter({1: 500}), Counter({1: 500})) == 1
    # Two by two cells: the statistic of the usual contingency table.
    table = [[120, 80], [90, 110]]
    n, rows, columns = 400, [200, 200], [210, 190]
    usual = sum(
        (table[i][j] - rows[i] * columns[j] / n) ** 2 / (rows[i] * columns[j] / n) for i in (0, 1) for j in (0, 1)
    )
    p = two_sample_p(Counter({1: 120, 2: 80}), Counter({1: 90, 2: 110}))
    assert p == pytest.approx(math.erfc(math.sqrt(usual / 2)))  # one degree of freedom
