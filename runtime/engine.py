"""What a session runs on: a target, perhaps a draft, and the processor of both."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trtvlm.model.artifacts import EngineDir
from trtvlm.model.cache_kind import check_cache_kind
from trtvlm.model.checkpoint import bundled_draft, load_model, resolve_model
from trtvlm.model.errors import UserError
from trtvlm.model.presets import read_config
from trtvlm.model.processor import Processor
from trtvlm.plugins.quantized_checkpoint import ALGORITHMS, load_quantized
from trtvlm.plugins.replace import for_cpu
from trtvlm.runtime.torch_executor import TorchExecutor

if TYPE_CHECKING:
    from collections.abc import Callable

    from trtvlm.model.cache_kind import CacheKind
    from trtvlm.model.config import ModelConfig
    from trtvlm.model.vlm import DeepseekVL2
    from trtvlm.runtime.executor import Executor
    from trtvlm.runtime.tensorrt.segment import Backend

# The compute capability that the kernels of trtvlm.runtime.cuda are written for.
OLDEST = (8, 0)
# A longer context than this must be asked for: the cache is allocated whole.
DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class Engine:
    """A target executor, its draft if there is one, and the processor they share. `load_ms`: what opening took."""

    name: str
    target: Executor
    draft: Executor | None
    processor: Processor
    load_ms: float


def open_engine(
    folder: str | Path,
    device: str = "cpu",
    executor: str = "auto",
    warn: Callable[[str], None] = lambda sentence: None,
    kv_cache: CacheKind = "fp16",
) -> Engine:
    """Run an engine directory, and the draft inside it, with one of `trtvlm.runtime.executor.EXECUTORS`.

    Where its TensorRT engines cannot run, torch takes their place, and `warn` gets the sentence that says why. kv_cache: how
    latents are cached, by the models that have them. UserError: no engine directory, a damaged one, no such device, or a
    cache that none of it has.
    """
    started = time.perf_counter()
    check_device(device)
    engine = EngineDir(Path(folder).expanduser())
    engine.config()
    parts = [part for part in (engine, engine.draft) if part is not None]
    check_cache_kind(kv_cache, ((str(part.path), part.model_config().language) for part in parts))
    if kv_cache == "int8" and executor not in ("auto", "torch"):
        raise UserError(f"--executor {executor} caches latents in 16 bits: leave --kv-cache int8 out, or --executor.")
    if executor == "tensorrt":
        try:
            target, draft = _load_chains(engine, device)
        except UserError as error:
            warn(f"{error} Running it with --executor torch instead.")
            executor = "torch"
    elif executor == "onnxruntime":
        target, draft = _load_graphs(engine)
    if executor in ("auto", "torch"):
        target = _load_engine(engine, device, kv_cache)
        draft = _load_engine(engine.draft, device, kv_cache) if engine.draft is not None else None
    processor = Processor.from_pretrained(engine.path, engine.model_config())
    return _pair(engine.path.resolve().name, target, draft, processor, started)


def open_model(
    model: str,
    draft: str | None = None,
    device: str = "cpu",
    max_length: int | None = None,
    kv_cache: CacheKind = "fp16",
) -> Engine:
    """Run a checkpoint (a bundled name, a folder or a hub name) directly, without an engine directory.

    draft: likewise; by default the one that a bundled target comes with. max_length: positions of the cache; by default
    the model's context, at most DEFAULT_CONTEXT. kv_cache: as `open_engine`. UserError: no such model or device, a draft that
    does not fit, or a cache that neither has.
    """
    started = time.perf_counter()
    check_device(device)
    draft = draft or bundled_draft(model)
    check_cache_kind(kv_cache, ((name, read_config(name).language) for name in (model, draft) if name))
    target = _load_model(model, device, max_length, kv_cache)
    drafter = _load_model(draft, device, max_length, kv_cache) if draft else None
    return _pair(model, target, drafter, Processor.from_pretrained(resolve_model(model)), started)


def _pair(name: str, target: Executor, draft: Executor | None, processor: Processor, started: float) -> Engine:
    if draft is not None:
        check_pair(target.config, draft.config)
    return Engine(name, target, draft, processor, 1e3 * (time.perf_counter() - started))


def _load_engine(engine: EngineDir, device: str, kv_cache: CacheKind) -> Executor:
    config = engine.config()
    limit = int(config["build_config"]["max_seq_len"])
    if (
        device.startswith("cuda")
        and config["pretrained_config"]["quantization"]["quant_algo"] == ALGORITHMS["int4_awq"]
    ):
        from trtvlm.runtime.cuda.executor import CudaExecutor

        return CudaExecutor(engine.path, device, limit, kv_cache)
    return _executor(load_quantized(engine.path), device, limit, kv_cache)


def _load_chains(engine: EngineDir, device: str) -> tuple[Executor, Executor | None]:
    """Target and draft on TensorRT; UserError, before anything is loaded, when their engines cannot run here."""
    from trtvlm.runtime.tensorrt.tensorrt_segment import TensorRTBackend
    from trtvlm.runtime.tensorrt.usable import check_usable

    check_usable(engine, device)
    return _chains(engine, TensorRTBackend(engine.config()["build_config"]["flavour"], device))


def _load_graphs(engine: EngineDir) -> tuple[Executor, Executor | None]:
    """Target and draft on onnxruntime."""
    from trtvlm.runtime.tensorrt.onnx_segment import OnnxBackend

    return _chains(engine, OnnxBackend())


def _chains(engine: EngineDir, backend: Backend) -> tuple[Executor, Executor | None]:
    from trtvlm.runtime.tensorrt.executor import ChainExecutor

    target, *draft = (
        ChainExecutor(part, backend, int(part.config()["build_config"]["max_seq_len"]))
        for part in (engine, engine.draft)
        if part is not None
    )
    return target, draft[0] if draft else None


def _load_model(model: str, device: str, max_length: int | None, kv_cache: CacheKind) -> Executor:
    return _executor(load_model(model), device, max_length or DEFAULT_CONTEXT, kv_cache)


def _executor(model: DeepseekVL2, device: str, max_length: int, kv_cache: CacheKind) -> Executor:
    limit = min(max_length, model.config.language.max_position_embeddings)
    return TorchExecutor(for_cpu(model) if device == "cpu" else model.to(device), limit, kv_cache)


def check_device(device: str) -> None:
    """UserError unless PyTorch can put a tensor there."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"PyTorch cannot use the device '{device}' ({reason}): try cpu, or another one.") from None


def check_pair(target: ModelConfig, draft: ModelConfig) -> None:
    """UserError unless the two read the very same prompt: the same tokens, and the same tokens for an image."""
    for what, mine, theirs in (
        ("vocabulary size", target.language.vocab_size, draft.language.vocab_size),
        ("tile size", target.tile_size, draft.tile_size),
        ("number of tokens along a view", target.view_tokens_side, draft.view_tokens_side),
        ("list of candidate resolutions", target.candidate_resolutions, draft.candidate_resolutions),
    ):
        if mine != theirs:
            raise UserError(
                f"The draft does not fit the target: its {what} is {theirs}, the target's {mine}; "
                "use a draft that was made for this target."
            )
