"""A decode step whose launches overlap does what it does one launch after the other, to the last bit."""

import dataclasses
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor

from trtvlm.model.cache import KVCache
from trtvlm.model.sizes import language_size
from trtvlm.plugins.cuda import occupancy
from trtvlm.plugins.cuda.emulation.emulator import Schedule, compiler, emulated
from trtvlm.plugins.cuda.occupancy import Device, Multiprocessor
from trtvlm.plugins.cuda.turns import Turns
from trtvlm.plugins.random_checkpoint import RandomCheckpoint
from trtvlm.runtime.cuda import decode
from trtvlm.runtime.cuda.decode import DecodeProgram
from trtvlm.runtime.cuda.weights import LanguageWeights, load_weights

MODELS = ("nano", "nano-draft")


def state(program: DecodeProgram, rows: int) -> list[Tensor]:
    """All that a step writes."""
    written = [program.residual[:rows], program.square_sums[:rows], program.logits[:rows]]
    written += [found[:rows] for found in program.found]
    return [*written, *(tensor for layer in program.cache.layers for tensor in layer.tensors())]


def programs(weights: LanguageWeights, positions: int, rows: int) -> list[DecodeProgram]:
    """Two over the same weights, each with a cache of its own; the first one's launches overlap."""
    device = weights.embedding.device
    return [
        DecodeProgram(weights, KVCache(weights.config, 1, positions, torch.half, device), rows, overlap=overlap)
        for overlap in (True, False)
    ]


class OneAfterTheOther:
    """Queues of the emulator, which runs every launch to its end."""

    def begin(self) -> None:
        pass

    def into(self, queue: int) -> AbstractContextManager[object]:
        return nullcontext()

    def mark(self, queue: int) -> None:
        pass

    def follow(self, queue: int, mark: None) -> None:
        pass


@pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++ compiler")
@pytest.mark.parametrize("model", MODELS)
def test_a_step_on_the_emulator(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "OVERLAPPING_ROWS", 3)
    config = dataclasses.replace(language_size(model), num_hidden_layers=2)
    weights = load_weights(RandomCheckpoint(config, device="cpu"), "cpu")
    overlapping, plain = programs(weights, 64, 4)
    # An H200, as far as threads and dynamic shared memory go.
    turns = Turns(17, "cpu", OneAfterTheOther(), Device(132, Multiprocessor(65536, 2048, 228 * 1024, 32)))
    overlapping._turns = turns
    generator = torch.Generator().manual_seed(0)
    with emulated(Schedule("shuffled")):
        for start, rows in ((0, 3), (3, 4), (7, 1)):
            tokens = torch.randint(config.vocab_size, (rows,), generator=generator, dtype=torch.int32)
            cursor = torch.tensor([start], dtype=torch.int32)
            plain.launch(tokens.clone(), cursor, rows, 64, logits=True)
            turns.counters.fill_(7)  # the embedding's launch has to zero them
            turns.taken = turns.overlapped = 0
            overlapping.launch(tokens, cursor, rows, 64, logits=True)
            if rows > decode.OVERLAPPING_ROWS:
                assert turns.taken == 0
            else:
                assert turns.overlapped > turns.taken / 2
            for found, expected in zip(state(overlapping, rows), state(plain, rows), strict=True):
                assert torch.equal(found, expected)


# Few multiprocessors have no room for some of the launches, so that those follow each other.
@pytest.mark.gpu
@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 16])
@pytest.mark.parametrize("model", MODELS)
def test_a_captured_step(model: str, rows: int, few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "OVERLAPPING_ROWS", 16)
    weights = load_weights(RandomCheckpoint(language_size(model)))
    vocab, positions = weights.config.vocab_size, 256
    both = programs(weights, positions, rows)
    turns, none = (program._turns for program in both)
    assert none is None
    assert turns is not None
    if few:
        room = dataclasses.replace(occupancy.device(torch.cuda.current_device()), count=3 if rows == 1 else 6)
        turns = both[0]._turns = Turns(len(turns.counters), "cuda", room=room)
    tokens = torch.zeros(rows, dtype=torch.int32, device="cuda")
    cursor = torch.zeros(1, dtype=torch.int32, device="cuda")
    graphs = []
    for program in both:
        program.launch(
            tokens, cursor, rows, positions, logits=True
        )  # compiles and loads, and takes turns as the graph will
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            program.launch(tokens, cursor, rows, positions, logits=True)
        graphs.append(graph)
    for found, expected in zip(state(both[0], rows), state(both[1], rows), strict=True):
        assert torch.equal(found, expected), "before capture"
    counts = f"{turns.overlapped} of {turns.taken} overlap"
    if few:
        assert 0 < turns.overlapped < turns.taken - 1, counts
    else:
        assert turns.overlapped > turns.taken / 2, counts
    generator = torch.Generator("cuda").manual_seed(0)
    for step in range(50):
        tokens.copy_(torch.randint(vocab, (rows,), generator=generator, device="cuda"))
        cursor.fill_(3 * step)
        for graph in graphs:
            graph.replay()
        torch.cuda.synchronize()
        for found, expected in zip(state(both[0], rows), state(both[1], rows), strict=True):
            assert torch.equal(found, expected), f"step {step}"
