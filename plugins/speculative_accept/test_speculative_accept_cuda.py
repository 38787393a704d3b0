"""The kernels of a step's end compile everywhere, agree with state.py, and move the state as the reference does."""

import re

import pytest
import torch

from trtvlm.plugins.cuda.compiler import ARCHITECTURES, PLUGINS, SHARED_LIMIT, compile_source
from trtvlm.plugins.embedding import reference as embedding
from trtvlm.plugins.speculative_accept import cuda
from trtvlm.plugins.speculative_accept import state as layout
from trtvlm.plugins.speculative_accept.reference import greedy_step, sampled_step
from trtvlm.plugins.speculative_accept.state import DONE, INPUTS, MAX_DRAFTED, Start

DEVICE = "cuda"
VOCABULARIES = (1024, 102400, 129280)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles(arch: str) -> None:
    source = (PLUGINS / cuda.KERNEL).read_text()
    for vocab in (None, *VOCABULARIES):
        _, kernels = compile_source(source, {} if vocab is None else {"VOCAB": vocab}, arch)
        assert ("accept_sampled" in kernels) == (vocab is not None)
        for usage in kernels.values():
            assert usage.spilled == 0
            assert usage.registers <= 64
            assert usage.shared <= SHARED_LIMIT


def test_the_kernels_layout_is_the_states() -> None:
    text = (PLUGINS / "speculative_accept/state.cuh").read_text()
    named = re.findall(r"\b([A-Z_]{4,}) = (\d+)\b", text)
    named += re.findall(r"\b(EOS) = (\d+)\b", text)
    assert len(named) > 20
    for name, value in named:
        assert getattr(layout, name) == int(value), name


def test_refuses_what_it_cannot_do() -> None:
    ring = layout.new_ring(4, pinned=False)
    with pytest.raises(ValueError, match="16"):
        cuda.accept_greedy(ring, ring, 16, ring)
    with pytest.raises(ValueError, match="choices"):
        cuda.accept_greedy(ring, ring, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 5, 16])
def test_choose(rows: int) -> None:
    values = torch.randn(rows, 2020).round(decimals=1)
    tokens = torch.stack([torch.randperm(4000, dtype=torch.int32)[:2020] for _ in range(rows)])
    out = torch.full((rows,), -1, dtype=torch.int32, device=DEVICE)
    cuda.choose((values.to(DEVICE), tokens.to(DEVICE)), out, rows)
    assert torch.equal(out.cpu(), embedding.choose(values, tokens))


@pytest.mark.gpu
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("k", [0, 1, 4, 7, MAX_DRAFTED])
def test_greedy_steps_move_the_state_as_the_reference(k: int, given: bool) -> None:
    generator = torch.Generator().manual_seed(k)
    for eos in (-1, 2):
        start = Start(5, 6, 40, 60, eos=eos).state()
        mine, expected = start.to(DEVICE), start.clone().numpy()
        ring, expected_ring = layout.new_ring(20, pinned=DEVICE == "cuda"), layout.new_ring(20, pinned=False).numpy()
        for step in range(80):
            if expected[DONE] and step % 5 == 0:
                break
            drafted = torch.randint(0, 3, (k,), generator=generator, dtype=torch.int32)
            layout.target_inputs(mine, k)[1:] = drafted.to(DEVICE)
            expected[INPUTS + 2 : INPUTS + 2 + k] = drafted.numpy()
            values = torch.randn(k + 1, 130, generator=generator)
            tokens = torch.randint(0, 3, (k + 1, 130), generator=generator, dtype=torch.int32)
            choices = embedding.choose(values, tokens)
            if given:
                cuda.accept_greedy(mine, ring, k, choices.to(DEVICE))
            else:
                out = torch.full_like(choices, -1).to(DEVICE)
                cuda.accept_greedy(mine, ring, k, out, (values.to(DEVICE), tokens.to(DEVICE)))
                assert torch.equal(out.cpu(), choices)
            greedy_step(expected, expected_ring, choices.tolist())
            assert mine.cpu().tolist() == expected.tolist()
            assert ring.tolist() == expected_ring.tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("k", [0, 1, 4])
def test_sampled_steps_move_the_state_as_the_reference(k: int, vocab: int) -> None:
    generator = torch.Generator().manual_seed(k)
    start = Start(5, 6, 40, 12, seed=2**63 + 9).state()
    mine, expected = start.to(DEVICE), start.clone().numpy()
    ring, expected_ring = layout.new_ring(20, pinned=DEVICE == "cuda"), layout.new_ring(20, pinned=False).numpy()
    work = cuda.workspace(vocab, DEVICE)
    for step in range(14):
        p = (torch.randn(k + 1, vocab, generator=generator) * 3).softmax(-1)
        q = (p[:k].log() + torch.randn(k, vocab, generator=generator) * 0.5).softmax(-1)
        if step % 3 == 1:  # nothing left of p - q: certainties that differ, and equals
            q = p[:k].clone()
            p[0] = torch.nn.functional.one_hot(torch.tensor(vocab - 1), vocab).float()
        drafted = torch.stack([torch.multinomial(row, 1, generator=generator)[0] for row in q]) if k else torch.empty(0)
        layout.target_inputs(mine, k)[1:] = drafted.int().to(DEVICE)
        expected[INPUTS + 2 : INPUTS + 2 + k] = drafted.numpy()
        cuda.accept_sampled(mine, ring, k, q.to(DEVICE), p.to(DEVICE), work)
        sampled_step(expected, expected_ring, q.numpy(), p.numpy())
        # Bit for bit: products in float64 and sums of integers are the same everywhere.
        assert mine.cpu().tolist() == expected.tolist()
        assert ring.tolist() == expected_ring.tolist()
    assert expected[DONE]


@pytest.mark.gpu
def test_replays_go_on_and_stop_by_themselves() -> None:
    ring = layout.new_ring(64)
    state = Start(5, 6, 40, 11, eos=1).state().cuda()
    choices = torch.zeros(4, dtype=torch.int32, device="cuda")
    cuda.accept_greedy(state, ring, 3, choices)
    state.copy_(Start(5, 6, 40, 11, eos=1).state())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.accept_greedy(state, ring, 3, choices)
    for _ in range(5):
        graph.replay()  # drafted tokens are 0, as are the target's: all accepted
    torch.cuda.synchronize()
    assert ring[layout.RING_COUNT] == 11
    assert ring[layout.RING_STEPS] == 3
    assert layout.target_cursor(state).tolist() == [51]
