"""The Hugging Face layout holds the very weights of the engine directory it was made from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from tests.tiny import tiny_checkpoint
from trtvlm.builder.build import BuildSettings, build
from trtvlm.builder.trtllm_config import BuildConfig
from trtvlm.plugins.int4_linear import packing
from trtvlm.plugins.int8_linear import packing as int8
from trtvlm.plugins.quantized_checkpoint import load_quantized
from trtvlm.scripts.commands.export import command


@pytest.mark.parametrize(
    ("kind", "quant"), [("mla", "int4_awq"), ("mha", "int4_awq"), ("base", "int8_wo"), ("mla", "none")]
)
def test_holds_the_same_weights(tmp_path: Path, kind: str, quant: str) -> None:
    source = tiny_checkpoint(tmp_path / "in", kind)
    engine, output = tmp_path / "engine", tmp_path / "hf"
    limits = BuildConfig(max_seq_len=512, engines=False)
    build(
        str(source), engine,
        BuildSettings(quant=quant, calibration_samples=2, verify_samples=0, compile=False, build=limits),
    )  # fmt: skip
    result = CliRunner().invoke(command, ["--engine", str(engine), "--output", str(output)])
    assert result.exit_code == 0, result.output
    stored = load_file(output / "model.safetensors")
    names = {name.removesuffix(".weight_scale").removesuffix(".pre_quant_scale") for name in stored}
    expected = load_quantized(engine).state_dict()
    assert {name if name in expected else f"{name}.weight" for name in names} == set(expected)
    for name, weight in expected.items():
        layer, found = name.removesuffix(".weight"), stored[name]
        scale = stored.get(f"{layer}.weight_scale")
        if found.dtype == torch.uint8:
            assert scale is not None
            found = packing.dequantize(found, scale, stored[f"{layer}.pre_quant_scale"])
        elif scale is not None:
            found = int8.dequantize(found, scale)
        # The LM head is rounded to 16 bit.
        torch.testing.assert_close(found.float(), weight, atol=0, rtol=1e-3 if "lm_head" in name else 0)
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    assert ("quantization_config" in config) == (quant != "none")
    if quant == "int4_awq":
        assert json.loads((output / "hf_quant_config.json").read_text())["quantization"]["group_size"] == 64
    assert (output / "tokenizer.json").is_file()


def test_refuses_what_is_no_engine(tmp_path: Path) -> None:
    from trtvlm.model.errors import UserError

    result = CliRunner().invoke(command, ["--engine", str(tmp_path), "--output", str(tmp_path / "out")])
    assert isinstance(result.exception, UserError)
    assert not (tmp_path / "out").exists()
