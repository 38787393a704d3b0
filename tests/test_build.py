"""`trtvlm build` from the command line, on small random checkpoints; engines are in test_compile.py."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_checkpoint
from trtvlm.builder.build import BuildSettings, plan, planned_sizes
from trtvlm.builder.trtllm_config import BuildConfig
from trtvlm.model.artifacts import EngineDir, digests
from trtvlm.scripts.cli import cli

QUICK = ("--no-compile", "--calibration-samples", "3", "--verify-samples", "0")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    return tiny_checkpoint(folder / "target", "mla"), tiny_checkpoint(folder / "draft", "mha")


def build(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["build", *map(str, arguments)])


def refused(result: Result, sentence: str) -> None:
    assert result.exit_code == 2, result.output
    assert sentence in " ".join(result.output.split())


@pytest.mark.parametrize("quant", ["none", "int8_wo", "int4_awq"])
def test_an_engine_directory_with_its_draft(pair: tuple[Path, Path], tmp_path: Path, quant: str) -> None:
    output = tmp_path / "engine"
    result = build("--model", pair[0], "--draft", pair[1], "--quant", quant, "--output", output, *QUICK)
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]
    report = json.loads((output / "build_report.json").read_text())
    assert report["files"] == {name: digest for name, digest in digests(output).items() if name != "build_report.json"}
    assert report["quant"] == quant
    assert report["engines"] == []
    engine = EngineDir(output)
    assert engine.draft is not None
    for part in (engine, engine.draft):
        assert part.config()["build_config"]["sm"] == 86
        assert part.weights.is_file()
        assert part.vision_weights.is_file()
        assert (part.path / "tokenizer.json").is_file()
    if quant == "int4_awq":
        assert len(report["parts"]["target"]["expert_tokens"]["1"]) == 4


def test_the_report_compares_with_the_float_model(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trtvlm.builder.accuracy.MAX_NEW_TOKENS", 16)  # a random model never ends its answer
    arguments = (*QUICK[:3], "--verify-samples", "1", "--max-seq-len", "1024", "--quant", "none")
    result = build("--model", pair[0], "--output", tmp_path / "out", *arguments)
    assert result.exit_code == 0, result.output
    accuracy = json.loads((tmp_path / "out" / "build_report.json").read_text())["parts"]["target"]["accuracy"]
    assert accuracy["tokens"] > 0
    # 16-bit weights of a random model: nearly every token is the same, and the divergence all but nothing.
    assert accuracy["next_token_agreement"] > 0.9
    assert 0 <= accuracy["kl"] < 1e-3
    assert accuracy["cer_float"] > 0.5


def test_a_dry_run_is_right_about_the_size_and_writes_nothing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = build("--model", pair[0], "--draft", pair[1], "--output", tmp_path / "out", "--dry-run", "--no-compile")
    assert result.exit_code == 0, result.output
    assert "nothing was written" in " ".join(result.output.split())
    assert list(tmp_path.iterdir()) == []
    settings = BuildSettings(compile=False, calibration_samples=3, verify_samples=0, build=_limits())
    sizes = planned_sizes(plan(str(pair[0]), tmp_path / "out", settings, str(pair[1])), settings)
    assert build("--model", pair[0], "--draft", pair[1], "--output", tmp_path / "out", *QUICK).exit_code == 0
    for role, part in (("target", EngineDir(tmp_path / "out")), ("draft", EngineDir(tmp_path / "out" / "draft"))):
        assert sizes[role]["language"] == sum(t.nbytes for t in load_file(part.weights).values())
        assert sizes[role]["vision"] == sum(t.nbytes for t in load_file(part.vision_weights).values())


def test_same_inputs_same_checkpoint(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert build("--model", pair[1], "--output", tmp_path / name, *QUICK).exit_code == 0
    first, second = (digests(tmp_path / name) for name in ("a", "b"))
    assert {name: d for name, d in first.items() if name != "build_report.json"} == {
        name: d for name, d in second.items() if name != "build_report.json"
    }


def test_refusals_are_one_sentence_and_leave_nothing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    target, draft = pair
    out = tmp_path / "out"
    refused(build("--model", "nowhere", "--output", out, *QUICK), "There is no model 'nowhere'")
    refused(build("--model", target, "--output", out, "--sm", "70"), "cannot build for SM 70")
    refused(build("--model", target, "--output", out, *QUICK, "--max-seq-len", "5000"), "--max-seq-len 5000 is more")
    refused(build("--model", target, "--output", out, *QUICK, "--calibration", tmp_path / "no"), "no calibration data")
    damaged = tmp_path / "damaged"
    shutil.copytree(target, damaged)
    weights = load_file(damaged / "model.safetensors")
    weights["language.model.layers.2.mlp.shared_experts.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, damaged / "model.safetensors")
    refused(build("--model", damaged, "--output", out, *QUICK), "layers.2.mlp.shared_experts.up_proj.weight holds")
    other = tmp_path / "other"
    shutil.copytree(draft, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(
        build("--model", target, "--draft", other, "--output", out, *QUICK), "has another tokenizer than the target"
    )
    (other / "tokenizer.json").unlink()
    refused(build("--model", other, "--quant", "none", "--output", out, *QUICK), "There is no tokenizer.json")
    weights["language.model.layers.9.mlp.up_proj.weight"] = weights.pop("language.lm_head.weight")
    save_file(weights, damaged / "model.safetensors")
    refused(build("--model", damaged, "--output", out, "--dry-run"), "no tensor language.lm_head.weight")
    weights["language.lm_head.weight"] = torch.zeros(3, 64)
    save_file(weights, damaged / "model.safetensors")
    refused(build("--model", damaged, "--output", out, *QUICK), "language.lm_head.weight of")
    weights["language.lm_head.weight"] = torch.zeros(544, 64)
    save_file(weights, damaged / "model.safetensors")
    refused(
        build("--model", damaged, "--output", out, *QUICK), "layers.9.mlp.up_proj.weight that its config.json has no"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "other"]
    out.mkdir()
    (out / "precious").write_text("")
    refused(build("--model", target, "--output", out, *QUICK), "exists already")
    refused(build("--model", target, "--output", out, *QUICK, "--overwrite"), "was not made by `trtvlm build`")
    assert [path.name for path in out.iterdir()] == ["precious"]


@pytest.mark.parametrize("limit", [2_000, 100_000, 250_000])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(pair: tuple[Path, Path], tmp_path: Path, limit: int) -> None:
    """No file may grow beyond `limit` bytes: the tokenizer, the vision part or the language model does not fit."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        result = build("--model", pair[0], "--quant", "none", "--output", tmp_path / "out", *QUICK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    refused(result, "failed (File too large); nothing was left there.")
    assert list(tmp_path.iterdir()) == []


def test_an_engine_directory_is_built_again_in_its_place(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for quant in ("none", "int8_wo"):
        result = build("--model", pair[0], "--quant", quant, "--output", tmp_path / "out", *QUICK, "--overwrite")
        assert result.exit_code == 0, result.output
    assert EngineDir(tmp_path / "out").report()["quant"] == "int8_wo"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_that_cannot_be_written(pair: tuple[Path, Path], tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    refused(build("--model", pair[0], "--output", tmp_path / "out", *QUICK), "cannot be written")


def _limits() -> BuildConfig:
    return BuildConfig(max_seq_len=1024)
