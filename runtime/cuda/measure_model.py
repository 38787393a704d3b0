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
    from trtvlm.model.cache_kind import CacheKind
    from trtvlm.model.config import ModelConfig
    from trtvlm.plugins.quantized_checkpoint import Kind, QuantizedWeights
    from trtvlm.runtime.cuda.weights import LanguageWeights

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

    def checkpoint(self, lm_head: str) -> QuantizedWeights:
        """Where its weights come from; lm_head is how random ones store the head."""
        if self.kind == "random":
            return RandomCheckpoint(self.config().language, "int4", lm_head)  # type: ignore[arg-type]
        engine = EngineDir(Path(self.source))
        return QuantizedReader(engine)


@dataclass(frozen=True)
class Wanted:
    """What to measure (decode, speculation, prefill, vision), and how.

    accepted: drafted tokens kept a step, that tokens a second are given for. kv_cache: how latents are cached.
    """

    parts: Sequence[str]
    widths: Sequence[int]
    bench: Bench
    drafted: int
    accepted: float
    lm_head: str
    kv_cache: CacheKind = "fp16"


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
    say(f"weights of {target.name}")
    checkpoint = target.checkpoint(wanted.lm_head)
    with ledger.part("weights"):
        weights = load_weights(checkpoint)
    if {"decode", "speculation"} & set(wanted.parts):
        entry |= _steps(weights, checkpoint.lm_head, draft, wanted, ledger, say)
        entry["memory"] = ledger.to_dict()
    gc.collect()  # what steps held, their graphs among it
    ledger.device.release()
    entry |= _before_decoding(weights, target.config(), wanted, say)
    return entry, copy


def _steps(
    weights: LanguageWeights, lm_head: Kind, draft: Subject | None, wanted: Wanted, ledger: Ledger, say: Say
) -> Record:
    """Decode steps of every width, and whole speculative steps."""
    entry: Record = {}
    rows_at_most, config = max(*wanted.widths, wanted.drafted + 1), weights.config
    with ledger.part("cache and step buffers"):
        model = MeasuredModel.over(weights, rows_at_most, kv_cache=wanted.kv_cache)
    kept = []
    if "decode" in wanted.parts:
        entry["steps"] = []
        for rows in wanted.widths:
            say(f"steps of width {rows}")
            step = Step(model.program, rows, wanted.bench.span(rows), weights.embedding.device)
            with ledger.part("graphs and kernels"):
                spread, replay = measure_step(step, step.state, config.vocab_size, rows, wanted.bench)
            kept.append(replay)  # or its graph would be gone, and its memory with it
            bytes_of = kernel_bytes(config, lm_head, rows, wanted.bench.context, wanted.kv_cache)
            states = wanted.bench.states(config.vocab_size, rows, step.state.device)
            entry["steps"].append({
                "rows": rows, "ms": spread.to_dict(), "bytes": round(sum(bytes_of.values())),
                # A profiler that does not look into graphs sees the launches themselves.
                "kernels": measure_operators(replay, step.state, states, bytes_of)
                or measure_operators(step, step.state, states, bytes_of),
            })  # fmt: skip
    if draft is not None and "speculation" in wanted.parts:
        say(f"weights of {draft.name}")
        with ledger.part("weights of the draft"):
            others = load_weights(draft.checkpoint(wanted.lm_head))
        with ledger.part("cache and step buffers of the draft"):
            other = MeasuredModel.over(others, rows_at_most, kv_cache=wanted.kv_cache)
        say(f"speculative steps of {wanted.drafted} drafted tokens")
        with ledger.part("graphs and kernels"):
            speculation = Speculation(model.program, other.program)
            found, replay = measure_speculation(speculation, wanted.drafted, wanted.bench)
        kept.append(replay)
        entry["speculation"] = {"draft": draft.name, "accepted": wanted.accepted} | found
    return entry


def _before_decoding(weights: LanguageWeights, config: ModelConfig, wanted: Wanted, say: Say) -> Record:
    """Prompts, and images through a tower of random weights."""
    entry: Record = {}
    parts = wanted.parts
    if {"prefill", "vision"} & set(parts):
        from trtvlm.runtime.cuda.measure_prefill import measure_prefill, measure_vision

        if "prefill" in parts:
            say("prompts")
            most = config.language.max_position_embeddings
            lengths = [length for length in LENGTHS if length <= most]
            entry["prefill"] = measure_prefill(config.language, lengths, weights, kv_cache=wanted.kv_cache)
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
