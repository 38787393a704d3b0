"""From the start of a process to its first token: run as a process of its own, whose last line is what it measured.

    python -m trtvlm.runtime.cuda.measure_start random deepseek-vl2-small fp16 1763700000.0

Weights of a named size are made on the GPU, so their stage is no loading; an engine directory is opened as it is.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time

from trtvlm.model.cache_kind import CacheKind
from trtvlm.model.errors import UserError
from trtvlm.runtime.cuda.child import lines_of

MODULE = "trtvlm.runtime.cuda.measure_start"
TIMEOUT = 300
PROMPT = 16


def measure_start(kind: str, name: str, kv_cache: CacheKind = "fp16") -> dict[str, dict[str, float]]:
    """Seconds after the process began at which each stage was done, with kernels compiled, then with them on disk.

    kind: "random" with a size, or "engine" with a directory. kv_cache: how latents are cached. UserError with the process's last
    words if it failed.
    """
    with tempfile.TemporaryDirectory(prefix="trtvlm-kernels-") as cache:
        return {how: _run(kind, name, kv_cache, {"TRTVLM_CACHE": cache}) for how in ("compiled", "from disk")}


def _run(kind: str, name: str, kv_cache: CacheKind, environment: dict[str, str]) -> dict[str, float]:
    found, reason = lines_of(MODULE, [kind, name, kv_cache, repr(time.time())], TIMEOUT, environment)
    if reason is not None or not found:
        raise UserError(f"The process that measures the cold start failed: {reason or 'it printed nothing'}.")
    stages: dict[str, float] = found[-1]
    return stages


class _Stages:
    def __init__(self, began: float) -> None:
        self.began, self.seconds = began, dict[str, float]()

    def done(self, name: str) -> None:
        self.seconds[name] = round(time.time() - self.began, 3)


def _random(name: str, kv_cache: CacheKind, stages: _Stages) -> None:
    import torch

    from trtvlm.model.sizes import language_size
    from trtvlm.plugins.random_checkpoint import RandomCheckpoint
    from trtvlm.runtime.cuda.measured_model import MeasuredModel
    from trtvlm.runtime.cuda.weights import load_weights

    config = language_size(name)
    stages.done("imports")
    torch.zeros(1, device="cuda")
    stages.done("CUDA")
    model = MeasuredModel.over(load_weights(RandomCheckpoint(config)), rows=1, kv_cache=kv_cache)
    torch.cuda.synchronize()
    stages.done("weights")
    tokens, cursor = (torch.zeros(1, dtype=torch.int32, device="cuda") for _ in range(2))
    model.program.launch(tokens, cursor, 1, 64)
    model.program.found[1][0].cpu()
    stages.done("first token")


def _engine(name: str, kv_cache: CacheKind, stages: _Stages) -> None:
    import torch

    from trtvlm.runtime.engine import open_engine

    stages.done("imports")
    torch.zeros(1, device="cuda")
    stages.done("CUDA")
    engine = open_engine(name, "cuda", kv_cache=kv_cache)
    torch.cuda.synchronize()
    stages.done("weights")
    target = engine.target
    logits = target.prefill(target.embed(torch.arange(PROMPT)))
    int(logits.argmax())
    stages.done("first token")


def main(kind: str, name: str, kv_cache: CacheKind, began: str) -> None:
    """Measure, and print the stages as JSON."""
    stages = _Stages(float(began))
    {"random": _random, "engine": _engine}[kind](name, kv_cache, stages)
    print(json.dumps(stages.seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]
