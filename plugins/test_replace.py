"""The promise: M rows decoded at once have the bits of M decodes of one row."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import tiny_config, tiny_model
from trtvlm.model.cache import KVCache
from trtvlm.model.cache_kind import CACHE_KINDS, CacheKind
from trtvlm.model.config import LanguageConfig
from trtvlm.model.language import LanguageModel
from trtvlm.model.vlm import DeepseekVL2
from trtvlm.plugins.replace import for_cpu

KINDS = ["mla", "mha", "base"]
MAX_LEN = 300


def _decode(
    model: DeepseekVL2, prompt: torch.Tensor, widths: list[int], tokens: torch.Tensor, kind: CacheKind = "fp16"
) -> torch.Tensor:
    """Prefill `prompt` [P, hidden], then feed `tokens` in calls of these widths -> logits [tokens, vocab]."""
    cache = KVCache(model.config.language, 1, MAX_LEN, kind=kind)
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
    kind=st.sampled_from(CACHE_KINDS),
)
@torch.inference_mode()
def test_bits_do_not_depend_on_the_width(
    pair: tuple[DeepseekVL2, DeepseekVL2], prompt: int, widths: list[int], seed: int, kind: CacheKind
) -> None:
    _, model = pair
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(prompt, 64, generator=generator)
    tokens = torch.randint(0, 544, (sum(widths),), generator=generator)
    together = _decode(model, start, widths, tokens, kind)
    alone = _decode(model, start, [1] * len(tokens), tokens, kind)
    assert torch.equal(together, alone)


def _random(language: LanguageConfig, seed: int) -> DeepseekVL2:
    """A random model with another language model than the tiny ones have."""
    config = tiny_config("mla" if language.use_mla else "mha")
    projector = dataclasses.replace(config.projector, n_embed=language.hidden_size)
    model = DeepseekVL2(dataclasses.replace(config, language=language, projector=projector)).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.requires_grad_(False).parameters():
        parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    return model


SIZES: dict[str, dict[str, Any]] = {
    "four heads, as nano": {"num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 128},
    "low-rank queries": {"q_lora_rank": 48},
    "nothing a multiple of 32": {
        "hidden_size": 120,
        "intermediate_size": 200,
        "moe_intermediate_size": 40,
        "vocab_size": 555,
        "num_attention_heads": 5,
        "kv_lora_rank": 40,
    },
    "more experts than run together": {"n_routed_experts": 9, "num_experts_per_tok": 3},
    "no shared experts": {"n_shared_experts": None},
    "grouped heads": {"num_attention_heads": 4, "use_mla": False, "kv_lora_rank": None},
}


@pytest.mark.parametrize(
    ("size", "threads"), [*((size, 1) for size in SIZES), ("four heads, as nano", 2), ("nothing a multiple of 32", 2)]
)
@torch.inference_mode()
def test_bits_of_other_sizes(size: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if size.startswith("more experts"):
        monkeypatch.setattr("trtvlm.plugins.rows.experts.DENSE_LIMIT", 0)
    language = dataclasses.replace(tiny_config("base").language, **SIZES[size])
    model = for_cpu(_random(language, 1))
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(100, language.hidden_size, generator=generator)
    widths = [8, 5, 5, 1, 7, 3, 8, 2, 6]
    tokens = torch.randint(0, 544, (sum(widths),), generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = _decode(model, start, widths, tokens)
        assert torch.equal(together, _decode(model, start, [1] * len(tokens), tokens))
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def test_says_what_the_float_model_says(pair: tuple[DeepseekVL2, DeepseekVL2]) -> None:
    model, swapped = pair
    generator = torch.Generator().manual_seed(3)
    start, tokens = torch.randn(40, 64, generator=generator), torch.randint(0, 544, (24,), generator=generator)
    expected = _decode(model, start, [4] * 6, tokens)
    exact = _decode(for_cpu(model, torch.float32), start, [4] * 6, tokens)
    torch.testing.assert_close(exact, expected, atol=2e-4, rtol=2e-4)
    # Weights rounded to 11 bits: errors of 2**-12 of each of the logits' contributions, which are of size 1.
    rounded = _decode(swapped, start, [4] * 6, tokens)
    assert (rounded - expected).abs().mean() < 5e-3
    assert (rounded.argmax(-1) == expected.argmax(-1)).float().mean() > 0.9


@torch.inference_mode()
def test_everything_but_decoding_is_the_float_model(pair: tuple[DeepseekVL2, DeepseekVL2]) -> None:
    model, swapped = pair
    x, mask = torch.randn(2, 20, 64), torch.ones(2, 20, dtype=torch.int64)
    mask[0, :3] = 0
    assert torch.equal(swapped.language(x), model.language(x))
    caches = [KVCache(model.config.language, 2, 30) for _ in range(2)]
    assert torch.equal(
        swapped.language(x, caches[0], mask, last_only=True), model.language(x, caches[1], mask, last_only=True)
    )
    assert swapped.vision is model.vision
    assert swapped.language.model is model.language.model
    assert isinstance(model.language, LanguageModel)
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(swapped.encode_views(pixels), model.encode_views(pixels))


@torch.inference_mode()
def test_last_only_and_a_full_cache(pair: tuple[DeepseekVL2, DeepseekVL2]) -> None:
    _, model = pair
    x = torch.randn(1, 5, 64)
    cache = KVCache(model.config.language, 1, 9)
    every = model.language(x, cache)
    cache.rollback(0)
    assert torch.equal(model.language(x, cache, last_only=True), every[:, -1:])
    with pytest.raises(ValueError, match="exceed"):
        model.language(x, cache)
    assert cache.length == 5
