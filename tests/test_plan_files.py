"""Bytes on disk that the plan names, against what was written: a small directory here, and one of a real size elsewhere."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from trtvlm.builder.planner.files import file_bytes, graph_bytes
from trtvlm.builder.stream import nbytes
from trtvlm.model.presets import PRESETS, preset
from trtvlm.plugins.quantized_checkpoint import Kind, layout

KINDS: tuple[Kind, ...] = ("fp16", "int8", "int4")
MEASURED = Path(__file__).parent.parent / "benchmarks" / "engines-cpu.json"


def _measured() -> dict[str, dict[str, int]]:
    builds: dict[str, dict[str, int]] = json.loads(MEASURED.read_text(encoding="utf-8"))["builds"]
    return builds


@pytest.mark.parametrize("name", _measured())
def test_what_was_written_is_within_five_percent_of_the_plan(name: str) -> None:
    found, planned = _measured()[name], file_bytes(preset(name), "int4", "int8")
    for what, size in planned.items():
        assert size == pytest.approx(found[what], rel=0.05), what
    assert sum(planned.values()) == pytest.approx(sum(found[what] for what in planned), rel=0.01)


@pytest.mark.parametrize("name", PRESETS)
def test_every_graph_that_was_measured_is_as_planned(name: str) -> None:
    """Three layers, the first of them dense, have these segments; what is beside the weights is small."""
    kinds = json.loads(MEASURED.read_text(encoding="utf-8"))["models"][name]
    names = ("embed", "attention_in", "dense", "experts_in", "attention_after_experts", "experts_in", "head")
    config = dataclasses.replace(preset(name).language, num_hidden_layers=3)
    measured = sum(kinds[kind]["onnx_bytes"] for kind in names)
    assert graph_bytes(config, "int4", "int8") == pytest.approx(measured, rel=0.001)


@pytest.mark.parametrize("kind", KINDS)
def test_operators_weights_are_in_no_graph(kind: Kind) -> None:
    config = preset("deepseek-vl2").language
    everything = sum(nbytes(spec) for spec in layout(config, kind, "int8").values())
    experts = 29 * 72 * 3 * 2560 * 1536 * {"fp16": 2, "int8": 1, "int4": 0.5}[kind]
    assert graph_bytes(config, kind, "int8") < everything - experts
