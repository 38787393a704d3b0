"""The kernels of mla_attention compile everywhere, and attend as the reference does, whatever rows come together."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trtvlm.model.cache import LatentCache
from trtvlm.model.latent_codes import dequantize_latent, quantize_latent
from trtvlm.model.rope import rope_table
from trtvlm.plugins.cuda.compiler import ARCHITECTURES, PLUGINS, SHARED_LIMIT, compile_source
from trtvlm.plugins.mla_attention import reference
from trtvlm.plugins.mla_attention.decode import (
    CHUNK,
    MOST_POSITIONS,
    SOURCE,
    MLAWeights,
    MLAWorkspace,
    attend_bytes,
    mla_decode,
    rows_of_a_block,
    tiles_of_values,
)

DEVICE = "cuda"
THETA = 10_000.0
ROWS = (1, 2, 3, 5, 8, 9, 16)
POSITIONS = 1088
AHEAD = 30_000.0
CODE_AHEAD, SCALE_AHEAD = 100, 300.0  # the same as a code


class Size(NamedTuple):
    heads: int
    nope: int
    rope: int
    value: int
    rank: int


SIZES = {"nano": Size(8, 32, 32, 32, 128), "small": Size(16, 128, 64, 128, 512), "base": Size(32, 128, 64, 128, 512)}


# `combine` is the same for both caches: one of them has few rows, the other many, and both have all sizes.
@pytest.mark.parametrize(("rows", "coded"), [(1, False), (8, False), (8, True)])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles(arch: str, size: Size, rows: int, coded: bool) -> None:
    macros = {name.upper(): value for name, value in size._asdict().items()}
    macros |= {"COMBINE_TILES": tiles_of_values(size.value, size.heads, rows), "INT8_LATENT": int(coded)}
    macros["ATTEND_ROWS"] = together = rows_of_a_block(rows, 64 * rows)
    _, kernels = compile_source((PLUGINS / SOURCE).read_text(), macros, arch)
    assert set(kernels) == {"absorb", "attend", "combine"}
    for usage in kernels.values():
        assert usage.spilled == usage.stack == 0
        assert usage.shared <= SHARED_LIMIT
    assert kernels["attend"].shared + attend_bytes(size.rank + size.rope, together) <= SHARED_LIMIT
    # With a row a block, launches overlap: others find room beside it.
    assert kernels["attend"].registers <= (48 if together == 1 else 128)
    assert max(usage.registers for usage in kernels.values()) * 256 <= 65536


def lanes_in_order(tiles: Tensor) -> Tensor:
    """Half tiles [..., out / 16, in / 64, 4, 32, 8] -> [..., out, in]: each register put where the kernels' comment says."""
    step, lane, item = torch.meshgrid(torch.arange(4), torch.arange(32), torch.arange(8), indexing="ij")
    register, half = item // 2, item % 2
    row = lane // 4 + 8 * (register % 2)
    column = 16 * (lane % 4) + 4 * step + 2 * (register // 2) + half
    out = torch.full((*tiles.shape[:-3], 16, 64), torch.nan, dtype=tiles.dtype)
    out[..., row, column] = tiles
    return out.transpose(-3, -2).flatten(-2).flatten(-3, -2)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_the_packed_halves_of_kv_b(size: Size) -> None:
    kv_b = torch.randn(size.heads * (size.nope + size.value), size.rank).half()
    weights = MLAWeights.pack(kv_b, torch.ones(size.rank).half(), size.heads, size.nope, size.rope)
    key, value = kv_b.view(size.heads, -1, size.rank).split([size.nope, size.value], dim=1)
    # What is beyond the nope values meets the rope values of q in the kernel, so it has to be zero.
    assert torch.equal(lanes_in_order(weights.keys), F.pad(key.transpose(1, 2), (0, -size.nope % 64)))
    assert torch.equal(lanes_in_order(weights.values), value)
    assert weights.value == size.value


def test_refuses_more_positions_than_it_merges() -> None:
    assert MLAWorkspace.allocate(1, MOST_POSITIONS, 1, 64, 16, "meta").chunks == MOST_POSITIONS // CHUNK
    with pytest.raises(ValueError, match=str(MOST_POSITIONS)):
        MLAWorkspace.allocate(1, MOST_POSITIONS + 1, 1, 64, 16, "cpu")


@dataclass
class Case:
    """Inputs of one step on the device, and what must come out, in float64."""

    q: Tensor
    kv: Tensor
    weights: MLAWeights
    cache: LatentCache
    out: Tensor
    expected: tuple[Tensor, Tensor, Tensor]
    rope: tuple[Tensor, Tensor]

    def step(self, cursor: int, first: int, rows: int, workspace: MLAWorkspace) -> Callable[[], None]:
        """A launch of rows first..first + rows - 1, when row 0 is at `cursor`."""
        part, at = slice(first, first + rows), torch.tensor([cursor + first], dtype=torch.int32).to(DEVICE)
        return lambda: decode(self, part, at, workspace, rows)


def decode(case: Case, part: slice, at: Tensor, workspace: MLAWorkspace, rows: int) -> None:
    latents, rotated, *scales = (tensor[0] for tensor in case.cache.tensors())
    mla_decode(
        case.q[part], case.kv[part], case.weights, case.rope, latents, rotated, at, case.out[part], workspace, rows, POSITIONS,
        scales=scales[0] if scales else None,
    )  # fmt: skip


def make(size: Size, cursor: int, rows: int, coded: bool = False) -> Case:
    heads, nope, rope, value, rank = size
    torch.manual_seed(cursor * 17 + rows)
    q = torch.randn(rows, heads * (nope + rope)).half()
    kv = (3 * torch.randn(rows, rank + rope)).half()
    norm = (1 + 0.2 * torch.randn(rank)).half()
    kv_b = (torch.randn(heads * (nope + value), rank) * rank**-0.5).half()
    held, k_pe_cache = torch.randn(POSITIONS, rank).half(), torch.randn(POSITIONS, rope).half()
    latent, k_pe = kv.double().split([rank, rope], dim=1)
    latent = latent * torch.rsqrt(latent.square().mean(-1, keepdim=True) + 1e-6) * norm.double()
    if coded:
        codes, scales = quantize_latent(held)
        held, latent = dequantize_latent(codes, scales, torch.half), rounded(latent)
    wide = held.double(), k_pe_cache.double()
    scale = (nope + rope) ** -0.5
    attended = reference.mla_attention(
        q.double(), latent, k_pe, kv_b.double(), *wide, torch.tensor([cursor]), heads, scale, THETA
    )
    # What lies ahead of the cursor is left over from a rollback: finite, and it must not be seen.
    k_pe_cache[cursor:] = AHEAD
    if coded:
        codes[cursor:], scales[cursor:] = CODE_AHEAD, SCALE_AHEAD
        cache = LatentCache(codes[None].to(DEVICE), k_pe_cache[None].to(DEVICE), scales[None].to(DEVICE))
    else:
        held[cursor:] = AHEAD
        cache = LatentCache(held[None].to(DEVICE), k_pe_cache[None].to(DEVICE))
    cos, sin = rope_table(rope, POSITIONS, THETA)
    return Case(
        q.to(DEVICE),
        kv.to(DEVICE),
        MLAWeights.pack(kv_b.to(DEVICE), norm.to(DEVICE), heads, nope, rope),
        cache,
        torch.full((rows, heads * value), torch.nan, dtype=torch.half, device=DEVICE),
        (attended, *wide),
        (cos.to(DEVICE), sin.to(DEVICE)),
    )


def rounded(latent: Tensor) -> Tensor:
    """What is read of latents, float64 or any other, that were appended in half as codes."""
    return dequantize_latent(*quantize_latent(latent.half()), torch.half).to(latent.dtype)


def workspace(size: Size, rows: int) -> MLAWorkspace:
    made = MLAWorkspace.allocate(rows, POSITIONS, size.heads, size.rank, size.rope, DEVICE)
    for buffer in (made.queries, made.outputs, made.shares):
        buffer.fill_(torch.nan)
    return made


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu().double() - expected).norm() / expected.norm())


CURSORS = {False: (0, 25, 31, 1000, POSITIONS - 16), True: (0, 25, POSITIONS - 16)}


@pytest.mark.gpu
@pytest.mark.parametrize(("cursor", "coded"), [(at, coded) for coded, every in CURSORS.items() for at in every])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("rows", ROWS)
def test_same_as_the_reference_and_as_a_row_alone(rows: int, cursor: int, size: Size, coded: bool) -> None:
    together, alone = make(size, cursor, rows, coded), make(size, cursor, rows, coded)
    together.step(cursor, 0, rows, workspace(size, rows))()
    buffers = workspace(size, 1)
    for row in range(rows):
        alone.step(cursor, row, 1, buffers)()
    assert torch.equal(together.out, alone.out)
    attended, *caches = together.expected
    assert error(together.out, attended) < 2e-3
    end = cursor + rows
    for found, expected in zip(together.cache.read(end), caches, strict=True):
        assert error(found[0], expected[:end]) < 2e-3
    for found, single in zip(together.cache.tensors(), alone.cache.tensors(), strict=True):
        assert torch.equal(found[0, :end], single[0, :end])
    for found in together.cache.read(POSITIONS):
        assert bool(found[0, end:].eq(AHEAD).all())


@pytest.mark.gpu
@pytest.mark.parametrize("coded", [False, True], ids=["halves", "codes"])
def test_a_graph_reads_the_cursor_anew(coded: bool) -> None:
    size, rows, cursors = SIZES["small"], 5, (3, 29, 700)
    buffers, at = workspace(size, rows), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    case = make(size, 0, rows, coded)

    def launch() -> None:
        decode(case, slice(None), at, buffers, rows)

    launch()  # compiles and loads, which cannot be captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for cursor in cursors:
        fresh = make(size, cursor, rows, coded)
        for mine, theirs in zip(
            (case.q, case.kv, *case.cache.tensors()), (fresh.q, fresh.kv, *fresh.cache.tensors()), strict=True
        ):
            mine.copy_(theirs)
        for held, new in (
            (case.weights.keys, fresh.weights.keys),
            (case.weights.values, fresh.weights.values),
            (case.weights.norm, fresh.weights.norm),
        ):
            assert held is not None
            assert new is not None
            held.copy_(new)
        at.fill_(cursor)
        case.out.fill_(torch.nan)
        graph.replay()
        assert error(case.out, fresh.expected[0]) < 2e-3
