"""From a built engine directory, and from checkpoints, to an engine that answers; or one sentence why not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from tests.tiny import tiny_checkpoint
from trtvlm.builder.build import BuildSettings, build
from trtvlm.builder.trtllm_config import BuildConfig
from trtvlm.model.config import ModelConfig
from trtvlm.model.errors import UserError
from trtvlm.runtime.engine import check_device, check_pair, open_engine, open_model
from trtvlm.runtime.request import Request, question
from trtvlm.runtime.session import Session
from trtvlm.runtime.torch_executor import TorchExecutor
from trtvlm.scripts.commands.generate import command

CONTEXT = 300


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    return tiny_checkpoint(folder / "target", "mla", seed=1), tiny_checkpoint(folder / "draft", "mha", seed=2)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory, pair: tuple[Path, Path]) -> Path:
    """Engine directories of the pair, by quantization. Each target is its own draft in "twins"."""
    folder = tmp_path_factory.mktemp("engines")
    for quant in ("none", "int8_wo", "int4_awq"):
        settings = BuildSettings(
            quant, build=BuildConfig(max_seq_len=CONTEXT), calibration_samples=2, verify_samples=0, compile=False
        )
        build(str(pair[0]), folder / quant, settings, draft=str(pair[1]))
    shutil.copytree(folder / "int4_awq", folder / "twins")
    shutil.rmtree(folder / "twins" / "draft")
    shutil.copytree(folder / "int4_awq", folder / "twins" / "draft", ignore=shutil.ignore_patterns("draft"))
    return folder


def page(seed: int = 0) -> Image.Image:
    return Image.linear_gradient("L").rotate(90 * seed).resize((60, 50))


def ask(max_new_tokens: int = 40, draft_tokens: int = 4) -> Request:
    return Request(question([page()]), max_new_tokens, draft_tokens=draft_tokens)


@pytest.mark.parametrize("quant", ["none", "int8_wo", "int4_awq", "twins"])
def test_an_engine_answers_alike_with_and_without_speculation(engines: Path, quant: str) -> None:
    session = Session(open_engine(engines / quant))
    plain = session.answer(ask(draft_tokens=0))
    result = session.answer(ask())
    assert result.token_ids == plain.token_ids
    assert result.drafted > 0
    assert (result.accepted == result.drafted) == (quant == "twins")


def test_an_int8_cache_is_the_target_s_and_speculation_still_changes_nothing(engines: Path) -> None:
    opened = open_engine(engines / "int4_awq", kv_cache="int8")
    assert isinstance(opened.target, TorchExecutor)
    assert isinstance(opened.draft, TorchExecutor)
    kinds = [{tensor.dtype for tensor in part.cache.layers[0].tensors()} for part in (opened.target, opened.draft)]
    assert kinds == [{torch.int8, torch.half, torch.float32}, {torch.float32}]
    session = Session(opened)
    assert session.answer(ask()).token_ids == session.answer(ask(draft_tokens=0)).token_ids


@pytest.mark.parametrize("executor", ["tensorrt", "onnxruntime"])
def test_engines_have_no_int8_cache(engines: Path, executor: str) -> None:
    with pytest.raises(UserError, match=f"--executor {executor} caches latents in 16 bits"):
        open_engine(engines / "int4_awq", "cpu", executor, kv_cache="int8")


def test_without_quantization_an_engine_answers_as_the_model(engines: Path, pair: tuple[Path, Path]) -> None:
    engine = Session(open_engine(engines / "none")).answer(ask())
    model = Session(open_model(str(pair[0]), draft=str(pair[1]))).answer(ask())
    assert engine.token_ids == model.token_ids
    assert (engine.drafted, engine.accepted) == (model.drafted, model.accepted)


def test_the_context_is_the_engines(engines: Path) -> None:
    opened = open_engine(engines / "int4_awq")
    assert opened.draft is not None
    assert (opened.name, opened.target.max_length, opened.draft.max_length) == ("int4_awq", CONTEXT, CONTEXT)
    assert opened.load_ms > 0
    result = Session(opened).answer(ask(max_new_tokens=10_000))
    assert result.finish_reason == "length"
    assert result.prompt_tokens + len(result.token_ids) == CONTEXT


def test_an_engine_without_a_draft(engines: Path, tmp_path: Path) -> None:
    shutil.copytree(engines / "int4_awq", tmp_path / "alone", ignore=shutil.ignore_patterns("draft"))
    opened = open_engine(tmp_path / "alone")
    assert opened.draft is None
    assert Session(opened).answer(ask()).accepted_per_step == 1.0


def test_the_command_reads_with_an_engine(engines: Path, tmp_path: Path) -> None:
    page().save(tmp_path / "page.png")
    arguments = [
        "--engine",
        str(engines / "twins"),
        "--image",
        str(tmp_path / "page.png"),
        "--json",
        "--max-new-tokens",
        "21",
    ]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    record = json.loads(result.stdout)
    assert (record["speculation"], record["tokens"], record["steps"], record["accepted_per_step"]) == (True, 21, 4, 5.0)


def test_what_is_no_engine(engines: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no config\.json"):
        open_engine(tmp_path)
    with pytest.raises(UserError, match="not an engine directory"):
        open_engine(pair[0])
    broken = tmp_path / "broken"
    shutil.copytree(engines / "int4_awq", broken)
    weights = broken / "draft" / "rank0.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"draft.rank0\.safetensors"):
        open_engine(broken)


def test_what_is_no_model(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="no model 'nowhere'"):
        open_model("nowhere")
    with pytest.raises(UserError, match="no model 'nowhere'"):
        open_model(str(pair[0]), draft="nowhere")


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", ""])
def test_what_is_no_device(device: str) -> None:
    with pytest.raises(UserError, match=f"device '{device}'"):
        check_device(device)


def test_a_draft_of_another_vocabulary_is_refused(pair: tuple[Path, Path]) -> None:
    config = json.loads((pair[1] / "config.json").read_text())
    config["language_config"]["vocab_size"] = 600
    with pytest.raises(UserError, match="vocabulary size is 600, the target's 544"):
        check_pair(ModelConfig.from_pretrained(pair[0]), ModelConfig.from_dict(config))
