"""The sampling kernels compile everywhere, and give what the reference gives."""

import numpy as np
import pytest
import torch
from torch import Tensor

from trtvlm.plugins.cuda.compiler import ARCHITECTURES, PLUGINS, SHARED_LIMIT, compile_source
from trtvlm.plugins.sampling import cuda
from trtvlm.plugins.sampling.reference import distribution, draw, random_fraction
from trtvlm.plugins.speculative_accept.state import STEP, Start

DEVICE = "cuda"
VOCABULARIES = (1024, 102400, 129280)
SEED = 2**63 + 2**33 + 5


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_compiles(vocab: int, arch: str) -> None:
    _, kernels = compile_source((PLUGINS / cuda.KERNEL).read_text(), {"VOCAB": vocab}, arch)
    assert set(kernels) == {"weigh", "refine_1", "refine_2", "finish"}
    for usage in kernels.values():
        assert usage.spilled == 0
        assert usage.registers <= 64  # two blocks of 512 threads on SM 8.6
        assert usage.shared <= SHARED_LIMIT


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="1001"):
        cuda.slices(1001)


def _candidates(logits: Tensor) -> tuple[Tensor, Tensor]:
    """What a head gives: the best of every 16 logits."""
    rows, vocab = logits.shape
    values, tokens = logits.view(rows, -1, 16).max(-1)
    return values.contiguous(), (tokens + torch.arange(0, vocab, 16, device=logits.device)).int().contiguous()


def _run(logits: Tensor, temperature: float, top_p: float, work: Tensor, which: int = 3) -> tuple[Tensor, Tensor]:
    rows = len(logits)
    state = Start(0, 0, 1, 9, seed=SEED, temperature=temperature, top_p=top_p).state()
    state[STEP] = 7
    probs = torch.full(logits.shape, torch.nan, device=DEVICE)
    token = torch.full((rows,), -1, dtype=torch.int32, device=DEVICE)
    cuda.probabilities(logits, _candidates(logits), state.to(DEVICE), probs, work, rows, token=token, which=which)
    return probs.cpu(), token.cpu()


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_same_as_the_reference(vocab: int) -> None:
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(vocab)) * 3
    work = cuda.workspace(3, vocab, DEVICE)  # one for all: every call leaves it usable
    for temperature, top_p in ((1.0, 0.9), (0.7, 1.0), (0.0, 0.5), (1e-30, 0.9), (2.0, 0.01), (1.5, 0.99)):
        probs, token = _run(logits.to(DEVICE), temperature, top_p, work)
        for row in range(3):
            expected, _ = distribution(logits[row].numpy(), temperature, top_p)
            found = probs[row].numpy()
            # exp is rounded differently: a token on the border may fall on its other side.
            assert ((found > 0) != (expected > 0)).sum() <= 2
            assert np.abs(found - expected).sum() < 2e-5
            sums = found.astype(np.float64).cumsum()
            at, drawn = sums[-1] * random_fraction(SEED, 7, 3 + row) / 2**64, int(token[row])
            assert found[drawn] > 0
            assert sums[drawn] - found[drawn] - 1e-5 <= at <= sums[drawn] + 1e-5


@pytest.mark.gpu
def test_equal_tokens_on_the_border_and_exact_draws() -> None:
    # Weights of 0 and 1 are exact on every device.
    chosen = torch.rand(2, 10240, generator=torch.Generator().manual_seed(0)) < 0.8
    logits = torch.where(chosen, 0.0, -torch.inf)
    work = cuda.workspace(2, 10240, DEVICE)
    for top_p in (0.001, 0.5, 0.77, 1.0):
        probs, token = _run(logits.to(DEVICE), 1.0, top_p, work)
        for row in range(2):
            expected, weights = distribution(logits[row].numpy(), 1.0, top_p)
            assert np.array_equal(probs[row].numpy(), expected)
            assert int(token[row]) == draw(weights, random_fraction(SEED, 7, 3 + row))


@pytest.mark.gpu
def test_a_row_does_not_depend_on_the_others() -> None:
    logits = torch.randn(5, 102400, generator=torch.Generator().manual_seed(1)).to(DEVICE) * 2
    work = cuda.workspace(5, 102400, DEVICE)
    probs, token = _run(logits, 0.8, 0.95, work)
    for row in range(5):
        alone, one = _run(logits[row : row + 1], 0.8, 0.95, work, which=3 + row)
        assert torch.equal(alone[0], probs[row])
        assert one[0] == token[row]


@pytest.mark.gpu
def test_replays_read_the_state() -> None:
    logits = torch.randn(1, 102400, generator=torch.Generator().manual_seed(2)).to(DEVICE) * 2
    work = cuda.workspace(1, 102400)
    settings = [Start(0, 0, 1, 9, seed=SEED, temperature=t, top_p=p).state() for t, p in ((0.5, 0.9), (1.0, 1.0))]
    state, candidates = settings[0].cuda(), _candidates(logits)
    probs = torch.empty_like(logits)
    cuda.probabilities(logits, candidates, state, probs, work, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.probabilities(logits, candidates, state, probs, work, 1)
    for setting in (*settings, *settings):
        state.copy_(setting)
        expected = torch.empty_like(logits)
        cuda.probabilities(logits, candidates, state, expected, work, 1)
        probs.fill_(torch.nan)
        graph.replay()
        assert torch.equal(probs, expected)
