"""The executor of compiled graphs, with onnxruntime in TensorRT's place: the same wiring, on a CPU."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

from tests.graphs import CONTEXT
from trtvlm.builder.build import BuildSettings, build
from trtvlm.builder.cut import cut_config
from trtvlm.model.artifacts import EngineDir
from trtvlm.model.chain import Chain, EngineStep, OperatorStep
from trtvlm.model.errors import UserError
from trtvlm.model.pages.samples import load_samples
from trtvlm.model.sizes import SIZES, language_size
from trtvlm.plugins.quantized_checkpoint import load_quantized
from trtvlm.runtime.engine import open_engine
from trtvlm.runtime.executor import MAX_DECODE_WIDTH, Executor
from trtvlm.runtime.request import Request, question
from trtvlm.runtime.session import Session
from trtvlm.runtime.tensorrt import usable
from trtvlm.runtime.tensorrt.buffers import lifetimes, plan_buffers
from trtvlm.runtime.tensorrt.executor import ChainExecutor
from trtvlm.runtime.tensorrt.installed import tensorrt
from trtvlm.runtime.tensorrt.onnx_segment import OnnxBackend
from trtvlm.runtime.tensorrt.segment import Graph, Segment
from trtvlm.runtime.torch_executor import TorchExecutor
from trtvlm.scripts.commands.generate import command


@pytest.fixture
def directory(graphs: EngineDir) -> EngineDir:
    return graphs


def executor(directory: EngineDir) -> ChainExecutor:
    return ChainExecutor(directory, OnnxBackend(), CONTEXT)


def ask(draft_tokens: int = 4, max_new_tokens: int = 40) -> Request:
    page = Image.linear_gradient("L").resize((90, 50))
    return Request(question([page]), max_new_tokens, draft_tokens=draft_tokens)


@pytest.mark.parametrize("draft_tokens", [0, 3, 7])
def test_the_tokens_are_the_torch_executors(directory: EngineDir, draft_tokens: int) -> None:
    mine = Session(open_engine(directory.path, executor="onnxruntime")).answer(ask(draft_tokens))
    theirs = Session(open_engine(directory.path, executor="torch")).answer(ask(draft_tokens))
    assert mine.token_ids == theirs.token_ids
    assert len(set(mine.token_ids)) > 10
    assert (mine.drafted, mine.accepted) == (theirs.drafted, theirs.accepted)
    assert (mine.drafted > 0) == (draft_tokens > 0)


@pytest.mark.parametrize("part", ["target", "draft"])
def test_logits_are_the_models(directory: EngineDir, part: str) -> None:
    engine = directory if part == "target" else directory.draft
    assert engine is not None
    # The model as it is: the layers a CPU decodes with round their weights.
    mine, theirs = executor(engine), TorchExecutor(load_quantized(engine.path), CONTEXT)
    tokens = torch.randint(0, 500, (270,), generator=torch.Generator().manual_seed(5))
    for runner in (mine, theirs):
        assert runner.embed(tokens).shape == (270, 64)
    # Longer than one pass; then steps of several widths with a rollback into the last but one.
    for found, expected in zip(_passes(mine, tokens), _passes(theirs, tokens), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def _passes(runner: Executor, tokens: Tensor) -> list[Tensor]:
    out = [runner.prefill(runner.embed(tokens))]
    for width in (1, 8, 3):
        out.append(runner.decode(list(range(width))))
    assert runner.length == 282
    runner.rollback(275)
    assert runner.length == 275
    return [*out, runner.decode([7, 8])]


def test_images_are_the_torch_executors(directory: EngineDir) -> None:
    mine, theirs = executor(directory), open_engine(directory.path)
    (image,) = theirs.processor(ask().conversation).images
    expected = theirs.target.encode_image(image)
    assert len(image.pixels) > 2
    torch.testing.assert_close(mine.encode_image(image), expected, rtol=1e-4, atol=1e-4)


def test_a_row_does_not_depend_on_what_is_decoded_with_it(directory: EngineDir) -> None:
    runner = executor(directory)
    runner.prefill(runner.embed(torch.arange(40)))
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    together = runner.decode(tokens)
    for width in (1, 5):
        runner.rollback(40)
        parts = [runner.decode(tokens[at : at + width]) for at in range(0, 8, width)]
        assert torch.equal(torch.cat(parts), together)


def test_more_tokens_than_the_engines_decode_at_once_are_cut(directory: EngineDir, tmp_path: Path) -> None:
    expected = executor(directory)
    narrow = EngineDir(tmp_path / "narrow")
    shutil.copytree(directory.path, narrow.path)
    file = narrow.language / "chain.json"
    raw = json.loads(file.read_text())
    raw["profiles"]["decode"] = [1, 2, 3]
    file.write_text(json.dumps(raw))
    found = executor(narrow)
    assert found.program.width == 3
    for width in (0, MAX_DECODE_WIDTH + 1):
        with pytest.raises(ValueError, match="1 to 8"):
            found.decode(range(width))
    torch.testing.assert_close(found.decode(range(8)), expected.decode(range(8)))
    assert found.length == 8


class Recorder(OnnxBackend):
    """Notes where buffers are, and what is run."""

    def __init__(self) -> None:
        self.graphs: list[Graph] = []
        self.runs: list[tuple[str, int, int, bool]] = []

    def open(self, graphs: Sequence[Graph]) -> list[Segment]:
        self.graphs += graphs
        recorder = self

        class Noting:
            def __init__(self, segment: Segment, name: str) -> None:
                self.segment, self.name = segment, name

            def run(self, rows: int, first: int = 0, decode: bool = False) -> None:
                recorder.runs.append((self.name, rows, first, decode))
                self.segment.run(rows, first, decode)

        return [Noting(segment, graph.name) for segment, graph in zip(super().open(graphs), graphs, strict=True)]


def test_segments_run_in_order_on_buffers_that_stay(directory: EngineDir) -> None:
    backend = Recorder()
    runner = ChainExecutor(directory, backend, CONTEXT)
    names = [graph.name for graph in backend.graphs]
    assert names[-1] == "vision"
    addresses = [{k: v.data_ptr() for k, v in (g.inputs | g.outputs).items()} for g in backend.graphs]  # type: ignore[operator]
    runner.prefill(torch.randn(20, 64))
    # A prompt's embeddings come from outside; the head runs on the last row alone.
    assert backend.runs == [(name, 20, 0, False) for name in names[1:-2]] + [(names[-2], 1, 19, False)]
    backend.runs.clear()
    runner.decode([1, 2])
    assert backend.runs == [(name, 8, 0, True) for name in names[:-1]]
    assert addresses == [{k: v.data_ptr() for k, v in (g.inputs | g.outputs).items()} for g in backend.graphs]  # type: ignore[operator]


@pytest.mark.parametrize("model", [*SIZES, "nano", "nano-draft"])
def test_tensors_needed_at_the_same_time_share_no_buffer(model: str) -> None:
    config = language_size(model)
    chain, _ = cut_config(config, "int4", max_rows=4096, max_width=8)
    layout, lives = plan_buffers(chain, 256, 8), lifetimes(chain)
    assert set(layout.places) == set(chain.tensors)
    for name, (start, end) in lives.items():
        for other, (begin, last) in lives.items():
            if name < other and layout.places[name] == layout.places[other]:
                assert end < begin or last < start, (name, other)
    for step in chain.steps:
        read, written = ({layout.places[name] for name in part.values()} for part in (step.inputs, step.outputs))
        assert not read & written
    # However many layers there are.
    assert len(layout.kinds) < 12
    assert layout.kinds[layout.places["logits"]].shape == (8, config.vocab_size)


def test_operators_find_their_weights(directory: EngineDir, tmp_path: Path) -> None:
    chain = Chain.from_json((directory.language / "chain.json").read_text())
    kinds = [step.operator for step in chain.steps if isinstance(step, OperatorStep)]
    assert kinds == ["mla_attention", "mla_attention", "int4_moe", "mla_attention", "int4_moe"]
    steps = tuple(
        dataclasses.replace(step, operator="magic") if isinstance(step, OperatorStep) else step for step in chain.steps
    )
    broken = EngineDir(tmp_path / "magic")
    shutil.copytree(directory.path, broken.path)
    (broken.language / "chain.json").write_text(dataclasses.replace(chain, steps=steps).to_json())
    with pytest.raises(UserError, match="an operator 'magic' that this trtvlm does not know"):
        executor(broken)


def test_what_is_missing_is_named(directory: EngineDir, tmp_path: Path) -> None:
    engine = EngineDir(tmp_path / "engine")
    shutil.copytree(directory.path, engine.path)
    chain = Chain.from_json((engine.language / "chain.json").read_text())
    last = [step for step in chain.steps if isinstance(step, EngineStep)][-1]
    path = engine.language / f"{last.name}.onnx"
    (engine.language / "00_embed.onnx").replace(path)
    with pytest.raises(UserError, match=r"00_embed\.onnx: build the engine directory again, with its engines"):
        executor(engine)
    shutil.copy(path, engine.language / "00_embed.onnx")
    with pytest.raises(UserError, match=rf"{last.name}\.onnx makes \['hidden'\], but chain.json takes \['logits'\]"):
        executor(engine)
    (engine.language / "chain.json").write_text("{}")
    with pytest.raises(UserError, match=r"chain\.json cannot be read"):
        executor(engine)
    shutil.rmtree(engine.language)
    with pytest.raises(UserError, match="has no compiled engines"):
        executor(engine)


@dataclasses.dataclass
class Gpu:
    """A CUDA device as the checks see it."""

    capability: tuple[int, int] = (8, 6)
    free: int = 24 * 10**9

    def install(self, monkeypatch: pytest.MonkeyPatch, version: str | None = "1.2.3") -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: self.capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self.free, 24 * 10**9))

        class Module:
            __version__ = version

        def find(flavour: str) -> type[Module]:
            if version is None:
                raise UserError("The engines need it.")
            return Module

        monkeypatch.setattr(usable, "tensorrt", find)


@pytest.fixture
def compiled(directory: EngineDir, tmp_path: Path) -> EngineDir:
    """The directory with a megabyte in the place of every engine."""
    engine = EngineDir(tmp_path / "compiled")
    shutil.copytree(directory.path, engine.path)
    for path in engine.path.rglob("*.onnx"):
        path.with_suffix(".engine").write_bytes(bytes(10**6))
    return engine


def test_engines_that_fit_are_usable(compiled: EngineDir, monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu().install(monkeypatch)
    usable.check_usable(compiled, "cuda")
    engines = len(list(compiled.language.glob("*.engine"))) + 1
    weights = sum(path.stat().st_size for path in compiled.path.glob("rank0.safetensors"))
    assert engines * 10**6 < usable.needed_bytes(compiled) < engines * 10**6 + weights + 2 * 10**6


@pytest.mark.parametrize(
    ("gpu", "version", "device", "sentence"),
    [
        (
            Gpu(capability=(9, 0)),
            "1.2.3",
            "cuda",
            r"for compute capability 8\.6, but cuda \(a GPU\) has 9\.0: build .*--sm 90",
        ),
        (Gpu(), "1.2.4", "cuda", r"built with tensorrt-rtx 1\.2\.3, but 1\.2\.4 is installed"),
        (Gpu(free=10**9), "1.2.3", "cuda", r"needs about 1\.1 GB of GPU memory, but cuda has 1\.0 GB free"),
        (Gpu(), "1.2.3", "cpu", "TensorRT runs on a GPU, not on 'cpu'"),
        (Gpu(), None, "cuda", "The engines need it"),
    ],
)
def test_engines_that_do_not_fit_are_refused_in_a_sentence(
    compiled: EngineDir, monkeypatch: pytest.MonkeyPatch, gpu: Gpu, version: str | None, device: str, sentence: str
) -> None:
    gpu.install(monkeypatch, version)
    with pytest.raises(UserError, match=sentence):
        usable.check_usable(compiled, device)


def test_torch_takes_the_place_of_engines_that_cannot_run(directory: EngineDir) -> None:
    said: list[str] = []
    opened = open_engine(directory.path, executor="tensorrt", warn=said.append)
    assert len(said) == 1
    assert said[0].endswith("Running it with --executor torch instead.")
    assert not isinstance(opened.target, ChainExecutor)


def test_a_flavour_that_is_not_installed() -> None:
    with pytest.raises(UserError, match="no TensorRT flavour 'magic'"):
        tensorrt("magic")
    assert hasattr(tensorrt("tensorrt-rtx"), "Builder")


def test_the_command_chooses_the_executor(directory: EngineDir, tmp_path: Path) -> None:
    Image.linear_gradient("L").resize((60, 50)).save(tmp_path / "page.png")
    arguments = [
        "--engine",
        str(directory.path),
        "--image",
        str(tmp_path / "page.png"),
        "--json",
        "--max-new-tokens",
        "9",
    ]
    records = {}
    for name in ("torch", "onnxruntime", "tensorrt"):
        result = CliRunner().invoke(command, [*arguments, "--executor", name], catch_exceptions=False)
        records[name] = json.loads(result.stdout)["token_ids"]
        assert ("Warning: " in result.stderr) == (name == "tensorrt")
    assert records["torch"] == records["onnxruntime"] == records["tensorrt"]
    refused = CliRunner().invoke(command, ["--model", "nano", "--image", "a.png", "--executor", "tensorrt"])
    assert "--executor tensorrt goes with --engine" in refused.output


@pytest.mark.slow
def test_nano_reads_pages_alike_in_float16(tmp_path: Path) -> None:
    build("nano", tmp_path / "engine", BuildSettings(verify_samples=0), "nano-draft")
    mine, theirs = (Session(open_engine(tmp_path / "engine", executor=name)) for name in ("onnxruntime", "torch"))
    for page in load_samples("heldout")[:6]:
        for draft_tokens in (0, 4):
            request = Request(question([page.image]), 200, draft_tokens=draft_tokens)
            found, expected = mine.answer(request), theirs.answer(request)
            assert found.token_ids == expected.token_ids
            assert (found.drafted, found.accepted) == (expected.drafted, expected.accepted)
