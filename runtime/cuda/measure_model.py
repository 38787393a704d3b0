"""Everything that `trtvlm bench` measures of one model, section by section, as `trtvlm.model.bench_file` keeps it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trtvlm.model.artifacts import EngineDir
from trtvlm.model.errors import UserError
from trtvlm.model.presets import preset_of, read_config
from trtvlm.plugins.quantized_checkpoint import QuantizedReader
from trtvlm.plugins.random_checkpoint import RandomCheckpoint
from trtvlm.runtime.cuda.measure import copy_gbps
from trtvlm.runtime.cuda.measure_decode import Bench, Step, measure_speculation, measure_step
from trtvlm.runtime.cuda.measure_memory import Ledger
from trtvlm.runtime.cuda.measure_operators import kernel_bytes, measure_operators
from trtvlm.runtime.cuda.measured_model import MeasuredModel
from trtvlm.runtime.cuda.speculation import Speculation
from trtvlm.runtime.cuda.weights import load_weights
from trtvlm.runtime.engine import check_pair

if TYPE_CHECKING:
    from trtvlm.model.config import ModelConfig
    from trtvlm.runtime.cuda.weights import Checkpoint

LENGTHS = (256, 1024, 4096)
TILES = tuple(range(1, 11))

Say = Callable[[str], None]
Record = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A model to measure: "random" with a size's name or a model's, or "engine" with its directory."""

    kind: str
    source: str

    @property
    def name(self) -> str:
        """What it is called in tables and files: an official size keeps its name."""
        return preset_of(self.config().language) or Path(self.source).name

    def config(self) -> ModelConfig:
        """Its configuration. UserError: there is no such model or engine."""
        return read_config(self.source) if self.kind == "random" else EngineDir(Path(self.source)).model_config()

    def checkpoint(self, lm_head: str) -> Checkpoint:
        """Where its weights come from; lm_head is how random ones store the head."""
        if self.kind == "random":
            return RandomCheckpoint(self.config().language, "int4", lm_head)  # type: ignore[arg-type]
        engine = EngineDir(Path(self.source))
        return QuantizedReader(engine)


@dataclass(frozen=True)
class Wanted:
    """What to measure (decode, speculation, prefill, vision), and how.

    accepted: drafted tokens kept a step, that tokens a second are given for.
    """

    parts: Sequence[str]
    widths: Sequence[int]
    bench: Bench
    drafted: int
    accepted: float
    lm_head: str


def measure_model(
    target: Subject, draft: Subject | None, wanted: Wanted, before: int, say: Say
) -> tuple[Record, float]:
    """The sections of one model, and the bandwidth of a copy, measured right before. `before`: bytes in use until now.

    UserError: a draft that does not fit, or a model that the kernels do not run.
    """
    if draft is not None:
        check_pair(target.config(), draft.config())
    entry: Record = {"weights": "random" if target.kind == "random" else "engine"}
    torch.zeros(1, device="cuda")  # makes CUDA's context
    ledger = Ledger(before)
    say("bandwidth of a copy")
    copy = copy_gbps()
    ledger.device.release()
    torch.cuda.reset_peak_memory_stats()
    if {"decode", "speculation"} & set(wanted.parts):
        entry |= _steps(target, draft, wanted, ledger, say)
        entry["memory"] = ledger.to_dict()
    gc.collect()
    ledger.device.release()
    entry |= _before_decoding(target.config(), wanted.parts, say)
    return entry, copy


def _steps(target: Subject, draft: Subject | None, wanted: Wanted, ledger: Ledger, say: Say) -> Record:
    """Decode steps of every width, and whole speculative steps."""
    entry: Record = {}
    model = _load(target, wanted, ledger, "", say)
    config = model.weights.config
    kept = []
    if "decode" in wanted.parts:
        entry["steps"] = []
        for rows in wanted.widths:
            say(f"steps of {rows} rows")
            step = Step(model.program, rows, wanted.bench.span(rows), model.weights.embedding.device)
            with ledger.part("graphs and kernels"):
                spread, replay = measure_step(step, step.state, config.vocab_size, rows, wanted.bench)
            kept.append(replay)  # or its graph would be gone, and its memory with it
            bytes_of = kernel_bytes(config, model.lm_head, rows, wanted.bench.context)  # type: ignore[arg-type]
            states = wanted.bench.states(config.vocab_size, rows, step.state.device)
            entry["steps"].append({
                "rows": rows, "ms": spread.to_dict(), "bytes": round(sum(bytes_of.values())),
                # A profiler that does not look into graphs sees the launches themselves.
                "kernels": measure_operators(replay, step.state, states, bytes_of)
                or measure_operators(step, step.state, states, bytes_of),
            })  # fmt: skip
    if draft is not None and "speculation" in wanted.parts:
        other = _load(draft, wanted, ledger, " of the draft", say)
        say(f"speculative steps of {wanted.drafted} drafted tokens")
        with ledger.part("graphs and kernels"):
            speculation = Speculation(model.program, other.program)
            found, replay = measure_speculation(speculation, wanted.drafted, wanted.bench)
        kept.append(replay)
        entry["speculation"] = {"draft": draft.name, "accepted": wanted.accepted} | found
    return entry


def _load(subject: Subject, wanted: Wanted, ledger: Ledger, whose: str, say: Say) -> MeasuredModel:
    say(f"weights of {subject.name}")
    checkpoint = subject.checkpoint(wanted.lm_head)
    with ledger.part(f"weights{whose}"):
        weights = load_weights(checkpoint)
    rows = max(*wanted.widths, wanted.drafted + 1)
    with ledger.part(f"cache and step buffers{whose}"):
        return MeasuredModel.over(weights, checkpoint.lm_head, rows)


def _before_decoding(config: ModelConfig, parts: Sequence[str], say: Say) -> Record:
    """Prompts and images; both bring weights of their own."""
    entry: Record = {}
    if {"prefill", "vision"} & set(parts):
        from trtvlm.runtime.cuda.measure_prefill import (  # type: ignore[import-not-found, unused-ignore]
            measure_prefill,
            measure_vision,
        )

        if "prefill" in parts:
            say("prompts")
            most = config.language.max_position_embeddings
            entry["prefill"] = measure_prefill(config.language, [length for length in LENGTHS if length <= most])
        if "vision" in parts:
            say("images")
            entry["vision"] = measure_vision(config.vision, config.projector, list(TILES))
    return entry


def check_widths(widths: Sequence[int], drafted: int, context: int) -> None:
    """UserError: steps that the kernels or the cache do not take."""
    from trtvlm.runtime.cuda.measured_model import POSITIONS

    if any(not 1 <= rows <= 16 for rows in (*widths, drafted + 1)):
        raise UserError("The kernels take steps of 1 to 16 rows: give such widths, and at most 15 drafted tokens.")
    if context + 64 > POSITIONS:
        raise UserError(
            f"A context of {context} leaves no room in a cache of {POSITIONS} positions: give a shorter one."
        )
