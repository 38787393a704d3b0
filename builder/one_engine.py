"""For a TensorRT that takes plugins: one engine per language model, rank0.engine, and the vision part's.

The graphs are those of `trtvlm.builder.engines`, checked in the same way before they are joined. TensorRT builds for the GPU it
runs on. **Not run yet**: written against the API's stubs; the joined graph itself is tested (tests/test_plugin_graph.py).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trtvlm.builder.check_chain import check_chain
from trtvlm.builder.check_onnx import check_graph
from trtvlm.builder.compile import WORKSPACE, Profile, Range, add_profile, collector, describe, reason
from trtvlm.builder.cut import cut_config
from trtvlm.builder.engines import segment_job, vision_job
from trtvlm.builder.export import ROWS
from trtvlm.builder.layers import FloatLayers, PackedLayers
from trtvlm.builder.plugin_graph import write_plugin_graph
from trtvlm.builder.reuse import SegmentExporter
from trtvlm.model.artifacts import EngineDir
from trtvlm.model.chain import WANTED, Chain, cache_positions
from trtvlm.model.errors import GraphError, UserError
from trtvlm.plugins.quantized_checkpoint import QuantizedReader, load_vision

if TYPE_CHECKING:
    import onnx
    import tensorrt as trt

Progress = Callable[[str], None]


def check_gpu(sm: int) -> None:
    """UserError unless TensorRT is installed and a GPU of compute capability `sm` (86 is 8.6) is here."""
    tensorrt()
    if not torch.cuda.is_available():
        raise UserError("--flavour tensorrt builds on the GPU it is for, and there is none here: use tensorrt-rtx.")
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != divmod(sm, 10):
        raise UserError(
            f"--flavour tensorrt builds for the GPU it runs on, which has compute capability {major}.{minor}: give --sm "
            f"{major}{minor}, or use tensorrt-rtx."
        )


def build_one_engine(
    engine_dir: Path, *, sm: int, max_seq_len: int, max_width: int, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Write rank0.engine, vision/vision.engine and language/chain.json of a quantized directory and of its `draft/`.

    Arguments and records are those of `trtvlm.builder.engines.build_engines`. UserError: no TensorRT or GPU, or a model
    that the plugins do not run; GraphError naming the graph that went wrong.
    """
    check_gpu(sm)
    target = EngineDir(Path(engine_dir))
    parts = {"target": target} | ({"draft": target.draft} if target.draft else {})
    records: list[dict[str, Any]] = []
    for part, engine in parts.items():
        for record in _build_part(part, engine, max_seq_len, max_width, progress or (lambda what: None)):
            records.append({"part": part, **record})
    return records


def _build_part(
    part: str, engine: EngineDir, max_seq_len: int, max_width: int, progress: Progress
) -> list[dict[str, Any]]:
    records = [_timed("vision", lambda: _vision(part, engine, progress))]
    with tempfile.TemporaryDirectory(prefix=".graphs.", dir=engine.path) as place:
        folder = Path(place)
        chain, measures = join(part, engine, folder / "rank0.onnx", max_seq_len, max_width, progress)
        progress(f"{part}: one engine of the whole language model")

        def language() -> dict[str, Any]:
            plan = compile_plugins("rank0", folder / "rank0.onnx", language_profiles(chain))
            engine.engine.write_bytes(plan)
            written = sum(path.stat().st_size for path in folder.glob("rank0.onnx*"))
            return {"onnx_bytes": written, "engine_bytes": len(plan), **measures}

        records.append(_timed("rank0", language))
    engine.language.mkdir(exist_ok=True)
    (engine.language / "chain.json").write_text(chain.to_json(), encoding="utf-8")
    return records


def join(
    part: str, engine: EngineDir, path: Path, max_seq_len: int, max_width: int, progress: Progress
) -> tuple[Chain, dict[str, Any]]:
    """Export and check every segment and the chain of them, and write them as one graph to `path` -> chain and measures.

    Needs neither TensorRT nor a GPU.
    """
    import onnx

    reader = QuantizedReader(engine)
    chain, recipes = cut_config(reader.config, reader.kind, reader.layout, max_rows=max_seq_len, max_width=max_width)
    layers, exporter = PackedLayers(reader), SegmentExporter()
    segments = path.parent / "segments"
    segments.mkdir()
    for step in chain.engines():
        progress(f"{part} {step.name}")
        recipe = recipes[step.name]
        job = segment_job(chain, step, recipe.kind, recipe.module(layers), exporter)
        graph = job.export()
        check_graph(job.name, graph, job.module, job.batches)
        onnx.save(graph, segments / f"{step.name}.onnx")

    def graph_of(name: str) -> onnx.ModelProto:
        return onnx.load(segments / f"{name}.onnx")

    progress(f"{part}: the whole chain against PyTorch")
    found = check_chain(part, chain, graph_of, PackedLayers(reader), FloatLayers(reader))
    positions = cache_positions(max_seq_len)
    write_plugin_graph(path, chain, reader.config, reader, positions, lambda step: graph_of(step.name))
    measures = {"rel_l2": found.rel_l2, "max_abs_diff": found.max_abs, "agreement": round(found.agreement, 4)}
    return chain, measures


def language_profiles(chain: Chain) -> list[Profile]:
    """A decode wants the logits of all its rows, a prefill those of its last."""
    decode, prefill = (Range(*chain.profiles[name]) for name in ("decode", "prefill"))
    return [{ROWS: decode, WANTED: decode}, {ROWS: prefill, WANTED: Range(1, 1, 1)}]


def compile_plugins(name: str, path: Path, profiles: Sequence[Profile]) -> bytes:
    """Compile the graph at `path`, with the weights beside it, for the GPU that is here -> the serialized engine.

    Strongly typed; plugin outputs may overwrite inputs. GraphError with the parser's or builder's own words.
    """
    from trtvlm.plugins.tensorrt.register import register

    module = tensorrt()
    register()
    logger, messages = collector(module)
    builder: trt.Builder = module.Builder(logger)
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser: trt.OnnxParser = module.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        reasons = "; ".join(describe(parser.get_error(index)) for index in range(parser.num_errors))
        raise GraphError(f"TensorRT cannot parse the graph '{name}': {reasons or 'no reason given'}.")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, WORKSPACE)
    config.clear_flag(module.BuilderFlag.TF32)
    config.set_preview_feature(module.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    for number, profile in enumerate(profiles):
        add_profile(name, number, profile, builder, network, config)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise GraphError(f"TensorRT cannot build the graph '{name}': {reason(messages)}.")
    return bytes(plan)


def tensorrt() -> Any:
    """TensorRT's module; UserError when it is not installed."""
    try:
        import tensorrt as module
    except ImportError:
        module = None  # type: ignore[assignment, unused-ignore]
    # Type stubs alone leave an empty namespace package behind, which imports.
    if not hasattr(module, "Builder"):
        raise UserError(
            "--flavour tensorrt needs TensorRT, which is not installed: pip install 'trtvlm[tensorrt-llm]' in an "
            "environment of its own, or use --flavour tensorrt-rtx."
        )
    return module


def _vision(part: str, engine: EngineDir, progress: Progress) -> dict[str, Any]:
    import onnx

    progress(f"{part} vision")
    job = vision_job(load_vision(engine))
    graph = job.export()
    found = check_graph(job.name, graph, job.module, job.batches)
    path = engine.vision / "vision.onnx"
    onnx.save(graph, path)
    plan = compile_plugins("vision", path, job.profiles)
    (engine.vision / "vision.engine").write_bytes(plan)
    sizes = {"onnx_bytes": path.stat().st_size, "engine_bytes": len(plan)}
    return {**sizes, "rel_l2": found.rel_l2, "max_abs_diff": found.max_abs}


def _timed(name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    started = time.monotonic()
    record = make()
    return {"name": name, **record, "seconds": round(time.monotonic() - started, 3)}
