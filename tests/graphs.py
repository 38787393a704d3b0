"""Small engine directories with random INT4 weights and their graphs, but no engines: quick to make, and for a CPU."""

import dataclasses
import shutil
from pathlib import Path

import onnx
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_checkpoint
from trtvlm.builder.check_onnx import widened
from trtvlm.builder.cut import Recipe, cut_config
from trtvlm.builder.engines import segment_job, vision_job
from trtvlm.builder.layers import PackedLayers
from trtvlm.builder.reuse import SegmentExporter
from trtvlm.builder.trtllm_config import BuildConfig, engine_config
from trtvlm.model.artifacts import PROCESSOR_FILES, EngineDir, write_json
from trtvlm.model.chain import Chain, TensorSpec
from trtvlm.model.config import ModelConfig
from trtvlm.plugins.quantized_checkpoint import QuantizedReader, load_vision
from trtvlm.plugins.random_checkpoint import RandomCheckpoint

CONTEXT = 300
"""Positions of the shared directory's caches (the fixture `graphs`)."""


def engine_directory(
    folder: Path, kind: str, max_seq_len: int, draft: str | None = None, graphs: bool = True
) -> EngineDir:
    """An engine directory of `tests.tiny`'s model `kind`, and perhaps of another as its draft.

    Its graphs compute in float32, and so does its chain: results can be compared with PyTorch's to the token. Without
    `graphs` there are none, and the chain is in float16.
    """
    source = tiny_checkpoint(folder.parent / f"{folder.name}.{kind}", kind)
    engine = EngineDir(folder)
    engine.vision.mkdir(parents=True)
    config = ModelConfig.from_pretrained(source)
    for name in PROCESSOR_FILES:
        shutil.copy(source / name, folder / name)
    write_json(engine.model_config_file, config.to_dict())
    build = BuildConfig(max_seq_len=max_seq_len)
    write_json(engine.config_file, engine_config(config, "int4_awq", "int8", build))
    write_json(engine.report_file, {"versions": {"tensorrt-rtx": "1.2.3"}})
    checkpoint = RandomCheckpoint(config.language, device="cpu")
    save_file({name: checkpoint.get(name) for name in checkpoint.layout}, engine.weights)
    stored = load_file(source / "model.safetensors")
    save_file(
        {name: value for name, value in stored.items() if not name.startswith("language.")}, engine.vision_weights
    )
    reader = QuantizedReader(engine)
    chain, recipes = cut_config(
        reader.config, reader.kind, reader.layout, max_rows=build.max_seq_len, max_width=build.max_width
    )
    engine.language.mkdir()
    if graphs:
        _export(engine, reader, chain, recipes)
        chain = in_float32(chain)
    (engine.language / "chain.json").write_text(chain.to_json(), encoding="utf-8")
    if draft is not None:
        engine_directory(folder / "draft", draft, max_seq_len)
    return engine


def _export(engine: EngineDir, reader: QuantizedReader, chain: Chain, recipes: dict[str, Recipe]) -> None:
    layers, exporter = PackedLayers(reader), SegmentExporter()
    for step in chain.engines():
        recipe = recipes[step.name]
        job = segment_job(chain, step, recipe.kind, recipe.module(layers), exporter)
        onnx.save(widened(job.export()), engine.language / f"{step.name}.onnx")
    onnx.save(widened(vision_job(load_vision(engine)).export()), engine.vision / "vision.onnx")


def in_float32(chain: Chain) -> Chain:
    """The same chain over widened graphs."""

    def widen(spec: TensorSpec) -> TensorSpec:
        return dataclasses.replace(spec, dtype="float32") if spec.dtype == "float16" else spec

    tensors, cache = ({name: widen(spec) for name, spec in specs.items()} for specs in (chain.tensors, chain.cache))
    return dataclasses.replace(chain, tensors=tensors, cache=cache)
