"""Building engines a graph at a time: what is exported once, kept between builds, and gone on with after a kill."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper
from safetensors.torch import load_file

from tests.tiny import tiny_checkpoint, tiny_config
from trtvlm.builder import engine_cache, engines
from trtvlm.builder.aside import Aside
from trtvlm.builder.build import BuildSettings, build
from trtvlm.builder.check_onnx import check_graph
from trtvlm.builder.compile import Range, compile_onnx, read_header
from trtvlm.builder.cut import cut_config
from trtvlm.builder.engine_cache import EngineCache
from trtvlm.builder.engines import build_engines, inputs
from trtvlm.builder.export import ROWS, export_onnx
from trtvlm.builder.finished_graphs import FinishedGraphs
from trtvlm.builder.layers import PackedLayers
from trtvlm.builder.planner.files import file_bytes
from trtvlm.builder.reuse import SegmentExporter
from trtvlm.builder.trtllm_config import BuildConfig
from trtvlm.model.artifacts import EngineDir, digests
from trtvlm.model.chain import Chain, EngineStep, OperatorStep
from trtvlm.model.errors import UserError
from trtvlm.plugins.quantized_checkpoint import QuantizedReader
from trtvlm.plugins.random_checkpoint import RandomCheckpoint

ROOT = Path(__file__).parent.parent
WIDTHS = {"rows": Range(1, 5, 8)}


# A whole directory


def test_a_directory_gets_its_engines(built: Built) -> None:
    directory, records = built.directory, built.records
    chain = Chain.from_json((directory.language / "chain.json").read_text(encoding="utf-8"))
    assert chain.profiles == {"decode": (1, 5, 5), "prefill": (1, 64, 128)}
    steps = [step.name for step in chain.engines()]
    assert [record["name"] for record in records] == ["vision", *steps, "chain"]
    assert len(built.said) == len(records)
    assert not list(directory.path.glob(".*"))
    for record in records[:-1]:
        folder = directory.vision if record["name"] == "vision" else directory.language
        engine = (folder / f"{record['name']}.engine").read_bytes()
        assert (len(engine), (folder / f"{record['name']}.onnx").stat().st_size) == (
            record["engine_bytes"],
            record["onnx_bytes"],
        )
        assert read_header(record["name"], engine).sms == (86,)
        assert record["part"] == "target"
        assert record["rel_l2"] < 2e-3
    assert records[-1]["agreement"] > 0.8

    stored = QuantizedReader(directory).layout
    layers = directory.model_config().language.num_hidden_layers
    operators = [step for step in chain.steps if isinstance(step, OperatorStep)]
    assert len(operators) == 2 * layers - 1
    for step in operators:
        assert set(step.weights.values()) <= set(stored)
        assert step.weights.keys() >= ({"kv_b_proj"} if "attention" in step.operator else {"fc.weight", "proj.weight"})
    assert isinstance(chain.steps[-1], EngineStep)
    assert chain.steps[-1].rows == "last"


# Layers of one kind


def test_a_layer_of_a_kind_exported_before_is_the_same_to_the_byte() -> None:
    config = dataclasses.replace(tiny_config("mla").language, num_hidden_layers=4)
    weights = RandomCheckpoint(config, device="cpu")
    layers, exporter = PackedLayers(weights), SegmentExporter()
    chain, recipes = cut_config(config, "int4", weights.layout, max_rows=64, max_width=8)
    steps = {step.name: step for step in chain.engines()}

    def graph(name: str, once: bool) -> bytes:
        module, example, names = recipes[name].module(layers), inputs(chain, steps[name], 2), list(steps[name].outputs)
        if once:
            kind = recipes[name].kind
            found = exporter.export(kind, name, module, example, names, dynamic=ROWS, largest=64)
        else:
            found = export_onnx(name, module, example, names, dynamic=ROWS, largest=64)
        content: bytes = found.SerializeToString(deterministic=True)
        return content

    first, second = "04_experts1_out_attention2_in", "06_experts2_out_attention3_in"
    filled = [graph(name, once=True) for name in (first, second)]
    assert (exporter.exported, exporter.filled) == (1, 1)
    assert filled[0] != filled[1] == graph(second, once=False)


def test_other_shapes_or_rows_are_exported_anew() -> None:
    config = tiny_config("mla").language
    exporter = SegmentExporter()
    for hidden, largest in ((64, 8), (64, 16), (128, 8)):
        other = dataclasses.replace(config, hidden_size=hidden)
        weights = RandomCheckpoint(other, "fp16", "fp16", device="cpu")
        chain, recipes = cut_config(other, "fp16", weights.layout, max_rows=64, max_width=8)
        step = next(chain.engines())
        module = recipes[step.name].module(PackedLayers(weights))
        example = inputs(chain, step, 2)
        exporter.export("embed", step.name, module, example, list(step.outputs), dynamic=ROWS, largest=largest)
    assert (exporter.exported, exporter.filled) == (3, 0)


# What the plan says of it


def test_the_plan_knows_the_bytes_of_weights_and_graphs(built: Built) -> None:
    directory = built.directory
    planned = file_bytes(directory.model_config(), "int8", "int8")
    for what, file in (("checkpoint", directory.weights), ("vision", directory.vision_weights)):
        assert planned[what] == sum(tensor.nbytes for tensor in load_file(file).values())
    graphs = [onnx.load(path) for path in sorted(directory.path.glob("*/*.onnx"))]
    # Lists of sizes are in graphs as well, and the vision part's biases and tables are there once for every use.
    held = sum(len(tensor.raw_data) for graph in graphs for tensor in graph.graph.initializer)
    assert planned["graphs"] == pytest.approx(held, rel=0.05)


# Engines kept between builds


def _graph(size: int = 64) -> bytes:
    """y = x + x over float16 [rows, size]."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["rows", size]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "sum", values[:1], values[1:])
    content: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11
    ).SerializeToString()
    return content


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of graphs that were really compiled."""
    names: list[str] = []
    real = compile_onnx

    def record(name: str, *arguments: Any, **options: Any) -> bytes:
        names.append(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(engine_cache, "compile_onnx", record)
    return names


def test_the_same_graph_is_compiled_once(tmp_path: Path, compiled: list[str]) -> None:
    cache = EngineCache(tmp_path / "cache")
    first = cache.compile("a", _graph(), [WIDTHS], sm=86)
    assert EngineCache(tmp_path / "cache").compile("b", _graph(), [WIDTHS], sm=86) == first
    assert compiled == ["a"]
    cache.compile("graph", _graph(128), [WIDTHS], sm=86)
    cache.compile("profile", _graph(), [{"rows": Range(1, 2, 8)}], sm=86)
    cache.compile("chip", _graph(), [WIDTHS], sm=89)
    assert compiled == ["a", "graph", "profile", "chip"]


def test_another_version_or_a_damaged_file_is_compiled_anew(
    tmp_path: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = EngineCache(tmp_path / "cache")
    engine = cache.compile("a", _graph(), [WIDTHS], sm=86)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(engine[:-1])
    assert cache.compile("b", _graph(), [WIDTHS], sm=86) == engine
    assert file.read_bytes() == engine
    monkeypatch.setattr(engine_cache, "tensorrt_version", lambda: "0.1")
    cache.compile("c", _graph(), [WIDTHS], sm=86)
    assert compiled == ["a", "b", "c"]
    assert cache.hits == 0


def test_what_was_longest_unused_goes_first(tmp_path: Path, compiled: list[str]) -> None:
    folder = tmp_path / "cache"
    size = len(EngineCache(folder).compile("a", _graph(), [WIDTHS], sm=86))
    (a,) = folder.iterdir()
    os.utime(a, (1, 1))
    EngineCache(folder).compile("b", _graph(128), [WIDTHS], sm=86)
    EngineCache(folder, limit=size * 5 // 2).compile("c", _graph(192), [WIDTHS], sm=86)
    assert not a.exists()
    assert len(list(folder.iterdir())) == 2
    EngineCache(folder, limit=size // 2).compile("too large to keep", _graph(256), [WIDTHS], sm=86)
    assert len(list(folder.iterdir())) == 2


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path, compiled: list[str]) -> None:
    (tmp_path / "file").write_text("")
    cache = EngineCache(tmp_path / "file" / "cache")
    assert cache.compile("a", _graph(), [WIDTHS], sm=86) == cache.compile("a", _graph(), [WIDTHS], sm=86)
    assert compiled == ["a", "a"]


# A build that was killed


def test_finished_graphs_of_another_build_are_forgotten(tmp_path: Path) -> None:
    finished = FinishedGraphs(tmp_path / "left", "one")
    finished.finish("a", b"graph", b"engine", {"name": "a"})
    assert FinishedGraphs(tmp_path / "left", "one").record("a") == {"name": "a"}
    assert FinishedGraphs(tmp_path / "left", "one").record("b") is None
    (tmp_path / "place").mkdir()
    finished.place("a", tmp_path / "place")
    assert FinishedGraphs(tmp_path / "left", "two").record("a") is None
    assert (tmp_path / "place" / "a.onnx").read_bytes() == b"graph"
    assert (tmp_path / "place" / "a.engine").read_bytes() == b"engine"


class _Killed(BaseException):
    pass


def test_a_build_goes_on_after_its_last_finished_graph(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when it says what the next graph is.

    The engines are those of the build before, out of the cache: TensorRT-RTX itself writes tensors in another order now
    and then.
    """
    monkeypatch.setenv("TRTVLM_CACHE", str(built.cache))
    # The vision part in a process of its own, as large ones are.
    monkeypatch.setattr(engines, "_ASIDE", 0)
    directory = EngineDir(tmp_path / "engine")
    shutil.copytree(built.quantized, directory.path)
    said: list[str] = []

    def kill(what: str) -> None:
        said.append(what)
        if len(said) == 5:
            raise _Killed

    left = tmp_path / "left"
    with pytest.raises(_Killed):
        build_engines(directory.path, sm=86, max_seq_len=128, max_width=5, progress=kill, unfinished=left)
    finished = {path.stem for path in (left / "target").glob("*.json")}
    assert len(finished - {"vision"}) == 3
    checked: list[str] = []

    def check(name: str, *arguments: Any) -> Any:
        checked.append(name)
        return check_graph(name, *arguments)

    monkeypatch.setattr(engines, "check_graph", check)
    records = build_engines(directory.path, sm=86, max_seq_len=128, max_width=5, unfinished=left)
    assert [record["name"] for record in records] == [record["name"] for record in built.records]
    assert finished.isdisjoint(checked)
    assert digests(directory.path) == digests(built.directory.path)


@pytest.mark.slow
def test_killed_at_random_with_engines(built: Built, tmp_path: Path) -> None:
    """Twenty times, wherever it is by then: a partial directory is never seen, and in the end every byte is there."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRTVLM_CACHE": str(tmp_path / "cache")}
    options = ("--quant", "int8_wo", "--max-seq-len", "128", "--max-draft-len", "4", "--verify-samples", "0")

    def start(output: Path) -> subprocess.Popen[bytes]:
        model = built.quantized.parent / "model"
        command = [sys.executable, "-m", "trtvlm.scripts.cli", "build", "--model", model, "--output", output, *options]
        return subprocess.Popen([*map(str, command)], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)

    def written(output: Path) -> dict[str, str]:
        return {name: digest for name, digest in digests(output).items() if name != "build_report.json"}

    began = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    took, expected, rng = time.monotonic() - began, written(tmp_path / "whole"), random.Random(0)
    output = tmp_path / "engine"
    for _ in range(20):
        process = start(output)
        try:
            process.wait(timeout=took * rng.uniform(0.3, 1.0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if output.exists():
            assert written(output) == expected
            shutil.rmtree(output)
    assert output.exists() or start(output).wait() == 0
    assert written(output) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "engine", "whole"]


@dataclass(frozen=True)
class Built:
    """An engine directory without engines, and the same one with them."""

    quantized: Path
    directory: EngineDir
    cache: Path
    records: list[dict[str, Any]]
    said: list[str]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("built")
    source = tiny_checkpoint(folder / "model", "mla")
    settings = BuildSettings(quant="int8_wo", build=BuildConfig(max_seq_len=128), verify_samples=0, compile=False)
    build(str(source), folder / "quantized", settings)
    shutil.copytree(folder / "quantized", folder / "engine")
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRTVLM_CACHE", str(folder / "cache"))
        records = build_engines(folder / "engine", sm=86, max_seq_len=128, max_width=5, progress=said.append)
    return Built(folder / "quantized", EngineDir(folder / "engine"), folder / "cache", records, said)


# Beside


def _add(a: int, b: int) -> int:
    return a + b


def _refuse() -> None:
    raise UserError("not this.")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_function_beside_gives_what_it_gives_here() -> None:
    with Aside(_add, 2, 3) as aside:
        assert aside.result() == 5
    with Aside(_refuse) as aside, pytest.raises(UserError, match=r"not this\."):
        aside.result()
    with Aside(_die) as aside, pytest.raises(UserError, match="ended without a word"):
        aside.result()
