"""The file that `trtvlm bench` writes and `benchmarks/bench-h200.json` is: one GPU, some models, what each of them did.

    {"schema": "trtvlm-bench", "version": 1, "gpu": "NVIDIA H200", "driver": ..., "torch": ..., "nvrtc": ..., "cuda_core": ...,
     "date": "2026-11-21", "command": "trtvlm bench ...", "context": 1024, "lm_head": "int8", "kv_cache": "fp16",
     "copy_gbps": 4300.0,
     "models": {"deepseek-vl2-small": {
         "weights": "random", "date": ..., "command": ...,
         "steps": [{"rows": 1, "ms": {"p50": 0.8, "p95": ..., "p99": ..., "replays": 500}, "bytes": 1576000000,
                    "kernels": {"head": {"us": 53.2, "launches": 1, "bytes": 210000000}, ...}}, ...],
         "speculation": {"draft": ..., "drafted": 4, "accepted": 2.2, "ms": {...}},
         "prefill": [...], "vision": [...],
         "memory": {"parts": {"weights": ...}, "held": ..., "peak": ...},
         "capped_memory": {the same, "cap": ..., "draft": ...},
         "cold_start": {"compiled": {"imports": 9.1, ..., "first token": 20.3}, "from disk": {...}},
         "baselines": [{"name": ..., "ms": {...}, "seconds": ...}, {"name": ..., "failed": ...}]}}}

Sections that were not measured are not there; a file without `kv_cache` is of fp16. Times are milliseconds, a kernel's are
microseconds of one launch; sizes are bytes; a cold start is in seconds since its process began.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trtvlm.model.cache_kind import CACHE_KINDS
from trtvlm.model.errors import UserError

SCHEMA, VERSION = "trtvlm-bench", 1
SAME = ("gpu", "driver", "torch", "nvrtc", "cuda_core", "context", "lm_head", "kv_cache")
"""What must not differ between models in one file."""
_UNSAID = {"kv_cache": "fp16"}
_SPREAD = ("p50", "p95", "p99", "replays")

Record = dict[str, Any]


def read_bench(path: Path) -> Record:
    """Read and check a file. UserError: it is missing, something else, of another version, or a section lacks a part."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        check(raw)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise UserError(
            f"{path} is no result of `trtvlm bench` ({reason}): measure again, or give another file."
        ) from None
    found: Record = raw
    return found


def write_bench(path: Path, record: Record) -> None:
    """Write a checked record, whole or not at all. UserError: it cannot be written there."""
    check(record)
    path = path.expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): give another --output.") from None


def merged(old: Record, new: Record, path: Path) -> Record:
    """Both files' models, the new one's sections going before. UserError: they were not measured on the same."""
    check_same(old, new, path)
    models = {name: dict(entry) for name, entry in old["models"].items()}
    for name, entry in new["models"].items():
        models[name] = models.get(name, {}) | entry
    return new | {"models": models}


def check_same(old: Record, new: Record, path: Path) -> None:
    """UserError unless two runs, of which `path` holds the old one, can stand in one file."""
    for name in SAME:
        mine, other = (record.get(name, _UNSAID.get(name)) for record in (old, new))
        if mine != other:
            raise UserError(
                f"{path} was measured with {name} {mine}, this run with {other}: give another --output, or remove it."
            )


def check(raw: Any) -> None:
    """ValueError, KeyError or TypeError unless `raw` is such a record."""
    if raw["schema"] != SCHEMA or raw["version"] != VERSION:
        raise ValueError(f"it is {raw['schema']} {raw['version']}, not {SCHEMA} {VERSION}")
    for name in ("gpu", "date", "command", "lm_head"):
        if not isinstance(raw[name], str):
            raise TypeError(f"{name} is no text")
    if raw.get("kv_cache", _UNSAID["kv_cache"]) not in CACHE_KINDS:
        raise ValueError(f"kv_cache is {raw['kv_cache']!r}, none of {', '.join(CACHE_KINDS)}")
    _number(raw, "context")
    _number(raw, "copy_gbps")
    for name, entry in raw["models"].items():
        try:
            _check_model(entry)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"in {name}, {type(error).__name__}: {error}") from None


def _check_model(entry: Record) -> None:
    steps = entry.get("steps", [])
    for step in steps:
        _number(step, "rows")
        _number(step, "bytes")
        _spread(step["ms"])
        for kernel in step["kernels"].values():
            _numbers(kernel, ("us", "launches"))
    if len({step["rows"] for step in steps}) != len(steps):
        raise ValueError("two steps have the same rows")
    if "speculation" in entry:
        _numbers(entry["speculation"], ("drafted",))
        _spread(entry["speculation"]["ms"])
    for name in ("memory", "capped_memory"):
        if name in entry:
            _numbers(entry[name], ("held", "peak"))
            _numbers(entry[name]["parts"], entry[name]["parts"])
    for stages in entry.get("cold_start", {}).values():
        _numbers(stages, stages)
        stages["first token"]
    for baseline in entry.get("baselines", []):
        if "failed" not in baseline:
            _spread(baseline["ms"])
        baseline["name"]


def _spread(raw: Record) -> None:
    _numbers(raw, _SPREAD)
    if not 0 < raw["p50"] <= raw["p95"] <= raw["p99"]:
        raise ValueError(f"percentiles out of order: {raw}")


def _numbers(raw: Record, names: Iterable[str]) -> None:
    for name in names:
        _number(raw, name)


def _number(raw: Record, name: str) -> None:
    value = raw[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise TypeError(f"{name} is no number that can be: {value!r}")
