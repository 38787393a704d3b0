"""The prefill of the CUDA executor: on a CPU with its launches replaced by what they mean, on a GPU as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tiny import tiny_config, tiny_model
from trtvlm.model.cache import HeadCache, KVCache, LatentCache, LayerCache
from trtvlm.model.cache_kind import CacheKind
from trtvlm.model.presets import preset
from trtvlm.model.sizes import SIZES, language_size
from trtvlm.model.vision import Projector, VisionTower
from trtvlm.plugins.cuda.emulation.emulator import Schedule, compiler, emulated
from trtvlm.plugins.cuda.tiles import half_rows, half_tiles, int4_tiles
from trtvlm.plugins.int4_linear import gemm as products
from trtvlm.plugins.int4_linear import packing
from trtvlm.plugins.prefill import reference as launches
from trtvlm.plugins.random_checkpoint import RandomCheckpoint
from trtvlm.runtime.cuda import measure_prefill as measured
from trtvlm.runtime.cuda import prefill as subject
from trtvlm.runtime.cuda.decode import DecodeProgram
from trtvlm.runtime.cuda.prefill import Prefill
from trtvlm.runtime.cuda.reference import reference_model
from trtvlm.runtime.cuda.vision import VisionProgram
from trtvlm.runtime.cuda.weights import LanguageWeights, load_weights
from trtvlm.scripts import bench_prefill

MODELS = ("nano", "nano-draft")


def rows_of(codes: Tensor, scales: Tensor) -> Tensor:
    """`int4_tiles` undone: the weight in float32 [..., out, in]."""
    shifts = torch.tensor([[4 * r, 4 * r + 16] for r in range(4)], device=codes.device)
    nibbles = (
        codes.long().unsqueeze(-1).unsqueeze(-1) >> shifts & 15
    ) - 8  # [..., tile, group, lane, step, register, half]
    values = half_rows(nibbles.transpose(-3, -4).flatten(-2).half().contiguous())
    *lead, tiles, groups, _, _ = scales.shape
    # [tile, group, g, row half] -> [tile, row half, g, group]
    n = len(lead)
    by_row = scales.permute(*range(n), n, n + 3, n + 2, n + 1).reshape(*lead, 16 * tiles, groups)
    return values.float() * by_row.float().repeat_interleave(64, -1)


def gemm(x: Tensor, codes: Tensor, scales: Tensor, out: Tensor) -> None:
    out.copy_(x.float() @ rows_of(codes, scales).t())


def gated_gemm(x: Tensor, codes: Tensor, scales: Tensor, out: Tensor, pqs: None, next_scale: Tensor | None) -> None:
    up, gate = (x.float() @ rows_of(codes, scales).t()).chunk(2, dim=-1)
    out.copy_(up * F.silu(gate) * (1 if next_scale is None else next_scale.float()))


def experts(
    x: Tensor, index: Tensor, weight: Tensor, fc: Tensor, fc_scales: Tensor, fc_pqs: None, proj: Tensor,
    proj_scales: Tensor, proj_pqs: Tensor | None, width: int,
) -> Tensor:  # fmt: skip
    assert fc_pqs is None
    out = torch.zeros(x.shape)
    for expert in index.unique().tolist():
        rows, slot = (index == expert).nonzero(as_tuple=True)
        inner = torch.empty(len(rows), width, dtype=torch.half)
        gated_gemm(x[rows], fc[expert], fc_scales[expert], inner, None, proj_pqs)
        result = torch.empty(len(rows), x.shape[1], dtype=torch.half)
        gemm(inner, proj[expert], proj_scales[expert], result)
        out.index_add_(0, rows, result.float() * weight[rows, slot].unsqueeze(1))
    return out


@pytest.fixture
def launches_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("add_norm", "route", "append_latent", "append_heads", "attend"):
        monkeypatch.setattr(subject, name, getattr(launches, name))
    for launch in (gemm, gated_gemm, experts):
        monkeypatch.setattr(subject, launch.__name__, launch)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def test_tiles_are_undone() -> None:
    weight = torch.randn(3, 48, 192).half()
    assert torch.equal(half_rows(half_tiles(weight)), weight)
    packed, scales = torch.randint(-128, 128, (2, 24, 128), dtype=torch.int8), torch.rand(2, 48, 2).half()
    assert torch.equal(rows_of(*int4_tiles(packed, scales)), packing.dequantize(packed, scales.float()))


def cut(model: str, device: str, layers: int = 2) -> tuple[RandomCheckpoint, LanguageWeights]:
    """Few layers: with more random ones, a token between two experts may go the other way, which is nobody's error."""
    config = dataclasses.replace(language_size(model), num_hidden_layers=layers)
    checkpoint = RandomCheckpoint(config, device=device)
    return checkpoint, load_weights(checkpoint, device)


def contents(layer: LayerCache, length: int) -> Sequence[Tensor]:
    return layer.read(length) if isinstance(layer, LatentCache) else layer.tensors()


@torch.inference_mode()
def compare(model: str, cases: tuple[tuple[int, int], ...], kind: CacheKind = "fp16") -> list[Tensor]:
    """Prompts of (length, rows at a time) against the model in float32: the last row, and what is read of the caches."""
    checkpoint, weights = cut(model, "cpu")
    config, expected = checkpoint.config, reference_model(checkpoint, "cpu")
    found = []
    for length, size in cases:
        cache, plain = (KVCache(config, 1, 128, dtype, kind=kind) for dtype in (torch.half, torch.float32))
        ids = torch.randint(config.vocab_size, (length,), generator=torch.Generator().manual_seed(length))
        states = expected.hidden_states(expected.model.embed_tokens(ids).unsqueeze(0), plain)[0]
        last = Prefill(weights, cache, size).run(weights.embedding[ids])
        assert cache.length == length
        assert error(expected.model.norm(last), states[-1]) < 5e-3
        for layer, other in zip(cache.layers, plain.layers, strict=True):
            for number, pair in enumerate(zip(contents(layer, length), contents(other, length), strict=True)):
                # Some codes are one apart, where the two latents lie on either side of a half.
                assert error(*pair) < (5e-3 if kind == "fp16" else 1.2e-2), (length, size, number)
        found.append(last)
    return found


@pytest.mark.parametrize(("model", "kind"), [*((model, "fp16") for model in MODELS), ("nano", "int8")])
@pytest.mark.usefixtures("launches_on_a_cpu")
def test_same_as_the_model(model: str, kind: CacheKind) -> None:
    compare(model, ((1, 16), (20, 16)), kind)


@pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++ compiler")
@pytest.mark.slow
@pytest.mark.parametrize(("model", "kind"), [*((model, "fp16") for model in MODELS), ("nano", "int8")])
def test_the_kernels_themselves_in_the_emulator(model: str, kind: CacheKind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_device", lambda _: (132, 228 * 1024))
    with emulated(Schedule("shuffled")):
        found = compare(model, ((20, 64), (20, 16)), kind)
    # Where a prompt is cut changes little, if anything: the products in half are a library's.
    assert error(found[1], found[0]) < (1e-3 if kind == "fp16" else 5e-3)


@pytest.mark.usefixtures("launches_on_a_cpu")
@torch.inference_mode()
def test_few_rows_are_filled_up_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "BUCKETS", (4, 8))
    monkeypatch.setattr(subject, "SPAN", 16)
    captured: list[subject.Step] = []

    def capture(step: subject.Step) -> subject.Step:
        step()
        captured.append(step)
        return step

    _, weights = cut("nano-draft", "cpu")
    caches = [KVCache(weights.config, 1, 64, torch.half) for _ in range(2)]
    graphed, plain = Prefill(weights, caches[0], 16, capture), Prefill(weights, caches[1], 16)
    at = 0
    # Some of a bucket, one past the largest, some that reach into another span, and one that a full cache has no room to fill up.
    for rows, graphs in ((3, 1), (5, 2), (2, 2), (4, 2), (12, 2), (7, 3), (20, 4), (8, 5), (2, 5)):
        ids = torch.randint(weights.config.vocab_size, (rows,), generator=torch.Generator().manual_seed(rows))
        found, expected = (prefill.run(weights.embedding[ids]) for prefill in (graphed, plain))
        at += rows
        assert [cache.length for cache in caches] == [at, at]
        assert error(found, expected) < 1e-3
        assert len(captured) == graphs, rows
    for first, second in zip(caches[0].layers, caches[1].layers, strict=True):
        assert isinstance(first, HeadCache)
        assert isinstance(second, HeadCache)
        assert error(first.k[:, :, :at], second.k[:, :, :at]) < 1e-3
        assert error(first.v[:, :, :at], second.v[:, :, :at]) < 1e-3


@pytest.mark.usefixtures("launches_on_a_cpu")
@torch.inference_mode()
def test_what_does_not_fit_is_refused() -> None:
    _, weights = cut("nano-draft", "cpu", 1)
    cache = KVCache(weights.config, 1, 64, torch.half)
    prefill = Prefill(weights, cache)
    with pytest.raises(ValueError, match="65 positions exceed"):
        prefill.run(weights.embedding[:65])
    with pytest.raises(ValueError, match="at least one row"):
        prefill.run(weights.embedding[:0])
    assert cache.length == 0
    with pytest.raises(ValueError, match="0 rows"):
        Prefill(weights, cache, 0)


class Counter:
    """A clock that counts the moments it marks."""

    def __init__(self) -> None:
        self.moments = 0

    def mark(self) -> int:
        self.moments += 1
        return self.moments

    def between(self, start: int, end: int) -> float:
        return float(end - start)

    def wait(self) -> None:
        pass


@pytest.mark.usefixtures("launches_on_a_cpu")
def test_measures_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    heads: list[Tensor] = []
    monkeypatch.setattr(measured, "head_of", lambda program, last: heads.append(last.clone()))
    _, weights = cut("nano-draft", "cpu", 1)
    found = measured.measure_prefill(weights.config, (3, 20), weights, 16, 2, Counter())
    assert [(row["tokens"], row["ms"]["p50"], row["tokens_a_second"]) for row in found] == [
        (3, 1, 3000),
        (20, 1, 20000),
    ]
    # The first runs are not counted, and each starts from an empty cache.
    assert len(heads) == 2 * (measured.WARMUP + 2)
    assert all(torch.equal(heads[0], head) for head in heads[: len(heads) // 2])
    with pytest.raises(ValueError, match="positions"):
        measured.measure_prefill(weights.config, (weights.config.max_position_embeddings + 1,), weights)


@pytest.mark.usefixtures("launches_on_a_cpu")
def test_the_script_compares_prompts_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(language_size("nano-draft"), num_hidden_layers=2)
    assert all(row["ok"] for row in bench_prefill.check(config, (3, 20), 16, "cpu"))
    monkeypatch.setattr(subject, "append_heads", lambda *arguments: None)
    assert not any(row["ok"] for row in bench_prefill.check(config, (3, 20), 16, "cpu"))


def test_measures_images() -> None:
    config = tiny_config("mha")
    found = measured.measure_vision(config.vision, config.projector, (1, 3), "cpu", 2, Counter())
    assert [(row["tiles"], row["tiles_a_second"]) for row in found] == [(1, 1000), (3, 3000)]


def test_views_of_an_image_are_what_the_model_makes_of_them() -> None:
    model = tiny_model("mha", 0)
    size = model.config.vision.image_size
    pixels = torch.rand(3, 3, size, size) * 2 - 1
    with torch.inference_mode():
        expected = model.encode_views(pixels)
        found = VisionProgram(model.vision, model.projector, "cpu").encode(pixels)
    assert found.dtype == torch.half
    assert error(found, expected) < 5e-3


@pytest.mark.gpu
def test_a_graph_of_views_is_the_tower_itself() -> None:
    torch.manual_seed(0)
    with torch.device("cuda"):
        # The official tower's widths, fewer layers: heads of 72.
        config = dataclasses.replace(preset(SIZES[0]).vision, layers=3)
        tower, projector = VisionTower(config), Projector(preset(SIZES[0]).projector)
        pixels = torch.rand(6, 3, config.image_size, config.image_size) * 2 - 1
        with torch.inference_mode():
            expected = projector(tower(pixels))
        program = VisionProgram(tower, projector, "cuda")
        for views in (1, 2, 6, 4, 2):
            found = program.encode(pixels[:views])
            again = program.encode(pixels[-views:])
            assert error(found, expected[:views]) < 5e-3
            assert error(again, expected[-views:]) < 5e-3
            assert torch.equal(found, program.encode(pixels[:views]))


@pytest.mark.gpu
@pytest.mark.parametrize("model", [*SIZES, *MODELS])
@torch.inference_mode()
def test_same_as_the_reference_and_decoding_goes_on(model: str) -> None:
    checkpoint, weights = cut(model, "cuda")
    config, expected = checkpoint.config, reference_model(checkpoint)
    most = config.max_position_embeddings
    ids = torch.randint(config.vocab_size, (most,), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    cache = KVCache(config, 1, most, torch.half, "cuda")
    prefill, program = Prefill(weights, cache), DecodeProgram(weights, cache, 8)
    cursor = torch.zeros(1, dtype=torch.int32, device="cuda")
    for length in (1, 7, 100, 700, subject.CHUNK + 1, 2 * subject.CHUNK + 3):
        if length + 8 > most:
            continue
        cache.rollback(0)
        first_time = prefill.run(weights.embedding[ids[:length]])
        cache.rollback(0)
        last = prefill.run(weights.embedding[ids[:length]])
        assert torch.equal(last, first_time)
        first = expected.lm_head(expected.model.norm(last)).unsqueeze(0)
        cursor.fill_(length)
        program.launch(ids[length : length + 8].int(), cursor, 8, cache.max_len, logits=True)
        found = torch.cat((first, program.logits[:8]))
        wanted = expected(expected.model.embed_tokens(ids[: length + 8]).unsqueeze(0))[0, length - 1 :]
        errors = (found - wanted).norm(dim=1) / wanted.norm(dim=1)
        # A row between two experts may go the other way: that costs it more, and no other row anything.
        assert float(errors.median()) < 1e-2, (length, errors)
        assert float(errors.max()) < 0.2, (length, errors)
