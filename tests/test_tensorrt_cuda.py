"""The executor of compiled graphs on a GPU without TensorRT: PyTorch in the place of each engine, the kernels between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trtvlm.builder.build import BuildSettings, build
from trtvlm.builder.cut import cut_config
from trtvlm.builder.export import VisionEncoder
from trtvlm.builder.layers import PackedLayers
from trtvlm.builder.trtllm_config import BuildConfig
from trtvlm.model.artifacts import EngineDir
from trtvlm.model.pages.samples import load_samples
from trtvlm.model.processor import Processor
from trtvlm.plugins.quantized_checkpoint import QuantizedReader, load_quantized, load_vision
from trtvlm.runtime.engine import Engine
from trtvlm.runtime.executor import Executor
from trtvlm.runtime.request import Request, question
from trtvlm.runtime.session import Session
from trtvlm.runtime.tensorrt.executor import ChainExecutor
from trtvlm.runtime.tensorrt.segment import Graph, Segment
from trtvlm.runtime.torch_executor import TorchExecutor

CONTEXT = 1024


@dataclass
class ModuleSegment:
    """A segment's module where its engine would be: on the device, on torch's current stream, capturable."""

    graph: Graph
    module: nn.Module

    def run(self, rows: int, first: int = 0, decode: bool = False) -> None:
        graph = self.graph
        found: Any = self.module(*(graph.view(name, rows, first, decode) for name in graph.inputs))
        found = found if isinstance(found, tuple) else (found,)
        for buffer, value in zip(graph.outputs.values(), found, strict=True):
            buffer[:rows].copy_(value)


class ModuleBackend:
    def __init__(self, engine: EngineDir) -> None:
        self.device = torch.device("cuda")
        self.engine = engine
        reader = QuantizedReader(engine)
        _, self.recipes = cut_config(reader.config, reader.kind, reader.layout, max_rows=CONTEXT, max_width=8)
        self.layers = PackedLayers(reader)

    def open(self, graphs: Sequence[Graph]) -> list[Segment]:
        return [ModuleSegment(graph, self._module(graph.name).eval().cuda()) for graph in graphs]

    def _module(self, name: str) -> nn.Module:
        if name == "vision":
            return VisionEncoder(load_vision(self.engine))
        return self.recipes[name].module(self.layers)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> EngineDir:
    """The bundled pair, with chain.json and without engines."""
    folder = tmp_path_factory.mktemp("nano") / "engine"
    limits = BuildConfig(max_seq_len=CONTEXT)
    settings = BuildSettings(build=limits, compile=False, calibration_samples=4, awq="lite", verify_samples=0)
    build("nano", folder, settings, "nano-draft")
    target = EngineDir(folder)
    for part in (target, target.draft):
        assert part is not None
        reader = QuantizedReader(part)
        chain, _ = cut_config(reader.config, reader.kind, reader.layout, max_rows=CONTEXT, max_width=8)
        part.language.mkdir()
        (part.language / "chain.json").write_text(chain.to_json())
    return target


def executors(engine: EngineDir, part: str) -> tuple[ChainExecutor, EngineDir]:
    folder = engine if part == "target" else engine.draft
    assert folder is not None
    return ChainExecutor(folder, ModuleBackend(folder), CONTEXT), folder


@pytest.mark.gpu
@pytest.mark.parametrize("part", ["target", "draft"])
def test_logits_are_the_models(engine: EngineDir, part: str) -> None:
    mine, folder = executors(engine, part)
    theirs = TorchExecutor(load_quantized(folder.path), CONTEXT)
    tokens = torch.randint(3, 1000, (300,), generator=torch.Generator().manual_seed(1))

    def passes(runner: Executor) -> list[Tensor]:
        out = [runner.prefill(runner.embed(tokens))]
        for width in (1, 8, 3, 1):
            out.append(runner.decode(list(range(40, 40 + width))))
        runner.rollback(305)
        return [*out, runner.decode([50, 51])]

    for found, expected in zip(passes(mine), passes(theirs), strict=True):
        error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
        # A rounding may swap two nearly equal experts of a row; wiring or a kernel gone wrong moves all of them.
        assert error.median() < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("part", ["target", "draft"])
def test_a_row_does_not_depend_on_what_is_decoded_with_it(engine: EngineDir, part: str) -> None:
    mine, _ = executors(engine, part)
    mine.prefill(mine.embed(torch.arange(10, 60)))
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    together = mine.decode(tokens)
    for width in (1, 3):
        mine.rollback(50)
        assert torch.equal(torch.cat([mine.decode(tokens[at : at + width]) for at in range(0, 8, width)]), together)


@pytest.mark.gpu
def test_speculation_changes_no_token(engine: EngineDir) -> None:
    (target, _), (draft, _) = (executors(engine, part) for part in ("target", "draft"))
    processor = Processor.from_pretrained(engine.path, engine.model_config())
    session = Session(Engine("chain", target, draft, processor, 0.0))
    # Pages whose prompt leaves room for an answer in the engine's context.
    pages = [page for page in load_samples("heldout") if len(processor(question([page.image])).input_ids) < 800]
    assert len(pages) >= 4
    accepted = 0
    for page in pages[:4]:
        plain, speculated = (
            session.answer(Request(question([page.image]), 120, draft_tokens=count)) for count in (0, 4)
        )
        assert plain.token_ids == speculated.token_ids
        accepted += speculated.accepted
    assert accepted > 0


def test_the_directory_above_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above do to one, without a GPU: a chain of modules on the CPU, the references between."""
    from tests.graphs import engine_directory

    engine = engine_directory(tmp_path / "engine", "mha", 64, graphs=False)
    monkeypatch.setattr(nn.Module, "cuda", lambda self: self)
    backend = ModuleBackend(engine)
    backend.device = torch.device("cpu")
    mine, theirs = ChainExecutor(engine, backend, 64), TorchExecutor(load_quantized(engine.path), 64)
    tokens = torch.arange(20)
    for found, expected in (
        (mine.prefill(mine.embed(tokens)), theirs.prefill(theirs.embed(tokens))),
        (mine.decode([1, 2, 3]).flatten(), theirs.decode([1, 2, 3]).flatten()),
    ):
        assert (found - expected).norm() / expected.norm() < 2e-2
