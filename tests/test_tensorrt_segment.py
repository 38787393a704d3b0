"""What TensorRT is told, in which order: its API replaced by one that takes notes. Types are checked against its stubs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trtvlm.model.errors import UserError
from trtvlm.runtime.tensorrt import tensorrt_segment
from trtvlm.runtime.tensorrt.segment import Graph
from trtvlm.runtime.tensorrt.tensorrt_segment import TensorRTBackend

STREAM = 77


class Context:
    def __init__(self, config: Any) -> None:
        self.config = config
        self.calls: list[tuple[Any, ...]] = []
        self.runs: list[dict[str, Any]] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.profile = -1
        self.works = True

    def set_device_memory(self, pointer: int, size: int) -> None:
        self.memory = pointer, size

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream == STREAM
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.calls.append(("shape", name))
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        self.calls.append(("address", name))
        self.addresses[name] = pointer
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == STREAM
        self.runs.append({"shapes": dict(self.shapes), "addresses": dict(self.addresses)})
        return self.works


class Engine:
    def __init__(self, data: bytes) -> None:
        self.name, names, scratch, profiles = data.decode().split("|")
        self.names = names.split()
        self.num_io_tensors, self.device_memory_size_v2 = len(self.names), int(scratch)
        self.num_optimization_profiles = int(profiles)
        self.contexts: list[Context] = []

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def create_runtime_config(self) -> Any:
        return SimpleNamespace(
            set_execution_context_allocation_strategy=lambda strategy: None,
            dynamic_shapes_kernel_specialization_strategy=None,
        )

    def create_execution_context(self, config: Any) -> Context:
        self.contexts.append(Context(config))
        return self.contexts[-1]


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """The engines that were loaded. A file holds "name|tensors|scratch|profiles"."""
    loaded: list[Engine] = []

    def load(data: bytes) -> Engine | None:
        if data == b"nonsense":
            return None
        loaded.append(Engine(data))
        return loaded[-1]

    module = SimpleNamespace(
        Logger=type("Logger", (), {"WARNING": 1, "__init__": lambda self, level: None}),
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=load),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="ours"),
        DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="eager", NONE="none"),
    )
    monkeypatch.setattr(tensorrt_segment, "tensorrt", lambda flavour: module)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    stream = SimpleNamespace(cuda_stream=STREAM, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    return loaded


def graph(folder: Path, name: str, profiles: int = 2, scratch: int = 100, decode_rows: int = 8) -> Graph:
    (folder / f"{name}.engine").write_bytes(f"{name}|x y|{scratch}|{profiles}".encode())
    return Graph(name, folder, {"x": torch.zeros(20, 4)}, {"y": torch.zeros(20, 2)}, decode_rows)


def test_a_decode_is_set_up_once_and_a_prefill_every_time(engines: list[Engine], tmp_path: Path) -> None:
    described = graph(tmp_path, "a")
    (segment,) = TensorRTBackend("tensorrt-rtx", "cpu").open([described])
    prefill, decode = engines[0].contexts
    x, y = described.inputs["x"], described.outputs["y"]
    segment.run(5)
    segment.run(1, 4)
    assert [run["shapes"]["x"] for run in prefill.runs] == [(5, 4), (1, 4)]
    assert [run["addresses"]["x"] for run in prefill.runs] == [x.data_ptr(), x[4:].data_ptr()]
    assert {run["addresses"]["y"] for run in prefill.runs} == {y.data_ptr()}
    calls = list(decode.calls)
    for _ in range(3):
        segment.run(8, decode=True)
    assert decode.calls == calls
    assert [run["shapes"]["x"] for run in decode.runs] == [(8, 4)] * 3
    assert (prefill.profile, decode.profile) == (1, 0)
    strategies = [context.config.dynamic_shapes_kernel_specialization_strategy for context in (prefill, decode)]
    assert strategies == ["none", "eager"]


def test_graphs_share_the_scratch_of_the_largest(engines: list[Engine], tmp_path: Path) -> None:
    backend = TensorRTBackend("tensorrt-rtx", "cpu")
    backend.open([graph(tmp_path, "a", scratch=100), graph(tmp_path, "b", scratch=3000)])
    memories = {context.memory for engine in engines for context in engine.contexts}
    assert len(memories) == 1
    assert memories.pop()[1] == 3000


def test_a_graph_without_a_prefill_profile_runs_in_its_only_one(engines: list[Engine], tmp_path: Path) -> None:
    head, vision = TensorRTBackend("tensorrt-rtx", "cpu").open(
        [graph(tmp_path, "head", profiles=1), graph(tmp_path, "vision", profiles=1, decode_rows=0)]
    )
    head.run(1, 6)
    vision.run(3)
    assert [context.profile for context in engines[0].contexts] == [0, 0]
    assert [context.profile for context in engines[1].contexts] == [0]


def test_what_does_not_load_is_said(engines: list[Engine], tmp_path: Path) -> None:
    backend = TensorRTBackend("tensorrt-rtx", "cpu")
    described = graph(tmp_path, "a")
    (tmp_path / "a.engine").write_bytes(b"a|x z|1|2")
    with pytest.raises(UserError, match=r"a\.engine has the tensors \['x', 'z'\], but chain\.json binds \['x', 'y'\]"):
        backend.open([described])
    (tmp_path / "a.engine").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"TensorRT does not load .*a\.engine"):
        backend.open([described])
    (tmp_path / "a.engine").unlink()
    with pytest.raises(UserError, match=r"a\.engine cannot be read"):
        backend.open([described])


def test_what_tensorrt_refuses_is_an_error(engines: list[Engine], tmp_path: Path) -> None:
    (segment,) = TensorRTBackend("tensorrt-rtx", "cpu").open([graph(tmp_path, "a")])
    engines[0].contexts[0].works = False
    with pytest.raises(RuntimeError, match="could not run the engine 'a'"):
        segment.run(2)
