"""Measured decode steps out of a file that `trtvlm bench` wrote (`trtvlm.model.bench_file`): what is planned with.

Steps are INT4. `copy_gbps` counts bytes read and written by a large device copy; with it and a kernel's `bytes` (of one
launch), the kernel has a share of the bandwidth.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtvlm.model.cache_kind import CacheKind
from trtvlm.model.errors import UserError

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
"""Where a checkout keeps its results; an installed package has none."""
BENCH_H200 = BENCHMARKS / "bench-h200.json"
LOSSLESS = BENCHMARKS / "lossless-int4.json"


@dataclass(frozen=True)
class Operator:
    """One kind of launch in a step: microseconds and, where known, bytes of one, and how often the step launches it."""

    name: str
    us: float
    launches: int
    bytes: int | None = None

    def share(self, copy_gbps: float) -> float | None:
        """The share of the measured copy bandwidth at which it moves its bytes, where they are known."""
        return None if self.bytes is None else self.bytes / (self.us * 1e3 * copy_gbps)


@dataclass(frozen=True)
class StepTime:
    """One decode step of `rows` rows: milliseconds of the whole, and its kernels."""

    rows: int
    ms: float
    operators: tuple[Operator, ...]

    @property
    def launches(self) -> int:
        """Kernels in the step."""
        return sum(operator.launches for operator in self.operators)


@dataclass(frozen=True)
class BenchResults:
    """What one GPU did, at `context` cached positions: by model, a step of each number of rows, fewest first."""

    gpu: str
    date: str
    command: str
    context: int
    lm_head: str
    steps: dict[str, tuple[StepTime, ...]]
    copy_gbps: float | None = None
    kv_cache: CacheKind = "fp16"

    @classmethod
    def read(cls, path: Path) -> BenchResults:
        """Read the file. UserError: it does not hold such measurements."""
        try:
            return cls._parse(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            raise UserError(
                f"{path} does not hold decode measurements ({reason}): measure with `trtvlm bench`, or remove it."
            ) from None

    @classmethod
    def _parse(cls, raw: dict[str, Any]) -> BenchResults:
        steps = {}
        for model, entry in raw["models"].items():
            found = [_step(model, step) for step in entry.get("steps", [])]
            if len({step.rows for step in found}) != len(found):
                raise ValueError(f"{model} has two steps of the same rows")
            steps[model] = tuple(sorted(found, key=lambda step: step.rows))
        copy = raw.get("copy_gbps")
        return cls(
            str(raw["gpu"]),
            str(raw.get("date", "")),
            str(raw.get("command", "")),
            int(raw["context"]),
            str(raw["lm_head"]),
            {model: found for model, found in steps.items() if found},
            None if copy is None else float(copy),
            "int8" if raw.get("kv_cache") == "int8" else "fp16",
        )


def default_results() -> Path | None:
    """The project's own measurements, where they are."""
    return BENCH_H200 if BENCH_H200.is_file() else None


def bundled_acceptance() -> float | None:
    """Drafted tokens that the bundled pair's target accepts a step, as last measured; None where there is no result."""
    try:
        raw = json.loads(LOSSLESS.read_text(encoding="utf-8"))
        return float(raw["accepted"] / raw["steps"])
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return None


def _step(model: str, raw: dict[str, Any]) -> StepTime:
    operators = tuple(
        Operator(name, float(kernel["us"]), int(kernel["launches"]), kernel.get("bytes"))
        for name, kernel in raw["kernels"].items()
    )
    step = StepTime(int(raw["rows"]), float(raw["ms"]["p50"]), operators)
    if step.rows < 1 or step.ms <= 0 or not all(each.us > 0 and each.launches > 0 for each in operators):
        raise ValueError(f"a step of {model} has no rows or no time")
    return step
