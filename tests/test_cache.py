"""The cache of latents in 8 bits: what is read back, bit by bit and within its bound, and what a model makes of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.tiny import tiny_config, tiny_model
from trtvlm.model.cache import HeadCache, KVCache, LatentCache
from trtvlm.model.cache_kind import CacheKind, check_cache_kind
from trtvlm.model.config import LanguageConfig
from trtvlm.model.errors import UserError
from trtvlm.model.latent_codes import LEAST_SCALE, MOST_SCALE, dequantize_latent, quantize_latent
from trtvlm.model.pages.samples import load_samples
from trtvlm.model.presets import PRESETS, preset
from trtvlm.plugins.step_bytes import position_bytes
from trtvlm.runtime.engine import open_model
from trtvlm.runtime.lane import Lane
from trtvlm.runtime.request import Request, question
from trtvlm.runtime.session import Session

LARGEST_HALF = 65504.0


def latents(rows: int, width: int, exponents: list[int], seed: int) -> Tensor:
    """Halves whose rows have sizes far apart, with values at amax of either sign."""
    found = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    sizes = torch.tensor([2.0**exponent for exponent in exponents])
    return (found * sizes.unsqueeze(1)).clamp(-LARGEST_HALF, LARGEST_HALF).half()


@given(
    exponents=st.lists(st.integers(-26, 15), min_size=1, max_size=6),
    width=st.sampled_from([1, 2, 64, 512]),
    seed=st.integers(0, 2**31),
)
def test_what_is_read_is_within_half_a_scale(exponents: list[int], width: int, seed: int) -> None:
    latent = latents(len(exponents), width, exponents, seed)
    codes, scales = quantize_latent(latent)
    assert codes.dtype == torch.int8
    assert scales.dtype == torch.half
    assert int(codes.min()) >= -127  # none is cut off: -128 never comes out
    wanted = (latent.double().abs().amax(-1) / 127).clamp_max(MOST_SCALE)
    assert bool((scales.double() >= wanted * (1 - 1e-7)).all())
    assert bool((scales.double() <= wanted * (1 + 2**-10) + LEAST_SCALE).all())
    read = dequantize_latent(codes, scales, torch.double)
    product = codes.double() * scales.double().unsqueeze(-1)
    assert torch.equal(read, product.half().double())  # one rounding, to nearest even
    rounding = product.abs() * 2**-11 + 2**-25
    assert bool(((latent.double() - read).abs() <= scales.double().unsqueeze(-1) * (0.5 + 1e-5) + rounding).all())


@given(rows=st.integers(1, 9), row=st.integers(0, 8), seed=st.integers(0, 2**31))
def test_a_position_s_bits_are_its_own(rows: int, row: int, seed: int) -> None:
    latent, at = latents(rows, 64, [seed % 7 - number for number in range(rows)], seed), row % rows
    codes, scales = quantize_latent(latent)
    alone, scale = quantize_latent(latent[at])
    assert torch.equal(alone, codes[at])
    assert torch.equal(scale, scales[at])


def test_zeros_and_the_extremes() -> None:
    latent = torch.zeros(3, 4).half()
    latent[1, 2], latent[2] = 2.0**-24, torch.tensor([LARGEST_HALF, -LARGEST_HALF, 1.0, 0.0])
    codes, scales = quantize_latent(latent)
    assert torch.equal(codes, torch.tensor([[0, 0, 0, 0], [0, 0, 1, 0], [127, -127, 0, 0]], dtype=torch.int8))
    assert bool((scales > 0).all())
    assert scales[:2].tolist() == [LEAST_SCALE] * 2
    assert bool(dequantize_latent(codes, scales, torch.half).isfinite().all())


def test_a_cache_is_written_and_read_anywhere() -> None:
    config = tiny_config("mla").language
    halves, codes = (KVCache(config, 2, 20, torch.half, kind=kind) for kind in ("fp16", "int8"))
    rank, rope = config.kv_lora_rank or 0, config.qk_rope_head_dim
    latent, k_pe = torch.randn(2, 9, rank).half(), torch.randn(2, 9, rope).half()
    for layer in (*halves.layers, *codes.layers):
        assert isinstance(layer, LatentCache)
        layer.write(3, latent[:, :5], k_pe[:, :5])
        layer.write(8, latent[:, 5:], k_pe[:, 5:])
        found, keys = layer.read(12)
        assert torch.equal(keys[:, 3:], k_pe)
        assert found.dtype == torch.half
        expected = latent if layer.scales is None else dequantize_latent(*quantize_latent(latent), torch.half)
        assert torch.equal(found[:, 3:], expected)
        assert not found[:, :3].any()
        assert bool(torch.cat([part.flatten() for part in layer.read(20)]).isfinite().all())


@pytest.mark.parametrize("kind", ["fp16", "int8"])
@pytest.mark.parametrize("name", [*PRESETS, "nano"])
def test_a_position_takes_the_bytes_that_are_counted(name: str, kind: CacheKind) -> None:
    config = preset(name).language if name in PRESETS else tiny_config("mla").language
    layers = KVCache(config, 1, 64, torch.half, "meta", kind).layers
    held = sum(tensor.nbytes for layer in layers for tensor in layer.tensors())
    assert held == 64 * len(layers) * position_bytes(config, kind)
    assert any(isinstance(layer, HeadCache) for layer in layers) != config.use_mla


def test_what_has_no_latents_is_one_sentence() -> None:
    latent, plain = tiny_config("mla").language, tiny_config("mha").language
    check_cache_kind("fp16", [("a", plain)])
    check_cache_kind("int8", [("a", latent), ("b", plain)])
    check_cache_kind("int8", [("a", plain), ("b", latent)])
    with pytest.raises(UserError, match=r"^--kv-cache int8 is for latent attention, which a has not: leave it out\.$"):
        check_cache_kind("int8", [("a", plain)])
    with pytest.raises(UserError, match="which a and b have not"):
        check_cache_kind("int8", [("a", plain), ("b", plain)])


# A model


def logits_of(
    model: torch.nn.Module, config: LanguageConfig, embeds: Tensor, cuts: list[int], kind: CacheKind
) -> Tensor:
    cache = KVCache(config, 1, embeds.shape[1], kind=kind)
    return torch.cat([model(part, cache) for part in torch.split(embeds, cuts, dim=1)], dim=1)


@pytest.mark.parametrize("chunk", [1, 3, 7])
@torch.inference_mode()
def test_chunks_see_what_one_pass_sees_and_it_is_close_to_what_was_computed(chunk: int) -> None:
    model = tiny_model("mla")
    config = model.config.language
    embeds = torch.randn(1, 20, config.hidden_size, generator=torch.Generator().manual_seed(1))
    whole = logits_of(model.language, config, embeds, [20], "int8")
    cuts = [chunk] * (20 // chunk) + [20 % chunk] * bool(20 % chunk)
    # Absorbed and expanded round differently, which moves a code here and there, and for one row perhaps an expert.
    assert of_most_rows(logits_of(model.language, config, embeds, cuts, "int8"), whole) < 1e-2
    exact = logits_of(model.language, config, embeds, [20], "fp16")
    assert 1e-4 < of_most_rows(whole, exact) < 3e-2


def of_most_rows(found: Tensor, expected: Tensor) -> float:
    """The relative error that four rows of five stay within."""
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float(errors.flatten().quantile(0.8))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.inference_mode()
def test_the_bundled_target_reads_on_as_it_did() -> None:
    """Teacher-forced over its own answers: next tokens of the two caches."""
    sessions = [Session(open_model("nano", kv_cache=kind)) for kind in ("fp16", "int8")]
    asked = question([load_samples("heldout")[0].image])
    tokens = list(sessions[0].answer(Request(asked)).token_ids)
    assert len(tokens) > 100
    logits = []
    for session in sessions:
        target = session.engine.target
        first = Lane(target).fill(session.engine.processor(asked)).logits.unsqueeze(0)
        steps = [target.decode(tokens[at : at + 8]) for at in range(0, len(tokens), 8)]
        logits.append(torch.cat([first, *steps]))
    assert logits[0].argmax(-1)[:-1].tolist() == tokens
    assert float((logits[1].argmax(-1) == logits[0].argmax(-1)).float().mean()) > 0.99  # 6,540 of 6,544 over 60 pages
    assert 0 < relative(logits[1], logits[0]) < 2e-2
    assert list(sessions[1].answer(Request(asked)).token_ids) == list(
        sessions[1].answer(Request(asked, draft_tokens=0)).token_ids
    )
