"""The engines of an engine directory: vision, the target's language model, the draft's; exported, checked, compiled."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trtvlm.builder.check_chain import check_chain
from trtvlm.builder.check_onnx import Difference, check_graph
from trtvlm.builder.compile import Profile, Range, check_sm, compile_onnx
from trtvlm.builder.cut import cut
from trtvlm.builder.export import ROWS, VIEWS, VisionEncoder, export_onnx, export_vision, max_views
from trtvlm.model.artifacts import EngineDir
from trtvlm.model.chain import Chain, EngineStep
from trtvlm.model.vlm import DeepseekVL2
from trtvlm.plugins.quantized_checkpoint import QuantizedReader, load_quantized, load_quantized_packed

if TYPE_CHECKING:
    import onnx

Progress = Callable[[str], None]
"""Called with what is being done now, as "target 03_attention1_out_experts1_in (4 of 14)"."""

# Row counts at which a segment is compared: one, an odd one, and one that only the prefill profile has.
_CHECKED_ROWS = (1, 3, 24)
_CHECKED_VIEWS = (1, 3)


@dataclass(frozen=True)
class _Job:
    """One graph to export, check and compile, and the folder its files go to."""

    name: str
    folder: Path
    export: Callable[[], "onnx.ModelProto"]
    module: nn.Module
    batches: Sequence[Mapping[str, Tensor]]
    profiles: Sequence[Profile]


def build_engines(
    engine_dir: Path, *, sm: int, max_seq_len: int, max_width: int, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Build every engine of a finished quantized directory and of its `draft/`, checking each graph on the way.

    Writes vision/vision.{onnx,engine}, language/*.{onnx,engine} and language/chain.json. Engines are for compute
    capability `sm` (86 means 8.6) and take up to `max_width` tokens in a decode pass and `max_seq_len` in a prefill.

    Returns a record a graph: part ("target" or "draft"), name, onnx_bytes, engine_bytes, seconds (export, check and
    compile), rel_l2 and max_abs_diff against the float32 module; and one a part named "chain" with the whole language
    model's, and `agreement`, the share of rows whose best token is the float32 model's. Raises UserError for an `sm`
    that cannot be built for, and GraphError naming the graph that went wrong.
    """
    check_sm(sm)
    target = EngineDir(Path(engine_dir))
    parts = {"target": target} | ({"draft": target.draft} if target.draft else {})
    records: list[dict[str, Any]] = []
    for part, engine in parts.items():
        records += _build_part(part, engine, sm, max_seq_len, max_width, progress or (lambda what: None))
    return records


def _build_part(
    part: str, engine: EngineDir, sm: int, max_seq_len: int, max_width: int, progress: Progress
) -> list[dict[str, Any]]:
    progress(f"{part}: reading the quantized model")
    packed = load_quantized_packed(engine.path)
    names = QuantizedReader(engine).layout
    chain, modules = cut(packed.language, names, max_rows=max_seq_len, max_width=max_width)
    steps = list(chain.engines())
    jobs = [
        _vision_job(packed, engine.vision),
        *(_segment_job(chain, step, modules[step.name], engine.language) for step in steps),
    ]
    records, graphs = [], {}
    for number, job in enumerate(jobs, 1):
        progress(f"{part} {job.name} ({number} of {len(jobs)})")
        started = time.monotonic()
        graph, record = _build(job, sm)
        graphs[job.name] = graph
        records.append({"part": part, **record, "seconds": round(time.monotonic() - started, 3)})
    progress(f"{part}: the whole chain against PyTorch")
    started = time.monotonic()
    segments = {step.name: graphs[step.name] for step in steps}
    found = check_chain(part, chain, segments, packed.language, load_quantized(engine.path).language)
    (engine.language / "chain.json").write_text(chain.to_json(), encoding="utf-8")
    record = {"part": part, "name": "chain", "onnx_bytes": 0, "engine_bytes": 0, "agreement": round(found.agreement, 4)}
    measures = {"rel_l2": found.rel_l2, "max_abs_diff": found.max_abs}
    return [*records, {**record, **measures, "seconds": round(time.monotonic() - started, 3)}]


def _build(job: _Job, sm: int) -> tuple["onnx.ModelProto", dict[str, Any]]:
    """Export, check, compile and write one graph -> the graph and its record without part and seconds."""
    graph = job.export()
    difference: Difference = check_graph(job.name, graph, job.module, job.batches)
    serialized = graph.SerializeToString(deterministic=True)
    engine = compile_onnx(job.name, serialized, job.profiles, sm=sm)
    job.folder.mkdir(exist_ok=True)
    (job.folder / f"{job.name}.onnx").write_bytes(serialized)
    (job.folder / f"{job.name}.engine").write_bytes(engine)
    return graph, {
        "name": job.name,
        "onnx_bytes": len(serialized),
        "engine_bytes": len(engine),
        "rel_l2": difference.rel_l2,
        "max_abs_diff": difference.max_abs,
    }


def _vision_job(model: DeepseekVL2, folder: Path) -> _Job:
    config = model.config
    most = max_views(config.candidate_resolutions, config.tile_size)
    generator = torch.Generator().manual_seed(0)
    shape = 3, config.tile_size, config.tile_size
    batches = [
        {"pixels": torch.rand(views, *shape, generator=generator).mul(2).sub(1).half()}
        for views in _CHECKED_VIEWS
        if views <= most
    ]
    profile = {VIEWS: Range(1, min(5, most), most)}
    return _Job("vision", folder, lambda: export_vision(model, most), VisionEncoder(model), batches, [profile])


def _segment_job(chain: Chain, step: EngineStep, module: nn.Module, folder: Path) -> _Job:
    profiles = [chain.profiles["decode"]] + ([chain.profiles["prefill"]] if step.rows == "all" else [])
    most = max(profile[2] for profile in profiles)
    batches = [inputs(chain, step, rows) for rows in _CHECKED_ROWS if rows <= most]
    example = inputs(chain, step, 2)

    def export() -> "onnx.ModelProto":
        return export_onnx(step.name, module, example, list(step.outputs), dynamic=ROWS, largest=most)

    return _Job(step.name, folder, export, module, batches, [{ROWS: Range(*profile)} for profile in profiles])


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
