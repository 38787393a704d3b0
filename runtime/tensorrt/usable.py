"""Whether an engine directory's compiled engines can run here: every reason why not is one sentence, before a load."""

from __future__ import annotations

from typing import Any

import torch

from trtvlm.model.artifacts import EngineDir
from trtvlm.model.chain import Chain
from trtvlm.model.errors import UserError
from trtvlm.runtime.lane import PREFILL_CHUNK
from trtvlm.runtime.tensorrt.buffers import plan_buffers
from trtvlm.runtime.tensorrt.executor import read_chain
from trtvlm.runtime.tensorrt.installed import MODULES, ONE_ENGINE, tensorrt

# CUDA's own context, TensorRT's, and what the segments' contexts keep for themselves.
RESERVE = 1 << 30


def check_usable(engine: EngineDir, device: str) -> None:
    """UserError unless the engines of this directory (and of its draft) are for this device, TensorRT and memory."""
    config = engine.config()
    parts = [engine] + ([engine.draft] if engine.draft is not None else [])
    for part in parts:
        read_chain(part)
    flavour = str(config["build_config"].get("flavour", "tensorrt-rtx"))
    module = tensorrt(flavour)
    check_device(engine, int(config["build_config"]["sm"]), device)
    check_version(engine, flavour, str(module.__version__))
    check_memory(engine, sum(needed_bytes(part) for part in parts), device)


def check_device(engine: EngineDir, sm: int, device: str) -> None:
    """The engines run on one compute capability: `sm` 86 is 8.6."""
    if not device.startswith("cuda"):
        raise UserError(f"TensorRT runs on a GPU, not on '{device}': give --device cuda, or --executor torch.")
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != divmod(sm, 10):
        raise UserError(
            f"The engines in {engine.path} are for compute capability {sm // 10}.{sm % 10}, but {device} "
            f"({torch.cuda.get_device_name(device)}) has {major}.{minor}: build them with --sm {major}{minor}."
        )


def check_version(engine: EngineDir, flavour: str, installed: str) -> None:
    """An engine is loaded by the TensorRT version that built it."""
    built = str(engine.report().get("versions", {}).get(flavour, "an unknown version"))
    if built != installed:
        raise UserError(
            f"The engines in {engine.path} were built with {flavour} {built}, but {installed} is installed: build them "
            f"again, or pip install {MODULES[flavour].replace('_', '-')}=={built}."
        )


def check_memory(engine: EngineDir, needed: int, device: str) -> None:
    """There is as much free memory as the engines, the operators' weights, the cache and the buffers take."""
    free, _ = torch.cuda.mem_get_info(device)
    if needed + RESERVE > free:
        raise UserError(
            f"{engine.path} needs about {(needed + RESERVE) / 1e9:.1f} GB of GPU memory, but {device} has "
            f"{free / 1e9:.1f} GB free: close what else runs there, or build it with a smaller --max-seq-len."
        )


def needed_bytes(engine: EngineDir) -> int:
    """Bytes one part of a directory takes on the device: engines, the operators' own weights, cache and buffers."""
    chain = read_chain(engine)
    whole = engine.config()["build_config"].get("flavour") == ONE_ENGINE
    language = [engine.engine] if whole else [engine.language / f"{step.name}.engine" for step in chain.engines()]
    files = [engine.vision / "vision.engine", *language]
    try:
        engines = sum(path.stat().st_size for path in files)
    except OSError as error:
        raise UserError(f"{error.filename} is missing: build the engine directory again.") from None
    positions = int(engine.config()["build_config"]["max_seq_len"])
    buffers = plan_buffers(chain, PREFILL_CHUNK, chain.profiles["decode"][2]).nbytes
    # An engine with plugins has their weights inside, but for the embedding.
    names = [name for step in chain.steps if step.kind == "operator" for name in step.weights.values()]
    beside = tensor_bytes(engine, ["transformer.vocab_embedding.weight"] if whole else names)
    return engines + beside + cache_bytes(engine, chain, positions) + buffers


def tensor_bytes(engine: EngineDir, names: list[str]) -> int:
    """Bytes of tensors of rank0.safetensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(engine.weights), framework="pt") as file:
            return sum(_bytes(file.get_slice(name)) for name in names)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{engine.weights} is not whole ({error}): build the engine again.") from None


def cache_bytes(engine: EngineDir, chain: Chain, positions: int) -> int:
    """Bytes of all layers' caches."""
    total = 0
    for spec in chain.cache.values():
        count = 1
        for size in spec.shape:
            count *= positions if size == "max_seq_len" else int(size)
        total += count * getattr(torch, spec.dtype).itemsize
    return total * engine.model_config().language.num_hidden_layers


_SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "I32": 4, "I64": 8}


def _bytes(part: Any) -> int:
    count = _SIZES[part.get_dtype()]
    for size in part.get_shape():
        count *= size
    return int(count)
