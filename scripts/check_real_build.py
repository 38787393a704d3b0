"""Build a model of an official size from random weights under hard memory limits, and check what the engine computes.

    python -m trtvlm.scripts.check_real_build WORK --size deepseek-vl2-small --out small.json
    python -m trtvlm.scripts.check_real_build WORK --size deepseek-vl2 --on-demand --out base.json

Stages, each in a process of its own and none repeated once done: `make` writes the checkpoint (--on-demand: tensors are made
as they are read), `build` quantizes it on the GPU within --ram and --device-memory, `check` runs the engine on the kernels,
and `modules` on the PyTorch modules, and compares logits with float32 over the same quantized weights, layer by layer.

The limits: the process's memory control group where one can be made, a watcher that ends the process at the first reading
beyond one of them, and the allocator's cap. Run again what --deadline cut off: a build goes on after its last finished layer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trtvlm.model.presets import PRESETS

STAGES = ("make", "build", "check", "modules")
ENDED = "ended by a limit"
# Of the device's memory, for what does not come from PyTorch's allocator once it is in use: libraries' handles and kernels.
LIBRARIES = 700_000_000
GROUP = Path("/sys/fs/cgroup")
ANSWER_TOKENS = 32


class Watcher:
    """Reads this process's memory that no file backs, and the device's in use, 20 times a second; ends it beyond a limit."""

    def __init__(self, ram: float, device_memory: float, device: str) -> None:
        self.ram, self.device_memory, self.device = ram, device_memory, device
        self.peaks = {"anonymous": 0, "device": 0}
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.look()
            time.sleep(0.05)

    def look(self) -> None:
        """One reading."""
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        found = {"anonymous": sum(int(lines.get(key, "0").split()[0]) for key in ("RssAnon", "RssShmem")) * 1024}
        if self.device == "cuda":
            free, total = torch.cuda.mem_get_info()
            found["device"] = total - free
        for what, limit in (("anonymous", self.ram), ("device", self.device_memory)):
            self.peaks[what] = max(self.peaks[what], found.get(what, 0))
            if limit and self.peaks[what] > limit:
                print(f"{ENDED}: {self.peaks[what] / 1e9:.2f} GB {what}, {limit / 1e9:.2f} GB allowed", flush=True)
                os._exit(3)


def own_group(limit: float) -> str:
    """Put this process into a memory control group (of either version) of at most `limit` bytes; says what came of it."""
    name = f"trtvlm-check-{os.getpid()}"
    try:
        if (GROUP / "cgroup.controllers").exists():
            control = GROUP / "cgroup.subtree_control"
            if "memory" not in control.read_text().split():
                control.write_text("+memory")
            group, key = GROUP / name, "memory.max"
        else:
            group, key = GROUP / "memory" / name, "memory.limit_in_bytes"
        group.mkdir()
        (group / key).write_text(str(int(limit)))
        (group / "cgroup.procs").write_text(str(os.getpid()))
        return f"{key} = {(group / key).read_text().strip()}, the page cache counted in"
    except OSError as error:
        return f"not possible here: {error}"


def _remove_groups() -> None:
    """Those that no process is in any more."""
    for parent in (GROUP, GROUP / "memory"):
        for group in parent.glob("trtvlm-check-*"):
            with contextlib.suppress(OSError):
                group.rmdir()


def make(options: argparse.Namespace) -> dict[str, Any]:
    """The checkpoint."""
    from trtvlm.scripts.make_random_checkpoint import size_of, write_random_checkpoint

    config = size_of(options.size, options.layers)
    written = write_random_checkpoint(
        options.work / "checkpoint", config, options.seed, options.on_demand, shard=2_000_000_000
    )
    return {"bytes": written, "on_demand": options.on_demand}


def build(options: argparse.Namespace) -> dict[str, Any]:
    """The engine directory, within the limits."""
    group = own_group(options.ram) if options.group else "not asked for"
    device = options.device
    if device == "cuda":
        torch.cuda.init()
        free, total = torch.cuda.mem_get_info()
        allowed = options.device_memory - (total - free) - LIBRARIES
        torch.cuda.set_per_process_memory_fraction(allowed / total)
    watcher = Watcher(options.ram, options.device_memory if device == "cuda" else 0, device)

    from trtvlm.builder.build import BuildSettings
    from trtvlm.builder.build import build as run
    from trtvlm.builder.trtllm_config import BuildConfig

    settings = BuildSettings(
        calibration_samples=options.samples, verify_samples=options.verify, compile=False, device=device,
        awq=options.awq, build=BuildConfig(engines=False), overwrite=True,
    )  # fmt: skip
    began, marks = time.monotonic(), []

    def progress(part: str, what: str) -> None:
        marks.append((what, time.monotonic()))
        peaks = ", ".join(f"{size / 1e9:.1f} GB {name}" for name, size in watcher.peaks.items())
        print(f"  {time.monotonic() - began:6.1f} s  {part} {what}  (peaks: {peaks})", flush=True)

    report = run(str(options.work / "checkpoint"), options.work / "engine", settings, progress=progress)
    watcher.look()
    ends = [*(at for _, at in marks[1:]), time.monotonic()]
    spans = [end - at for (_, at), end in zip(marks, ends, strict=True)]
    # What a run before had finished is passed over in no time.
    layers = [
        round(span, 3) for (what, _), span in zip(marks, spans, strict=True) if what.startswith("layer") and span > 0.01
    ]
    target = report["parts"]["target"]
    return {
        "limits": {"ram": options.ram, "device_memory": options.device_memory, "control_group": group},
        "peak_anonymous_bytes": watcher.peaks["anonymous"],
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_device_bytes": watcher.peaks["device"],
        "peak_allocated_bytes": torch.cuda.max_memory_reserved() if device == "cuda" else 0,
        "layer_seconds": layers,
        "stage_seconds": {what: round(span, 3) for (what, _), span in zip(marks, spans, strict=True) if "layer" not in what},
        "build_seconds": report["seconds"],
        "awq": report["awq"],
        "bytes": target["bytes"],
        "calibration_tokens": target["calibration_tokens"],
        "experts_never_reached": target["experts_never_reached"]["count"],
        "experts_calibrated_on_all_tokens": sum(map(len, target["experts_calibrated_on_all_tokens"].values())),
        "layer_errors": target["layer_errors"],
        "accuracy": target.get("accuracy"),
    }  # fmt: skip


def check(options: argparse.Namespace) -> dict[str, Any]:
    """The engine as `trtvlm generate` runs it on this device: on a GPU, by the kernels."""
    from trtvlm.runtime.engine import open_engine

    return _compare(options, lambda: open_engine(options.work / "engine", options.device).target)


def modules(options: argparse.Namespace) -> dict[str, Any]:
    """The engine's packed weights in PyTorch's modules, in half precision on a GPU."""
    from trtvlm.plugins.quantized_checkpoint import load_quantized_packed
    from trtvlm.runtime.torch_executor import TorchExecutor

    def load() -> TorchExecutor:
        model = load_quantized_packed(options.work / "engine")
        return TorchExecutor(model.to(options.device) if options.device == "cuda" else model.float(), 4096)

    return _compare(options, load)


@torch.inference_mode()
def _compare(options: argparse.Namespace, load: Callable[[], Any]) -> dict[str, Any]:
    """Logits after a held-out prompt and each of its answer's tokens, against `reference`."""
    from trtvlm.builder.calibrate import bundled_samples
    from trtvlm.builder.verify import answers
    from trtvlm.model.artifacts import EngineDir
    from trtvlm.model.processor import Processor

    folder = EngineDir(options.work / "engine")
    config = folder.model_config()
    processor = Processor.from_pretrained(folder.path, config)
    sample = answers(bundled_samples("heldout", 1), processor)[0]
    inputs, first = sample.inputs, sample.first
    tokens = inputs.input_ids[first : first + ANSWER_TOKENS].tolist()
    began = time.monotonic()
    executor = load()
    loaded = time.monotonic() - began
    embeds = executor.embed(inputs.input_ids[:first]).clone()
    image = executor.encode_image(inputs.images[0])
    embeds[inputs.images_seq_mask[:first].to(embeds.device)] = image.to(embeds.dtype)
    began = time.monotonic()
    rows = [executor.prefill(embeds)[None]]
    prefilled = time.monotonic() - began
    began = time.monotonic()
    for start in range(0, len(tokens), 8):
        rows.append(executor.decode(tokens[start : start + 8]))
    decoded = time.monotonic() - began
    found = torch.cat(rows).to(options.device)
    whole = torch.cat((embeds, executor.embed(torch.tensor(tokens)))).float()
    del executor, rows
    if options.device == "cuda":
        torch.cuda.empty_cache()
    began = time.monotonic()
    expected = reference(folder.path, whole, len(embeds) - 1)
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    wanted, got = expected.log_softmax(-1), found.log_softmax(-1)
    best = expected.topk(2).values
    return {
        "prompt_tokens": len(embeds),
        "rows": len(found),
        "finite": bool(found.isfinite().all()),
        "relative_error": float((found - expected).norm() / expected.norm()),
        "prompt_row_error": float(errors[0]),
        "median_row_error": float(errors.median()),
        "largest_row_error": float(errors.max()),
        "top1": float((found.argmax(-1) == expected.argmax(-1)).float().mean()),
        "median_gap_of_the_best_two": float((best[:, 0] - best[:, 1]).median()),
        "kl": float((wanted.exp() * (wanted - got)).sum(-1).mean()),
        "load_seconds": round(loaded, 2),
        "prefill_seconds": round(prefilled, 3),
        "decode_seconds": round(decoded, 3),
        "reference_seconds": round(time.monotonic() - began, 2),
    }


@torch.inference_mode()
def reference(folder: Path, embeds: Tensor, first: int) -> Tensor:
    """Float32 logits [T - first, vocab] of an engine directory after embeddings [T, hidden], one layer in memory at a time."""
    from trtvlm.builder.verify import load_written, written_head
    from trtvlm.model.artifacts import EngineDir
    from trtvlm.model.language import DecoderLayer
    from trtvlm.model.norm import RMSNorm
    from trtvlm.model.rope import rope_table
    from trtvlm.plugins.quantized_checkpoint import QuantizedReader

    engine, device = EngineDir(folder), embeds.device
    reader = QuantizedReader(engine)
    config = reader.config
    tables = rope_table(config.rope_dim, config.max_position_embeddings, config.rope_theta, device)
    rope = tables[0][: len(embeds)][None], tables[1][: len(embeds)][None]
    x = embeds[None].float()
    for index in range(config.num_hidden_layers):
        with torch.device("meta"):
            layer = DecoderLayer(config, index).eval().requires_grad_(False)
        layer = layer.to_empty(device=device)
        load_written(engine.weights, layer, config, index)
        x = layer(x, rope, None)
        del layer
    norm = RMSNorm(config.hidden_size, config.rms_norm_eps).to(device).requires_grad_(False)
    norm.weight.copy_(reader.get("transformer.ln_f.weight"))
    x = norm(x[0, first:])
    step = 8192
    ends = [min(config.vocab_size, start + step) for start in range(0, config.vocab_size, step)]
    return torch.cat(
        [x @ written_head(engine.weights, end - 1 - (end - 1) % step, end, device).t() for end in ends], -1
    )


def main() -> None:
    """Run as a script: the stages that are left, or, with --stage, one of them in this process."""
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.stage:
        began = time.monotonic()
        found = globals()[options.stage](options)
        found["seconds"] = round(time.monotonic() - began, 2)
        (options.work / f"{options.stage}.json.new").write_text(json.dumps(found))
        (options.work / f"{options.stage}.json.new").replace(options.work / f"{options.stage}.json")
        return
    began, failed = time.monotonic(), ""
    for stage in options.stages.split(","):
        if (options.work / f"{stage}.json").exists():
            print(f"{stage}: done before", flush=True)
            continue
        left = options.deadline - (time.monotonic() - began)
        if left < 5:
            failed = f"{stage}: no time left; run it again"
            break
        print(f"{stage}: starts, {left:.0f} s left", flush=True)
        # Freed blocks go back to the system, and threads share few arenas: what counts is what is used.
        environment = os.environ | {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "1000000"}
        command = [sys.executable, "-u", "-m", "trtvlm.scripts.check_real_build", *sys.argv[1:], "--stage", stage]
        try:
            code = subprocess.run(command, timeout=left, env=environment).returncode
        except subprocess.TimeoutExpired:
            failed = f"{stage}: cut off by the deadline; run it again"
            break
        finally:
            _remove_groups()
        if code:
            failed = f"{stage}: ended with {code}"
            break
        print(f"{stage}: done", flush=True)
    result: dict[str, Any] = {"size": options.size, "layers": options.layers, "failed": failed}
    if torch.cuda.is_available() and options.device == "cuda":
        result["gpu"] = torch.cuda.get_device_name()
    for stage in STAGES:
        if (options.work / f"{stage}.json").exists():
            result[stage] = json.loads((options.work / f"{stage}.json").read_text())
    text = json.dumps(result, indent=1)
    if options.out is not None:
        options.out.write_text(text + "\n")
    print(text, flush=True)
    if not failed and options.clean:
        shutil.rmtree(options.work)
    sys.exit(1 if failed else 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("work", type=Path, help="a folder for the checkpoint, the engine and what is done")
    parser.add_argument("--size", choices=[*PRESETS, "mid"], default="deepseek-vl2-small")
    parser.add_argument("--layers", type=int, help="only the first so many decoder layers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--on-demand", action="store_true", help="no shards: tensors are made as they are read")
    parser.add_argument("--awq", choices=["lite", "clip", "full"], default="full")
    parser.add_argument("--samples", type=int, default=32, help="pages to calibrate on")
    parser.add_argument("--verify", type=int, default=8, help="held-out pages that go through both models")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--ram", type=float, default=12e9, help="bytes of memory the build may take")
    parser.add_argument("--device-memory", type=float, default=10e9, help="bytes of device memory the build may take")
    parser.add_argument("--no-group", dest="group", action="store_false", help="do not try to make a control group")
    parser.add_argument("--deadline", type=float, default=570, help="seconds for all stages")
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="where the figures go, as JSON")
    parser.add_argument("--clean", action="store_true", help="remove the work folder when all is done")
    return parser.parse_args()


if __name__ == "__main__":
    main()
