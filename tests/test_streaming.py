"""Streaming a checkpoint through quantization equals quantizing it whole, and takes no more memory for more layers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_checkpoint
from trtvlm.builder import quantize
from trtvlm.builder.accuracy import compare
from trtvlm.builder.awq import pre_quant_scales, searched_scales
from trtvlm.builder.calibrate import bundled_samples, embeddings, prepare
from trtvlm.builder.compensate import gram
from trtvlm.builder.quantize import quantize_language
from trtvlm.builder.seen import Seen
from trtvlm.builder.stream import SafetensorsWriter
from trtvlm.builder.trtllm_config import BuildConfig, engine_config
from trtvlm.builder.verify import answers
from trtvlm.model.artifacts import EngineDir, write_json
from trtvlm.model.checkpoint import CheckpointReader, load_model, resolve_model
from trtvlm.model.config import ModelConfig
from trtvlm.model.inputs import ModelInputs
from trtvlm.model.processor import Processor
from trtvlm.plugins.int4_linear import packing
from trtvlm.plugins.quantized_checkpoint import layout, load_quantized
from trtvlm.scripts.make_random_checkpoint import size_of, write_random_checkpoint


def _engine(folder: Path, config: ModelConfig) -> EngineDir:
    folder.mkdir()
    engine = EngineDir(folder)
    write_json(engine.model_config_file, config.to_dict())
    write_json(engine.config_file, engine_config(config, "int4_awq", "int8", BuildConfig()))
    return engine


def _whole(source: Path, path: Path, samples: list[ModelInputs]) -> None:
    """The slow twin: the whole float model runs on every sample with all layers recorded; then every layer is written."""
    model, config = load_model(source), ModelConfig.from_pretrained(source)
    total = sum(sample.input_ids.numel() for sample in samples)
    seen = [Seen(layer, total) for layer in model.language.model.layers]
    with torch.no_grad():
        for sample in samples:
            model.language(embeddings(model, sample))
        with SafetensorsWriter(path, layout(config.language, "int4", "int8")) as writer:
            for index, record in enumerate(seen):
                record.finish()
                layer = model.language.model.layers[index]
                quantize._write_layer(writer, layer, index, config, "int4", record, "full")
            quantize._write_ends(writer, CheckpointReader(source), config, "int8")


@pytest.mark.parametrize("model", ["tiny", *(pytest.param(name, marks=pytest.mark.slow) for name in ("nano", "mid"))])
def test_equals_the_whole_model_at_once(model: str, tmp_path: Path) -> None:
    if model == "tiny":
        source = tiny_checkpoint(tmp_path / "in", "base")
    elif model == "nano":
        source = resolve_model("nano")
    else:
        source = tmp_path / "in"
        write_random_checkpoint(source, size_of("mid"), shard=20_000_000, processes=1)
    config = ModelConfig.from_pretrained(source)
    samples = prepare(bundled_samples("calibration", 1 if model == "tiny" else 2), Processor.from_pretrained(source))
    engine = _engine(tmp_path / "out", config)
    quantize_language(CheckpointReader(source), config, engine, "int4", "int8", samples)
    _whole(source, tmp_path / "whole.safetensors", samples)
    expected, found = load_file(tmp_path / "whole.safetensors"), load_file(engine.weights)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_the_comparison_layer_by_layer_is_that_of_the_whole_models(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "in", "mla")
    config, processor = ModelConfig.from_pretrained(source), Processor.from_pretrained(source)
    heldout = bundled_samples("heldout", 2)
    calibration = prepare(bundled_samples("calibration", 2), processor)
    engine = _engine(tmp_path / "out", config)
    report = quantize_language(
        CheckpointReader(source), config, engine, "int4", "int8", calibration, answers=answers(heldout, processor)
    )
    expected = compare(load_model(source), load_quantized(engine.path), heldout, processor, read=False)
    assert report.accuracy["tokens"] == expected["tokens"] > 0
    assert report.accuracy["next_token_agreement"] == pytest.approx(expected["next_token_agreement"], abs=0.02)
    assert report.accuracy["kl"] == pytest.approx(expected["kl"], rel=1e-3)
    assert len(report.layer_errors) == config.language.num_hidden_layers
    assert all(0 < error < 0.5 for error in report.layer_errors)


def test_the_search_without_modelopt_chooses_what_modelopt_chooses() -> None:
    generator = torch.Generator().manual_seed(0)
    weights, rows = torch.randn(12, 96, 128, generator=generator) * 0.1, []
    for number in range(12):
        x = torch.randn(200 + number, 128, generator=generator)
        x[:, :: 2 + number] *= 1 + 3 * number
        rows.append(x)
    names = [str(number) for number in range(12)]
    expected = pre_quant_scales(dict(zip(names, weights, strict=True)), dict(zip(names, rows, strict=True)))
    magnitude = torch.stack([x.abs().mean(0) for x in rows])
    found = searched_scales(weights, torch.stack([gram(x) for x in rows]), magnitude)
    for number, name in enumerate(names):
        torch.testing.assert_close(found[number], expected[name], rtol=1e-5, atol=1e-6)
    assert len({round(float(scale.max() / scale.min()), 3) for scale in found}) > 6


def test_the_way_a_gpu_takes_gives_the_same_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which device a layer is on decides who searches; here a CPU takes the other way, bags of one shape included."""
    source = tiny_checkpoint(tmp_path / "in", "base")
    config = ModelConfig.from_pretrained(source)
    samples = prepare(bundled_samples("calibration", 1), Processor.from_pretrained(source))
    stored = []
    for name in ("modelopt", "search"):
        if name == "search":
            monkeypatch.setattr(quantize, "layer_device", lambda layer: torch.device("meta"))
            monkeypatch.setattr(quantize, "pre_quant_scales", None)
        engine = _engine(tmp_path / name, config)
        quantize_language(CheckpointReader(source), config, engine, "int4", "int8", samples, awq="lite")
        stored.append(load_file(engine.weights))
    for name, expected in stored[0].items():
        if name.endswith("prequant_scaling_factor"):
            torch.testing.assert_close(stored[1][name], expected, rtol=2e-3, atol=0)
        elif expected.dtype == torch.int8:
            assert float((stored[1][name] == expected).float().mean()) > 0.98, name


def test_an_expert_never_reached_is_rounded_without_awq_and_named(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "in", "base")
    weights = load_file(source / "model.safetensors")
    # noaux_tc: a low enough correction bias keeps an expert from ever being chosen.
    weights["language.model.layers.1.mlp.gate.e_score_correction_bias"][2] = -100.0
    save_file(weights, source / "model.safetensors")
    config = ModelConfig.from_pretrained(source)
    samples = prepare(bundled_samples("calibration", 2), Processor.from_pretrained(source))
    engine = _engine(tmp_path / "out", config)
    report = quantize_language(CheckpointReader(source), config, engine, "int4", "int8", samples)
    assert report.to_dict()["experts_never_reached"] == {"count": 1, "by_layer": {"1": [2]}}
    assert report.expert_tokens[1][2] == 0
    stored = load_file(engine.weights)
    name = "transformer.layers.1.mlp.proj"
    scale = stored[f"{name}.prequant_scaling_factor"][2].float()
    folded = weights["language.model.layers.1.mlp.experts.2.down_proj.weight"].float() / scale
    groups = packing.group_scales(folded, dtype=torch.float16)
    assert torch.equal(stored[f"{name}.weights_scaling_factor"][2], groups)
    assert torch.equal(stored[f"{name}.weight"][2], packing.pack(packing.quantize_int4(folded, groups)))
    other = packing.group_scales(weights["language.model.layers.1.mlp.experts.1.down_proj.weight"].float() / scale)
    assert not torch.equal(stored[f"{name}.weights_scaling_factor"][1], other.half().float())


# Builds argv[1] and prints the peak of its resident memory in kilobytes.
BUILD = """
import json, resource, sys
from pathlib import Path
from trtvlm.builder import build as module
from trtvlm.builder.build import BuildSettings, build
from trtvlm.builder.trtllm_config import BuildConfig

module.READ_AT_MOST = 0  # as with a large model: nobody holds it whole to read pages with it
settings = BuildSettings(
    calibration_samples=1, verify_samples=1, compile=False, awq=sys.argv[3], device="cpu",
    build=BuildConfig(max_seq_len=512, engines=False),
)
report = build(sys.argv[1], Path(sys.argv[2]), settings)
print(json.dumps({
    "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "accuracy": report["parts"]["target"]["accuracy"]
}))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    peaks = {}
    for layers in (4, 16):
        source = tmp_path / f"in{layers}"
        write_random_checkpoint(source, size_of("mid", layers), shard=50_000_000, processes=1)
        done = subprocess.run(
            [sys.executable, "-c", BUILD, str(source), str(tmp_path / f"out{layers}"), "lite"],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["accuracy"]["tokens"] > 0
        peaks[layers] = found["peak"]
    # Held whole in float32, twelve more layers would be 360 MB more.
    assert peaks[16] < 1.1 * peaks[4], peaks
