"""Which TensorRT builds, and what is said where it cannot."""

import sys
from pathlib import Path
from types import ModuleType

import onnx
import pytest
import torch
from click.testing import CliRunner

from tests.graphs import CONTEXT
from trtvlm.builder import compile as rtx
from trtvlm.builder.flavour import check, resolve
from trtvlm.builder.one_engine import join, language_profiles
from trtvlm.model.artifacts import EngineDir
from trtvlm.model.chain import Chain
from trtvlm.model.errors import UserError
from trtvlm.scripts.commands.build import command


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A TensorRT that is installed."""
    module = ModuleType("tensorrt")
    module.Builder = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


def gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


def test_auto_is_the_one_that_builds_without_a_gpu() -> None:
    assert resolve("auto", 86) == "tensorrt-rtx"
    assert resolve("tensorrt", 86) == "tensorrt"


def test_auto_is_tensorrt_where_the_other_cannot(full: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="TensorRT-RTX cannot build for SM 90"):
        resolve("auto", 90)
    gpu(monkeypatch, (9, 0))
    assert resolve("auto", 90) == "tensorrt"
    monkeypatch.setattr(rtx, "_tensorrt", _missing)
    assert resolve("auto", 90) == "tensorrt"
    with pytest.raises(UserError, match="not here"):
        resolve("auto", 86)


def _missing() -> None:
    raise UserError("TensorRT-RTX is not here.")


def test_tensorrt_needs_itself_and_its_gpu(full: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="builds on the GPU it is for, and there is none here"):
        check("tensorrt", 86)
    gpu(monkeypatch, (9, 0))
    with pytest.raises(UserError, match=r"has compute capability 9\.0: give --sm 90"):
        check("tensorrt", 86)
    check("tensorrt", 90)
    # What type stubs leave behind.
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    with pytest.raises(
        UserError, match=r"needs TensorRT, which is not installed: pip install 'trtvlm\[tensorrt-llm\]'"
    ):
        check("tensorrt", 90)


def test_the_command_says_so_before_anything_is_written(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        command, ["--model", "nano", "--flavour", "tensorrt", "--output", str(tmp_path / "engine")]
    )
    assert isinstance(result.exception, UserError)
    assert "--flavour tensorrt needs TensorRT" in str(result.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_one_engine_is_compiled_from(graphs: EngineDir, tmp_path: Path) -> None:
    said: list[str] = []
    draft = graphs.draft
    assert draft is not None
    chain, measures = join("draft", draft, tmp_path / "rank0.onnx", CONTEXT, 8, said.append)
    assert isinstance(chain, Chain)
    assert measures["rel_l2"] < 1e-2
    assert len(said) == len(list(chain.engines())) + 1
    model = onnx.load(tmp_path / "rank0.onnx")
    dynamic = {
        size.dim_param for value in model.graph.input for size in value.type.tensor_type.shape.dim if size.dim_param
    }
    decode, prefill = language_profiles(chain)
    assert dynamic == set(decode) == set(prefill)
    assert (decode["rows"].most, prefill["rows"].most, prefill["wanted"].most) == (8, CONTEXT, 1)
