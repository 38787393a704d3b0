"""The embedding kernel compiles everywhere, and gives what the reference gives."""

import pytest
import torch

from trtvlm.plugins.cuda.compiler import ARCHITECTURES, PLUGINS, SHARED_LIMIT, compile_source
from trtvlm.plugins.embedding import cuda
from trtvlm.plugins.embedding.reference import choose, embed

DEVICE = "cuda"
WIDTHS = (128, 256, 1280, 2048, 2560)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles(arch: str) -> None:
    for width in WIDTHS:
        _, kernels = compile_source((PLUGINS / cuda.KERNEL).read_text(), {"HIDDEN": width}, arch)
        assert kernels["embed"].spilled == 0
        assert kernels["embed"].registers * cuda.threads(width) <= 65536
        assert kernels["embed"].shared <= SHARED_LIMIT


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="100"):
        cuda.threads(100)


def test_the_smaller_of_equal_candidates_is_chosen() -> None:
    values = torch.tensor([[1.0, 3.0, 3.0], [2.0, 1.0, 0.0]])
    assert choose(values, torch.tensor([[5, 30, 20], [7, 8, 9]], dtype=torch.int32)).tolist() == [20, 7]


@pytest.mark.gpu
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, 2, 9, 16])
@pytest.mark.parametrize("chosen", [False, True])
def test_same_as_the_reference(width: int, rows: int, chosen: bool) -> None:
    table = torch.randn(500, width).half()
    tokens = torch.randint(0, 500, (rows,), dtype=torch.int32)
    tokens[0] = 499
    residual, sums = torch.full((rows, width), torch.nan), torch.full((rows, width // 16), torch.nan)
    candidates = None
    given = tokens.to(DEVICE)
    if chosen:
        values = torch.randn(300).round(decimals=1)  # with equal ones
        indices = torch.randperm(500, dtype=torch.int32)[:300]
        tokens[-1] = choose(values[None], indices[None])[0]
        given[-1] = -1
        candidates = values.to(DEVICE), indices.to(DEVICE)
    residual, sums = residual.to(DEVICE), sums.to(DEVICE)
    cuda.embed(given, table.to(DEVICE), residual, sums, rows, candidates)
    expected, expected_sums = embed(tokens, table)
    assert torch.equal(given.cpu(), tokens)
    assert torch.equal(residual.cpu(), expected)
    torch.testing.assert_close(sums.cpu(), expected_sums, rtol=1e-5, atol=0)


@pytest.mark.gpu
def test_a_row_does_not_depend_on_the_others() -> None:
    table = torch.randn(500, 2560).half().to(DEVICE)
    tokens = torch.randint(0, 500, (9,), dtype=torch.int32).to(DEVICE)
    sums, alone = torch.empty(9, 160, device=DEVICE), torch.empty(1, 160, device=DEVICE)
    residual = torch.empty(9, 2560, device=DEVICE)
    cuda.embed(tokens, table, residual, sums, 9)
    for row in range(9):
        cuda.embed(tokens[row : row + 1].clone(), table, residual, alone, 1)
        assert torch.equal(alone[0], sums[row])
