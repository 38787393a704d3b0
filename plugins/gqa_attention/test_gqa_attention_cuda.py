"""The kernels of gqa_attention compile everywhere, and attend as the reference does, whatever rows come together."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from trtvlm.model.rope import rope_table
from trtvlm.plugins.cuda.compiler import ARCHITECTURES, PLUGINS, SHARED_LIMIT, compile_source
from trtvlm.plugins.gqa_attention import reference
from trtvlm.plugins.gqa_attention.decode import CHUNK, MOST_POSITIONS, SOURCE, GQAWorkspace, gqa_decode

DEVICE = "cuda"
THETA = 10_000.0
ROWS = (1, 2, 3, 5, 8, 9, 16)
POSITIONS = 1088
AHEAD = 30_000.0


class Size(NamedTuple):
    heads: int
    kv_heads: int
    width: int


SIZES = {"nano-draft": Size(4, 4, 32), "tiny": Size(10, 10, 128), "shared": Size(8, 4, 64), "odd": Size(2, 1, 48)}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles(arch: str, size: Size) -> None:
    macros = {name.upper(): value for name, value in size._asdict().items()}
    _, kernels = compile_source((PLUGINS / SOURCE).read_text(), macros, arch)
    assert set(kernels) == {"attend", "combine"}
    for usage in kernels.values():
        assert usage.spilled == usage.stack == 0
        assert usage.shared <= min(SHARED_LIMIT, 48 * 1024)  # all of it is static
        assert usage.registers * 256 <= 65536


def test_refuses_what_it_cannot_do() -> None:
    assert GQAWorkspace.allocate(1, MOST_POSITIONS, 1, 16, "meta").chunks == MOST_POSITIONS // CHUNK
    with pytest.raises(ValueError, match=str(MOST_POSITIONS)):
        GQAWorkspace.allocate(1, MOST_POSITIONS + 1, 1, 16, "cpu")
    for heads, kv_heads, width in ((3, 1, 64), (2, 2, 144), (2, 2, 40)):
        made = make(Size(heads, kv_heads, width), 0, 1, "cpu")
        with pytest.raises(ValueError, match=str(width)):
            launch(made, Size(heads, kv_heads, width), 0, 0, 1, "cpu")


@dataclass
class Case:
    """Inputs of one step, and what must come out, in float64."""

    qkv: Tensor
    caches: tuple[Tensor, Tensor]
    out: Tensor
    expected: tuple[Tensor, Tensor, Tensor]


def make(size: Size, cursor: int, rows: int, device: str = DEVICE) -> Case:
    heads, kv_heads, width = size
    torch.manual_seed(cursor * 17 + rows)
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * width).half()
    caches = torch.randn(kv_heads, POSITIONS, width).half(), torch.randn(kv_heads, POSITIONS, width).half()
    wide = caches[0].double(), caches[1].double()
    q, k, v = qkv.double().split([heads * width, kv_heads * width, kv_heads * width], dim=1)
    attended = reference.gqa_attention(q, k, v, *wide, torch.tensor([cursor]), heads, width**-0.5, THETA)
    # What lies ahead of the cursor is left over from a rollback: finite, and it must not be seen.
    for cache in caches:
        cache[:, cursor:] = AHEAD
    out = torch.full((rows, heads * width), torch.nan, dtype=torch.half, device=device)
    return Case(qkv.to(device), (caches[0].to(device), caches[1].to(device)), out, (attended, *wide))


def launch(case: Case, size: Size, cursor: int, first: int, rows: int, device: str = DEVICE) -> None:
    """Rows first..first + rows - 1 of the step, when row 0 is at `cursor`."""
    workspace = GQAWorkspace.allocate(rows, POSITIONS, size.heads, size.width, device)
    workspace.outputs.fill_(torch.nan)
    workspace.shares.fill_(torch.nan)
    part, at = slice(first, first + rows), torch.tensor([cursor + first], dtype=torch.int32).to(device)
    cos, sin = rope_table(size.width, POSITIONS, THETA)
    rope = cos.to(device), sin.to(device)
    gqa_decode(case.qkv[part], size.heads, rope, *case.caches, at, case.out[part], workspace, rows, POSITIONS)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu().double() - expected).norm() / expected.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
# From 49 and from 56 on, 16 rows end in a chunk that none of the first 8 rows reaches.
@pytest.mark.parametrize("cursor", [0, 49, 56, 60, 63, 1000, POSITIONS - 16])
@pytest.mark.parametrize("rows", ROWS)
def test_same_as_the_reference_and_as_a_row_alone(rows: int, cursor: int, size: Size) -> None:
    together, alone = make(size, cursor, rows), make(size, cursor, rows)
    launch(together, size, cursor, 0, rows)
    for row in range(rows):
        launch(alone, size, cursor, row, 1)
    assert torch.equal(together.out, alone.out)
    attended, *caches = together.expected
    assert error(together.out, attended) < 2e-3
    end = cursor + rows
    for found, single, expected in zip(together.caches, alone.caches, caches, strict=True):
        assert torch.equal(found[:, :end], single[:, :end])
        assert error(found[:, :end], expected[:, :end]) < 2e-3
        assert bool(found[:, end:].eq(AHEAD).all())


@pytest.mark.gpu
def test_a_graph_reads_the_cursor_anew() -> None:
    size, rows = SIZES["tiny"], 5
    case, at = make(size, 0, rows), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    workspace = GQAWorkspace.allocate(rows, POSITIONS, size.heads, size.width, DEVICE)
    cos, sin = rope_table(size.width, POSITIONS, THETA)
    rope = cos.to(DEVICE), sin.to(DEVICE)

    def step() -> None:
        gqa_decode(case.qkv, size.heads, rope, *case.caches, at, case.out, workspace, rows, POSITIONS)

    step()  # compiles and loads, which cannot be captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for cursor in (3, 61, 700):
        fresh = make(size, cursor, rows)
        for mine, theirs in zip((case.qkv, *case.caches), (fresh.qkv, *fresh.caches), strict=True):
            mine.copy_(theirs)
        at.fill_(cursor)
        case.out.fill_(torch.nan)
        graph.replay()
        assert error(case.out, fresh.expected[0]) < 2e-3
