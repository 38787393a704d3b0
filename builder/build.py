"""`trtvlm build`: a checkpoint, perhaps with a draft, becomes an engine directory. The whole stage on one page."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trtvlm import __version__
from trtvlm.builder import flavour
from trtvlm.builder.awq import Search
from trtvlm.builder.calibrate import Sample, bundled_samples, prepare, read_samples
from trtvlm.builder.stream import nbytes
from trtvlm.builder.trtllm_config import BuildConfig, engine_config
from trtvlm.builder.unfinished import unfinished
from trtvlm.model.artifacts import (
    PROCESSOR_FILES,
    EngineDir,
    atomic_directory,
    check_free,
    digests,
    resolved,
    write_json,
)
from trtvlm.model.checkpoint import UNUSED, CheckpointReader, bundled_draft, load_model, resolve_model
from trtvlm.model.config import ModelConfig
from trtvlm.model.errors import UserError
from trtvlm.model.inputs import ModelInputs
from trtvlm.model.pair import check_pair
from trtvlm.model.processor import Processor
from trtvlm.model.vlm import DeepseekVL2
from trtvlm.plugins.int4_linear.packing import GROUP_SIZE
from trtvlm.plugins.quantized_checkpoint import QUANTIZATIONS, Kind, layout, linears, load_quantized

Progress = Callable[[str, str], None]
"""Called with a part ("target", "draft", "engines", "accuracy") and what is being done for it now."""

# Bytes of a quantized language model that is also asked to read, which takes it and the float one whole.
READ_AT_MOST = 256 << 20
_PACKAGES = (
    "torch",
    "nvidia-modelopt",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "tensorrt-rtx",
    "tensorrt",
    "safetensors",
    "tokenizers",
)


@dataclass(frozen=True)
class BuildSettings:
    """The command line's options and their defaults.

    quant: "none", "int8_wo" or "int4_awq". lm_head: "fp16", "int8" or "int4"; None is int8, or fp16 when quant is
    none. awq: "lite", "clip" or "full", as `quantize_language`. calibration: a folder or JSONL file; None takes the
    project's own pages. verify_samples: held-out samples to compare the quantized model with the float one on; 0 skips
    it. compile: also build engines. device: "cpu", "cuda", or "auto", which is a GPU if there is one.
    """

    quant: str = "int4_awq"
    lm_head: str | None = None
    awq: Search = "full"
    build: BuildConfig = field(default_factory=BuildConfig)
    calibration: str | None = None
    calibration_samples: int = 32
    verify_samples: int = 16
    compile: bool = True
    device: str = "auto"
    overwrite: bool = False

    @property
    def place(self) -> str:
        """The device that layers are quantized on."""
        return self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def kind(self) -> Kind:
        """How linear layers are stored."""
        return QUANTIZATIONS[self.quant]

    @property
    def head(self) -> Kind:
        """How the LM head is stored."""
        chosen = self.lm_head or ("fp16" if self.quant == "none" else "int8")
        return {"fp16": "fp16", "int8": "int8", "int4": "int4"}[chosen]  # type: ignore[return-value]


@dataclass(frozen=True)
class Part:
    """One model of the build: the target or the draft."""

    role: str
    name: str
    folder: Path
    config: ModelConfig


def build(
    model: str,
    output: Path,
    settings: BuildSettings,
    draft: str | None = None,
    progress: Progress = lambda part, what: None,
) -> dict[str, Any]:
    """Build `output` and return its report. Raises UserError; `output` then is what it was before.

    A build that was killed goes on after its last finished layer.
    """
    parts = plan(model, output, settings, draft)
    started = time.monotonic()
    report: dict[str, Any] = {"model": model, "draft": parts[1].name if len(parts) > 1 else None, "quant": settings.quant,
                              "awq": settings.awq, "device": settings.place, "lm_head": settings.head, "sm": settings.build.sm,
                              "parts": {}, "engines": []}  # fmt: skip
    with unfinished(output) as left, atomic_directory(output, settings.overwrite) as folder:
        engine = EngineDir(folder)
        for part in parts:
            place = engine if part.role == "target" else EngineDir(folder / "draft")
            report["parts"][part.role] = _quantize(part, place, settings, progress, left / part.role)
        if settings.compile:
            before = time.monotonic()
            report["engines"] = flavour.build(
                folder, settings.build, lambda what: progress("engines", what), left / "engines"
            )
            report["engines_seconds"] = round(time.monotonic() - before, 2)
        # What a draft would read on its own is nobody's concern; how often it agrees is.
        if settings.verify_samples and report["parts"]["target"]["bytes"]["language"] <= READ_AT_MOST:
            progress("accuracy", "reading held-out pages")
            report["parts"]["target"]["accuracy"] |= _reading(parts[0], engine, settings)
        report["seconds"] = round(time.monotonic() - started, 2)
        report["versions"] = versions()
        report["files"] = digests(folder)
        report["bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        write_json(engine.report_file, report)
    return report


def plan(model: str, output: Path, settings: BuildSettings, draft: str | None = None) -> list[Part]:
    """Everything that can be refused is refused here, before anything is written. The parts: target, then draft."""
    if settings.compile:
        flavour.check(settings.build.flavour, settings.build.sm)
    check_free(resolved(output), settings.overwrite)
    draft = draft if draft is not None else bundled_draft(model)
    parts = [_part("target", model)]
    if draft is not None:
        parts.append(_part("draft", draft))
        check_pair(parts[0].folder, parts[1].folder)
    for part in parts:
        Processor.from_pretrained(part.folder, part.config)
        _check_tensors(part)
        language = part.config.language
        if settings.build.max_seq_len > language.max_position_embeddings:
            raise UserError(
                f"--max-seq-len {settings.build.max_seq_len} is more than the {language.max_position_embeddings} positions "
                f"of {part.name}; give at most that."
            )
        _check_groups(part, settings)
    return parts


def planned_sizes(parts: list[Part], settings: BuildSettings) -> dict[str, dict[str, int]]:
    """Bytes of what would be written, by part: the quantized language model, the 16-bit vision part, the cache."""
    sizes = {}
    for part in parts:
        reader = CheckpointReader(part.folder)
        language = part.config.language
        shapes = reader.shapes(reader.keys())
        vision = [name for name in shapes if not name.startswith(("language.", UNUSED))]
        width = (language.kv_lora_rank or 0) + language.qk_rope_head_dim
        if not language.use_mla:
            width = 2 * language.num_key_value_heads * language.head_dim
        sizes[part.role] = {
            "language": sum(nbytes(spec) for spec in layout(language, settings.kind, settings.head).values()),
            "vision": sum(2 * _numel(shapes[name]) for name in vision),
            "kv_cache": 2 * settings.build.max_seq_len * language.num_hidden_layers * width,
            "checkpoint": sum(2 * _numel(shape) for shape in shapes.values()),
        }
    return sizes


def versions() -> dict[str, str]:
    """What this was built with."""
    found = {"trtvlm": __version__, "python": platform.python_version(), "machine": platform.machine()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _part(role: str, name: str) -> Part:
    folder = resolve_model(name)
    return Part(role, name, folder, ModelConfig.from_pretrained(folder))


def _check_tensors(part: Part) -> None:
    """Every tensor is there with the shape config.json gives it, and no other; nothing is read but the shapes."""
    reader = CheckpointReader(part.folder)
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in DeepseekVL2(part.config).named_parameters()}
    shapes = reader.shapes(expected)
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise UserError(
                f"The tensor {name} of {part.folder} has shape {list(shapes[name])}, but config.json makes it "
                f"{list(shape)}; the two do not belong together."
            )
    for name in reader.keys():
        if name not in expected and not name.startswith(UNUSED):
            raise UserError(f"The checkpoint {part.folder} has a tensor {name} that its config.json has no place for.")


def _check_groups(part: Part, settings: BuildSettings) -> None:
    language = part.config.language
    found = []
    if settings.kind == "int4":
        found = [
            (f"layer {layer} {fused.name}", fused.outputs, fused.inputs, "--quant int8_wo or none")
            for layer in range(language.num_hidden_layers)
            for fused in linears(language, layer)
        ]
    if settings.head == "int4":
        found.append(("lm_head", language.vocab_size, language.hidden_size, "--lm-head int8 or fp16"))
    for name, outputs, inputs, instead in found:
        if inputs % GROUP_SIZE or outputs % 2:
            raise UserError(
                f"INT4 needs inputs in groups of {GROUP_SIZE} and an even number of outputs, but {part.name}'s {name} is "
                f"{outputs} x {inputs}; use {instead}."
            )


def _quantize(
    part: Part, place: EngineDir, settings: BuildSettings, progress: Progress, left: Path | None = None
) -> dict[str, Any]:
    """Write one part's configuration, processor files and quantized weights."""
    from trtvlm.builder.quantize import quantize_language
    from trtvlm.builder.verify import answers

    started = time.monotonic()
    place.path.mkdir(parents=True, exist_ok=True)
    for name in PROCESSOR_FILES:
        if (part.folder / name).is_file():
            shutil.copyfile(part.folder / name, place.path / name)
    write_json(place.model_config_file, part.config.to_dict())
    write_json(place.config_file, engine_config(part.config, settings.quant, settings.head, settings.build))
    processor = Processor.from_pretrained(part.folder, part.config)
    samples: list[ModelInputs] = []
    if settings.kind == "int4":
        progress(part.role, "calibration samples")
        samples = prepare(_calibration(settings), processor)
    heldout = answers(bundled_samples("heldout", settings.verify_samples), processor) if settings.verify_samples else []
    found = quantize_language(
        CheckpointReader(part.folder), part.config, place, settings.kind, settings.head, samples,
        lambda what: progress(part.role, what), settings.awq, left, heldout, settings.place,
    )  # fmt: skip
    sizes = {"language": place.weights.stat().st_size, "vision": place.vision_weights.stat().st_size}
    report = {"name": part.name, "bytes": sizes, "seconds": round(time.monotonic() - started, 2), **found.to_dict()}
    return report | ({"accuracy": found.accuracy} if found.accuracy else {})


def _calibration(settings: BuildSettings) -> list[Sample]:
    if settings.calibration is not None:
        return read_samples(settings.calibration, settings.calibration_samples)
    return bundled_samples("calibration", settings.calibration_samples)


def _reading(part: Part, place: EngineDir, settings: BuildSettings) -> dict[str, Any]:
    """Character error rates of both models, whole in memory."""
    from trtvlm.builder.accuracy import character_error_rate

    processor = Processor.from_pretrained(part.folder, part.config)
    samples = bundled_samples("heldout", settings.verify_samples)
    return {
        "cer_float": character_error_rate(load_model(part.folder), samples, processor),
        "cer_quantized": character_error_rate(load_quantized(place.path), samples, processor),
    }


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
