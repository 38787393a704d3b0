"""The engines of an engine directory: vision, the target's language model, the draft's; exported, checked, compiled.

A graph at a time: its module is made from the quantized checkpoint, exported, compared with PyTorch, compiled, written and
freed, so no model is ever whole in memory.
"""

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trtvlm import __version__
from trtvlm.builder.aside import Aside
from trtvlm.builder.check_chain import check_chain
from trtvlm.builder.check_onnx import Difference, check_graph
from trtvlm.builder.compile import Profile, Range, check_sm, tensorrt_version
from trtvlm.builder.cut import cut_config
from trtvlm.builder.engine_cache import EngineCache
from trtvlm.builder.export import ROWS, VIEWS, VisionEncoder, export_vision, max_views
from trtvlm.builder.finished_graphs import FinishedGraphs
from trtvlm.builder.layers import FloatLayers, PackedLayers
from trtvlm.builder.reuse import SegmentExporter
from trtvlm.builder.unfinished import digest_of
from trtvlm.model.artifacts import EngineDir
from trtvlm.model.chain import Chain, EngineStep
from trtvlm.model.vlm import DeepseekVL2
from trtvlm.plugins.quantized_checkpoint import QuantizedReader, load_vision

if TYPE_CHECKING:
    import onnx

Progress = Callable[[str], None]
"""Called with what is being done now, as "target 03_attention1_out_experts1_in (4 of 14)"."""

# Row counts at which a segment is compared: one, an odd one, and one that only the prefill profile has.
_CHECKED_ROWS = (1, 3, 24)
_CHECKED_VIEWS = (1, 3)
# Bytes of vision weights from which the vision part is built in a process of its own, beside the language model: that
# process takes five seconds to begin, and at SigLIP-SO400M's size a minute and six times the weights.
_ASIDE = 100_000_000


@dataclass(frozen=True)
class Limits:
    """What engines are built for: the compute capability (86 is 8.6), and the most rows of a prefill and a decode."""

    sm: int
    max_seq_len: int
    max_width: int


@dataclass(frozen=True)
class Job:
    """One graph to export, check and compile."""

    name: str
    export: Callable[[], "onnx.ModelProto"]
    module: nn.Module
    batches: Sequence[Mapping[str, Tensor]]
    profiles: Sequence[Profile]


def build_engines(
    engine_dir: Path,
    *,
    sm: int,
    max_seq_len: int,
    max_width: int,
    progress: Progress | None = None,
    unfinished: Path | None = None,
) -> list[dict[str, Any]]:
    """Build every engine of a finished quantized directory and of its `draft/`, checking each graph on the way.

    Writes vision/vision.{onnx,engine}, language/*.{onnx,engine} and language/chain.json. Engines are for compute
    capability `sm` (86 means 8.6) and take up to `max_width` tokens in a decode pass and `max_seq_len` in a prefill.

    unfinished: a folder on the same disk to keep finished graphs in; with one, a run goes on where a killed one was.

    Returns a record a graph: part ("target" or "draft"), name, onnx_bytes, engine_bytes, seconds (export, check and
    compile), rel_l2 and max_abs_diff against the float32 module; and one a part named "chain" with the whole language
    model's, and `agreement`, the share of rows whose best token is the float32 model's. Raises UserError for an `sm`
    that cannot be built for, and GraphError naming the graph that went wrong.
    """
    check_sm(sm)
    target, limits = EngineDir(Path(engine_dir)), Limits(sm, max_seq_len, max_width)
    parts = {"target": target} | ({"draft": target.draft} if target.draft else {})
    records: list[dict[str, Any]] = []
    with ExitStack() as stack:
        if unfinished is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=".engines.", dir=target.path))
            unfinished = Path(folder)
        for part, engine in parts.items():
            finished = FinishedGraphs(unfinished / part, _digest(engine, limits))
            records += _build_part(part, engine, limits, finished, progress or (lambda what: None))
    return records


def _build_part(
    part: str, engine: EngineDir, limits: Limits, finished: FinishedGraphs, progress: Progress
) -> list[dict[str, Any]]:
    with ExitStack() as stack:
        aside = None
        if finished.record("vision") is None and engine.vision_weights.stat().st_size > _ASIDE:
            progress(f"{part}: the vision part, in a process beside this one")
            aside = stack.enter_context(Aside(build_vision, engine, limits, finished))
        records = [] if aside else [_reported(part, "vision", progress, lambda: build_vision(engine, limits, finished))]
        language, chain = _build_language(part, engine, limits, finished, progress)
        records += language
        if aside is not None:
            progress(f"{part}: the vision part")
            records.insert(0, {"part": part, **aside.result()})
    for record in records:
        finished.place(record["name"], engine.vision if record["name"] == "vision" else engine.language)
    progress(f"{part}: the whole chain against PyTorch")
    return [*records, {"part": part, **_check(part, engine, chain)}]


def _build_language(
    part: str, engine: EngineDir, limits: Limits, finished: FinishedGraphs, progress: Progress
) -> tuple[list[dict[str, Any]], Chain]:
    reader = QuantizedReader(engine)
    chain, recipes = cut_config(
        reader.config, reader.kind, reader.layout, max_rows=limits.max_seq_len, max_width=limits.max_width
    )
    layers, exporter, cache, records = PackedLayers(reader), SegmentExporter(), EngineCache(), []
    steps = list(chain.engines())
    for number, step in enumerate(steps, 1):

        def build(step: EngineStep = step) -> dict[str, Any]:
            recipe = recipes[step.name]
            job = segment_job(chain, step, recipe.kind, recipe.module(layers), exporter)
            return build_graph(job, limits.sm, finished, cache)

        records.append(_reported(part, step.name, progress, build, f" ({number} of {len(steps)})", finished))
    return records, chain


def _reported(
    part: str,
    name: str,
    progress: Progress,
    build: Callable[[], dict[str, Any]],
    count: str = "",
    finished: FinishedGraphs | None = None,
) -> dict[str, Any]:
    progress(f"{part} {name}{count}")
    record = finished.record(name) if finished else None
    return {"part": part, **(record or build())}


def build_vision(engine: EngineDir, limits: Limits, finished: FinishedGraphs) -> dict[str, Any]:
    """Build the vision part's graph -> its record."""
    found = finished.record("vision")
    return found or build_graph(vision_job(load_vision(engine)), limits.sm, finished, EngineCache())


def build_graph(job: Job, sm: int, finished: FinishedGraphs, cache: EngineCache) -> dict[str, Any]:
    """Export, check, compile and keep one graph -> its record without its part."""
    times = [(time.monotonic(), time.process_time())]

    def lap() -> None:
        times.append((time.monotonic(), time.process_time()))

    graph = job.export()
    lap()
    difference: Difference = check_graph(job.name, graph, job.module, job.batches)
    lap()
    serialized = graph.SerializeToString(deterministic=True)
    del graph
    engine = cache.compile(job.name, serialized, job.profiles, sm=sm)
    lap()
    stages = {
        what: {"seconds": round(after[0] - before[0], 3), "cpu_seconds": round(after[1] - before[1], 3)}
        for what, before, after in zip(("export", "check", "compile"), times, times[1:], strict=False)
    }
    record = {
        "name": job.name,
        "onnx_bytes": len(serialized),
        "engine_bytes": len(engine),
        "rel_l2": difference.rel_l2,
        "max_abs_diff": difference.max_abs,
        "seconds": round(times[-1][0] - times[0][0], 3),
        "stages": stages,
    }
    finished.finish(job.name, serialized, engine, record)
    return record


def vision_job(model: DeepseekVL2, most: int | None = None) -> Job:
    """The graph of the vision part of `model`, for 1 to `most` views: by default as many as an image can have."""
    config = model.config
    most = most or max_views(config.candidate_resolutions, config.tile_size)
    generator = torch.Generator().manual_seed(0)
    shape = 3, config.tile_size, config.tile_size
    batches = [
        {"pixels": torch.rand(views, *shape, generator=generator).mul(2).sub(1).half()}
        for views in _CHECKED_VIEWS
        if views <= most
    ]
    profile = {VIEWS: Range(1, min(5, most), most)}
    return Job("vision", lambda: export_vision(model, most), VisionEncoder(model), batches, [profile])


def segment_job(chain: Chain, step: EngineStep, kind: str, module: nn.Module, exporter: SegmentExporter) -> Job:
    """The graph of one segment; `kind` as `SegmentExporter` wants it."""
    profiles = [chain.profiles["decode"]] + ([chain.profiles["prefill"]] if step.rows == "all" else [])
    most = max(profile[2] for profile in profiles)
    batches = [inputs(chain, step, rows) for rows in _CHECKED_ROWS if rows <= most]
    example = inputs(chain, step, 2)

    def export() -> "onnx.ModelProto":
        names = list(step.outputs)
        return exporter.export(kind, step.name, module, example, names, dynamic=ROWS, largest=most)

    return Job(step.name, export, module, batches, [{ROWS: Range(*profile)} for profile in profiles])


def inputs(chain: Chain, step: EngineStep, rows: int) -> dict[str, Tensor]:
    """Random inputs of a segment, the same every time: token ids, or activations of unit variance."""
    generator = torch.Generator().manual_seed(rows)
    vocab = chain.tensors[chain.output].shape[1]
    assert isinstance(vocab, int)
    values = {}
    for name, source in step.inputs.items():
        spec = chain.tensors[source]
        shape = [rows if size == "rows" else int(size) for size in spec.shape]
        if spec.dtype == "int64":
            values[name] = torch.randint(0, vocab, shape, generator=generator)
        else:
            values[name] = torch.randn(shape, generator=generator).to(getattr(torch, spec.dtype))
    return values


def _check(part: str, engine: EngineDir, chain: Chain) -> dict[str, Any]:
    """The whole language model from its files -> the chain's record."""
    import onnx

    started = time.monotonic()
    reader = QuantizedReader(engine)

    def graph(name: str) -> onnx.ModelProto:
        return onnx.load(engine.language / f"{name}.onnx")

    found = check_chain(part, chain, graph, PackedLayers(reader), FloatLayers(reader))
    (engine.language / "chain.json").write_text(chain.to_json(), encoding="utf-8")
    sizes = {"onnx_bytes": 0, "engine_bytes": 0}
    measures = {"agreement": round(found.agreement, 4), "rel_l2": found.rel_l2, "max_abs_diff": found.max_abs}
    return {"name": "chain", **sizes, **measures, "seconds": round(time.monotonic() - started, 3)}


def _digest(engine: EngineDir, limits: Limits) -> str:
    """Of everything that decides the engines of one part."""
    weights = [hashlib.sha256(), hashlib.sha256()]
    for digest, file in zip(weights, (engine.weights, engine.vision_weights), strict=True):
        for block in _blocks(file):
            digest.update(block)
    versions = [__version__, tensorrt_version(), *(version(name) for name in ("torch", "onnx", "onnxscript"))]
    return digest_of(engine.model_config(), limits, versions, *(digest.digest() for digest in weights))


def _blocks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            yield block
