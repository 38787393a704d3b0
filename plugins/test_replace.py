"""The promise: M rows decoded at once have the bits of M decodes of one row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import tiny_model
from trtvlm.model.cache import KVCache
from trtvlm.model.vlm import DeepseekVL2
from trtvlm.plugins.replace import for_cpu

KINDS = ["mla", "mha", "base"]
MAX_LEN = 300


def _decode(model: DeepseekVL2, prompt: torch.Tensor, widths: list[int], tokens: torch.Tensor) -> torch.Tensor:
    """Prefill `prompt` [P, hidden], then feed `tokens` in calls of these widths -> logits [tokens, vocab]."""
    cache = KVCache(model.config.language, 1, MAX_LEN)
    model.language(prompt.unsqueeze(0), cache, last_only=True)
    embeds = model.language.model.embed_tokens(tokens)
    return torch.cat([model.language(part.unsqueeze(0), cache)[0] for part in torch.split(embeds, widths)])


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest) -> tuple[DeepseekVL2, DeepseekVL2]:
    model = tiny_model(request.param)
    return model, for_cpu(model)


@settings(max_examples=25, deadline=None)
@given(
    prompt=st.integers(1, 140),
    widths=st.lists(st.integers(1, 8), min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
)
@torch.inference_mode()
def test_bits_do_not_depend_on_the_width(
    pair: tuple[DeepseekVL2, DeepseekVL2], prompt: int, widths: list[int], seed: int
) -> None:
    _, model = pair
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(prompt, 64, generator=generator)
    tokens = torch.randint(0, 544, (sum(widths),), generator=generator)
    together = _decode(model, start, widths, tokens)
    alone = _decode(model, start, [1] * len(tokens), tokens)
    assert torch.equal(together, alone)
