"""The language model as one graph with plugin nodes: run by ONNX's reference, the plugins by theirs over their own inputs."""

import copy
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor

from tests.graphs import CONTEXT
from trtvlm.builder.plugin_graph import write_plugin_graph
from trtvlm.model.artifacts import EngineDir, write_json
from trtvlm.model.chain import CURSOR, WANTED, Chain, EngineStep, cache_positions
from trtvlm.model.errors import UserError
from trtvlm.plugins.cuda.tiles import _order
from trtvlm.plugins.gqa_attention.reference import gqa_attention
from trtvlm.plugins.gqa_attention.trt_plugin import GQAAttentionPlugin
from trtvlm.plugins.int4_linear import packing
from trtvlm.plugins.int4_moe.reference import Int4MLP, Routing
from trtvlm.plugins.int4_moe.reference import int4_moe as int4_moe_reference
from trtvlm.plugins.int4_moe.trt_plugin import Int4MoEPlugin
from trtvlm.plugins.mla_attention.reference import mla_attention as mla_reference
from trtvlm.plugins.mla_attention.trt_plugin import MLAAttentionPlugin
from trtvlm.plugins.quantized_checkpoint import QuantizedReader, load_quantized
from trtvlm.runtime.tensorrt.executor import ChainExecutor
from trtvlm.runtime.tensorrt.onnx_segment import OnnxBackend
from trtvlm.runtime.tensorrt.segment import Graph, Segment
from trtvlm.runtime.torch_executor import TorchExecutor

THETA = 10_000.0
POSITIONS = cache_positions(CONTEXT)


@pytest.fixture(params=["mla", "mha"])
def directory(request: pytest.FixtureRequest, graphs: EngineDir) -> EngineDir:
    draft = graphs.draft
    assert draft is not None
    return graphs if request.param == "mla" else draft


@pytest.fixture
def written(directory: EngineDir, tmp_path: Path) -> tuple[Chain, Path]:
    chain = Chain.from_json((directory.language / "chain.json").read_text())
    reader, path = QuantizedReader(directory), tmp_path / "rank0.onnx"
    write_plugin_graph(
        path, chain, reader.config, reader, POSITIONS, lambda step: onnx.load(directory.language / f"{step.name}.onnx")
    )
    return chain, path


def from_tiles(tiles: Tensor, outputs: int, inputs: int) -> Tensor:
    """Half tiles -> [..., outputs, inputs], in float32."""
    lead = tiles.shape[:-5]
    order = _order(torch.arange(outputs * inputs).view(outputs, inputs)).flatten()
    out = torch.zeros(*lead, outputs * inputs)
    out[..., order] = tiles.float().flatten(-5)
    return out.view(*lead, outputs, inputs)


def from_int4_tiles(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Tiles as `int4_tiles` makes them -> the checkpoint's packed codes and scales."""
    shifts = torch.tensor([[4 * r, 4 * r + 16] for r in range(4)], dtype=torch.int32)
    nibbles = (codes.unsqueeze(-1).unsqueeze(-1) >> shifts & 15).float() - 8  # [..., lane, step, register, half]
    outputs, inputs = 16 * codes.shape[-4], 64 * codes.shape[-3]
    whole = from_tiles(nibbles.transpose(-4, -3).flatten(-2), outputs, inputs)
    rows = scales.float().movedim(-1, -3).movedim(-1, -2)  # [..., tile, half, g, group]
    return packing.pack(whole.to(torch.int8)), rows.flatten(-4, -2)


def arrays(*tensors: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.numpy() for tensor in tensors)


def tensors(inputs: tuple[Any, ...]) -> list[Tensor]:
    return [torch.from_numpy(np.array(value)) for value in inputs]


class MlaAttention(OpRun):
    op_domain = "trtvlm"

    def _run(self, *inputs: Any, **numbers: Any) -> tuple[Any, ...]:
        heads, nope, rope, value, rank = (numbers[name] for name in ("heads", "nope", "rope", "value", "rank"))
        q, latent, k_pe, keys, values, cosines, _, *caches, cursor = tensors(inputs)
        assert cosines.shape == (numbers["positions"], rope // 2)
        key = from_tiles(keys, rank, keys.shape[2] * 64)[..., :nope].transpose(1, 2)
        kv_b = torch.cat((key, from_tiles(values, value, rank)), dim=1).flatten(0, 1)
        out = mla_reference(q, latent, k_pe, kv_b, caches[0], caches[1], cursor, heads, (nope + rope) ** -0.5, THETA)
        return arrays(out, *caches)


class GqaAttention(OpRun):
    op_domain = "trtvlm"

    def _run(self, *inputs: Any, **numbers: Any) -> tuple[Any, ...]:
        q, k, v, _, _, k_cache, v_cache, cursor = tensors(inputs)
        scale = numbers["width"] ** -0.5
        out = gqa_attention(q, k, v, k_cache, v_cache, cursor, numbers["heads"], scale, THETA)
        return arrays(out, k_cache, v_cache)


class Int4Moe(OpRun):
    op_domain = "trtvlm"

    def _run(self, *inputs: Any, **numbers: Any) -> tuple[Any, ...]:
        x, logits, *rest = tensors(inputs)
        bias = rest.pop() if numbers["biased"] else None
        parts = [(*from_int4_tiles(*rest[at : at + 2]), rest[at + 2].float()) for at in range(0, len(rest), 3)]
        pairs = [Int4MLP(fc[0], fc[1], down[0], down[1], fc[2], down[2]) for fc, down in zip(parts[::2], parts[1::2])]  # noqa: B905
        scoring = "sigmoid" if numbers["sigmoid"] else "softmax"
        routing = Routing(numbers["top_k"], scoring, bool(numbers["normalise"]), numbers["scaling"])
        return arrays(int4_moe_reference(x, logits, pairs[0], routing, pairs[1] if numbers["shared"] else None, bias))


for operator, name in ((MlaAttention, "mla_attention"), (GqaAttention, "gqa_attention"), (Int4Moe, "int4_moe")):
    operator.__name__ = name  # a node's type


class OneGraph:
    """The graph as an engine would be run: caches kept between calls."""

    def __init__(self, chain: Chain, path: Path) -> None:
        self.chain = chain
        self.session = ReferenceEvaluator(onnx.load(path), new_ops=[MlaAttention, GqaAttention, Int4Moe])
        self.caches = {
            name: np.zeros([POSITIONS if size == "max_seq_len" else size for size in spec.shape], np.float32)
            for name, _, spec in chain.caches()
        }

    def __call__(self, hidden: Tensor, start: int, wanted: list[int]) -> Tensor:
        feeds = {
            self.chain.hidden: hidden.numpy(),
            CURSOR: np.array([start], np.int32),
            WANTED: np.array(wanted, np.int32),
        }
        names = [self.chain.output, *(out for _, out, _ in self.chain.caches())]
        logits, *caches = self.session.run(names, feeds | self.caches)
        self.caches = dict(zip(self.caches, caches, strict=True))
        return torch.from_numpy(logits)


def test_its_logits_are_the_models(directory: EngineDir, written: tuple[Chain, Path]) -> None:
    mine, theirs = OneGraph(*written), TorchExecutor(load_quantized(directory.path), CONTEXT)
    embeds = theirs.embed(torch.randint(0, 500, (20,), generator=torch.Generator().manual_seed(3)))
    torch.testing.assert_close(mine(embeds, 0, [19])[0], theirs.prefill(embeds), rtol=1e-4, atol=1e-4)
    tokens = [4, 5, 6]
    found = mine(theirs.embed(torch.tensor(tokens)), 20, [0, 1, 2])
    torch.testing.assert_close(found, theirs.decode(tokens), rtol=1e-4, atol=1e-4)


class ReferenceBackend:
    """The graph's reference in the place of rank0.engine; vision is onnxruntime's."""

    device = torch.device("cpu")

    def __init__(self, one: OneGraph) -> None:
        self.one = one
        self.runs: list[tuple[int, int, bool]] = []

    def open(self, graphs: Sequence[Graph]) -> list[Segment]:
        (graph,) = graphs
        return [_Whole(graph, self)] if graph.name == "rank0" else OnnxBackend().open(graphs)


@dataclass
class _Whole:
    graph: Graph
    backend: ReferenceBackend

    def run(self, rows: int, first: int = 0, decode: bool = False) -> None:
        graph = self.graph
        self.backend.runs.append((rows, first, decode))
        feeds = {name: graph.view(name, rows, first, decode).numpy() for name in graph.inputs}
        found = self.backend.one.session.run(list(graph.outputs), feeds)
        for buffer, value in zip(graph.outputs.values(), found, strict=True):
            buffer[: len(value)] = torch.from_numpy(value)


def test_the_executor_runs_it_as_one_engine(directory: EngineDir, written: tuple[Chain, Path], tmp_path: Path) -> None:
    engine = EngineDir(tmp_path / "engine")
    shutil.copytree(directory.path, engine.path)
    config = engine.config()
    config["build_config"]["flavour"] = "tensorrt"
    write_json(engine.config_file, config)
    backend = ReferenceBackend(OneGraph(*written))
    mine, theirs = ChainExecutor(engine, backend, CONTEXT), TorchExecutor(load_quantized(directory.path), CONTEXT)
    # Rows past the asked ones are appended too, and need room.
    assert mine.max_length == min(CONTEXT, POSITIONS - 8)
    tokens = torch.randint(0, 500, (30,), generator=torch.Generator().manual_seed(8))
    for runner in (mine, theirs):
        torch.testing.assert_close(runner.embed(tokens), theirs.embed(tokens))
    torch.testing.assert_close(
        mine.prefill(mine.embed(tokens)), theirs.prefill(theirs.embed(tokens)), rtol=1e-4, atol=1e-4
    )
    for step in ([1, 2, 3], [4]):
        torch.testing.assert_close(mine.decode(step), theirs.decode(step), rtol=1e-4, atol=1e-4)
    for runner in (mine, theirs):
        runner.rollback(31)
    torch.testing.assert_close(mine.decode([9, 8]), theirs.decode([9, 8]), rtol=1e-4, atol=1e-4)
    assert backend.runs == [(30, 0, False), (8, 0, True), (8, 0, True), (8, 0, True)]


def test_its_nodes_are_what_the_plugins_take(written: tuple[Chain, Path]) -> None:
    graph = onnx.load(written[1]).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    kinds = {kind.OPERATOR: kind for kind in (MLAAttentionPlugin, GQAAttentionPlugin, Int4MoEPlugin)}
    nodes = [node for node in graph.node if node.domain == "trtvlm"]
    assert len(nodes) == 5
    for node in nodes:
        attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        assert (attributes.pop("plugin_version"), attributes.pop("plugin_namespace")) == (b"1", b"trtvlm")
        plugin: Any = kinds[node.op_type](**attributes)
        assert len(node.input) == len(plugin.input_types)
        assert len(node.output) == plugin.num_outputs
        for name, shape in zip(node.input, plugin.input_shapes, strict=True):
            assert shapes.get(name, shape) == shape
        for output, source in plugin.ALIASED.items():
            assert node.output[output] == node.input[source] + ".out"


def test_weights_lie_beside_it(written: tuple[Chain, Path]) -> None:
    chain, path = written
    bare = onnx.load(path, load_external_data=False)
    large = [tensor for tensor in bare.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    assert len(large) > 10
    assert not any(len(tensor.raw_data) >= 1024 for tensor in bare.graph.initializer)
    names = [tensor.name for tensor in bare.graph.initializer]
    assert len(set(names)) == len(names)
    # The rotation's tables are one for all layers.
    assert names.count("rope.cosines") == 1
    inputs = {value.name for value in bare.graph.input}
    assert inputs == {chain.hidden, CURSOR, WANTED, *(name for name, _, _ in chain.caches())}
    made = inputs | set(names) | {out for node in bare.graph.node for out in node.output}
    assert all(name in made for node in bare.graph.node for name in node.input if name)


def test_experts_that_are_no_plugin_are_refused(written: tuple[Chain, Path], tmp_path: Path) -> None:
    chain = copy.deepcopy(written[0])
    for step in chain.steps:
        if not isinstance(step, EngineStep) and step.operator == "int4_moe":
            object.__setattr__(step, "operator", "moe")
    reader: Any = None
    steps = tuple(step for step in chain.steps if isinstance(step, EngineStep) or step.operator == "moe")
    object.__setattr__(chain, "steps", steps)
    empty = onnx.ModelProto()
    with pytest.raises(UserError, match="INT4 experts only, and layer 1 has others: build with --quant int4_awq"):
        write_plugin_graph(tmp_path / "graph.onnx", chain, reader, reader, CONTEXT, lambda step: empty)


PARSE = """
import sys
import tensorrt_rtx as trt
from trtvlm.plugins.tensorrt.plugin import NAMESPACE, OperatorCreator
from trtvlm.plugins.tensorrt.register import PLUGINS

class Noting(OperatorCreator):
    def create_plugin(self, *arguments):
        made = super().create_plugin(*arguments)
        print(made.metadata_string, flush=True)
        return made

creators = [Noting(plugin) for plugin in PLUGINS]
for creator in creators:
    assert trt.get_plugin_registry().register_creator(creator, NAMESPACE)
logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
trt.OnnxParser(network, logger).parse_from_file(sys.argv[1])
"""


@pytest.mark.parametrize("directory", ["mla"], indirect=True)
def test_tensorrt_s_parser_finds_the_plugins(written: tuple[Chain, Path]) -> None:
    # In a process of its own: once it has a plugin, TensorRT-RTX, which can add none, may end the process.
    found = subprocess.run([sys.executable, "-c", PARSE, str(written[1])], capture_output=True, text=True, check=False)
    first = next(node for node in onnx.load(written[1]).graph.node if node.domain == "trtvlm")
    numbers = {item.name: item.i for item in first.attribute if not item.name.startswith("plugin_")}
    assert found.stdout.splitlines()[0] == f"{first.op_type} {numbers}", found.stderr
