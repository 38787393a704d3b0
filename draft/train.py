"""Training of a draft, whole: open what is needed, go through segments, measure, package.

A run is cut into *segments*: stretches of steps within one stage of the curriculum, each with its own stream of
batches, numbered from 0. The state is saved between segments only, so nothing of a stream has to be saved: a run that
was stopped draws the segment it was in again, from its beginning, and ends as if nothing had happened.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import set_seed  # type: ignore[import-untyped]
from torch import Tensor, nn

from trtvlm.draft.acceptance import expected_tokens, replay
from trtvlm.draft.answers import Answered, AnswerSettings, RememberedAnswers, answer
from trtvlm.draft.data import Source, open_source
from trtvlm.draft.distil import Student, feature_error, forward_kl
from trtvlm.draft.measure import measure
from trtvlm.draft.package import LOG, package
from trtvlm.draft.shrink import read_overrides, scratch_draft, shrunk_config
from trtvlm.draft.state import TrainingState
from trtvlm.model.checkpoint import load_model, resolve_model
from trtvlm.model.config import ModelConfig
from trtvlm.model.errors import UserError
from trtvlm.model.language import DecoderLayer
from trtvlm.model.pages.batches import PageBatch
from trtvlm.model.pair import check_pair
from trtvlm.model.vlm import DeepseekVL2

SCRATCH = "scratch"


@dataclass(frozen=True)
class TrainSettings:
    """How a draft is trained; the command line's options, and their defaults.

    steps or minutes: how long (one of them). batch_tokens: image and text tokens of a batch, which set its rows.
    lr: peak learning rate; None takes 1.5e-3 from scratch and 2e-4 for a trained draft. temperature: 0 for the
    target's greedy answers. pool, replay: answers are made for `pool` batches at a time and each of those is trained on
    `replay` times. align: weight of the image features' error. balance: weight of the routers' load balance.
    draft_tokens: K of the acceptance shown. held_out: records kept for measuring, at most. save_every: steps.
    precision: "float32", "bf16" or "auto" (bf16 on a GPU). workers: processes that prepare batches; None: one a core
    less one, at most 15.
    """

    steps: int | None = None
    minutes: float | None = None
    batch_tokens: int = 100_000
    lr: float | None = None
    seed: int = 0
    temperature: float = 0.0
    max_answer_tokens: int = 512
    pool: int = 8
    replay: int = 2
    align: float = 1.0
    balance: float = 0.01
    draft_tokens: int = 4
    held_out: int = 64
    log_every: int = 50
    save_every: int = 1000
    precision: str = "auto"
    device: str = "auto"
    workers: int | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        """Refuse what makes no training."""
        if (self.steps is None) == (self.minutes is None):
            raise UserError("Say how long to train: either --steps N or --minutes M.")
        if (self.steps or 1) < 1 or (self.minutes or 1.0) <= 0:
            raise UserError("A training takes at least one step, or some part of a minute.")

    @property
    def fixed(self) -> dict[str, Any]:
        """What a resumed run must have the same."""
        free = {"log_every", "save_every", "device", "workers", "compile"}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in free}


Report = Callable[[dict[str, Any]], None]


def train(
    target: str,
    draft: str,
    data: str,
    output: Path,
    settings: TrainSettings,
    *,
    sizes: str | None = None,
    prompt: str | None = None,
    resume: bool = False,
    report: Report = lambda row: None,
) -> dict[str, Any]:
    """Distil `draft` (a model, or "scratch") from `target` on its own answers to `data`, and write it to `output`.

    sizes: a JSON file with the sizes of a scratch draft. prompt: what is asked of images that come without a prompt.
    report: gets every row of the training log; the last one, the measurement on held-out records, is returned.

    Raises UserError for models that do not fit together, unusable data, an output that exists, and what
    `TrainingState.begin` refuses.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists already: give another --output, or delete it.")
    target_folder = resolve_model(target)
    draft_folder = None if draft == SCRATCH else resolve_model(draft)
    if draft_folder is not None:
        if sizes is not None:
            raise UserError("--config gives the sizes of a draft from scratch; a draft named by --draft has its own.")
        check_pair(target_folder, draft_folder)
    config = ModelConfig.from_pretrained(target_folder)
    small = shrunk_config(config, read_overrides(sizes) if sizes else None)
    inputs = {"target": _digest(target_folder), "draft": _digest(draft_folder) if draft_folder else small.to_dict()}
    state = TrainingState(output)
    named = settings.fixed | {"data": data, "prompt": prompt} | inputs
    progress = state.begin(resume, named)

    accelerator = _accelerator(settings)
    set_seed(settings.seed)
    source = open_source(
        data, target_folder, settings.batch_tokens, settings.seed, _workers(settings), settings.held_out, prompt,
        from_scratch=draft_folder is None,
    )  # fmt: skip
    learner = load_model(draft_folder) if draft_folder else scratch_draft(small, settings.seed)
    run = Training(
        accelerator,
        settings,
        source,
        load_model(target_folder, _target_dtype(config, accelerator), accelerator.device),
        learner.requires_grad_(True),
        from_scratch=draft_folder is None,
        named=named,
        state=state,
        report=report,
    )
    if progress is not None:
        run.load(progress)
    run.go()
    result = run.measure(target_folder)
    package(run.student_draft, draft_folder or target_folder, [*run.log, result], output)
    state.remove()
    return result


class Training:
    """The loop and what it holds: models, optimizer, position, log."""

    def __init__(
        self,
        accelerator: Accelerator,
        settings: TrainSettings,
        source: Source,
        target: DeepseekVL2,
        draft: DeepseekVL2,
        *,
        from_scratch: bool,
        named: dict[str, Any],
        state: TrainingState,
        report: Report,
    ) -> None:
        self.accelerator, self.settings, self.source, self.state = accelerator, settings, source, state
        self.target, self.named, self.report = target, named, report
        self.peak = settings.lr if settings.lr is not None else (1.5e-3 if from_scratch else 2e-4)
        if settings.compile:
            for model in (target, draft):
                _compile(model)
        self.student: nn.Module
        student = Student(draft, target)
        self.student, self.optimizer = accelerator.prepare(
            student, _optimizer(student, self.peak, fused=accelerator.device.type == "cuda")
        )
        self.remembered = RememberedAnswers() if source.keyed else None
        self.answering = AnswerSettings(
            settings.temperature, settings.max_answer_tokens, enough=1.0 if source.keyed else 0.5
        )
        self.step, self.segment, self.drawn, self.spent = 0, 0, 0, 0.0
        self.started: float | None = None
        self.log: list[dict[str, Any]] = []
        self.meter = Meter(settings.draft_tokens)

    @property
    def student_draft(self) -> DeepseekVL2:
        """The draft itself."""
        student = self.accelerator.unwrap_model(self.student)
        assert isinstance(student, Student)
        return student.draft

    @property
    def progress(self) -> float:
        """How much of the training is done, 0 to 1, by steps or by the clock."""
        if self.settings.steps is not None:
            return self.step / self.settings.steps
        assert self.settings.minutes is not None
        return self._elapsed() / 60 / self.settings.minutes

    def go(self) -> None:
        """Train to the end, saving the state between segments."""
        self.started = time.monotonic()
        self.student.train()
        while self.progress < 1:
            stage = self.source.stage(self.progress)
            batches = self.source.batches(self.segment, stage, self.drawn)
            last = self.step + self.settings.save_every - self.step % self.settings.save_every
            while self.step < last and self.progress < 1 and self.source.stage(self.progress) == stage:
                pool = [self._answered(batches) for _ in range(self._pool_size())]
                for answered in pool * self.settings.replay:
                    if self.progress >= 1:
                        break
                    self._step(answered, stage)
            self.segment += 1
            del batches  # ends its worker processes
            if self.progress < 1:
                self.save()

    def measure(self, folder: Path) -> dict[str, Any]:
        """The last row of the log: what speculation with this draft does on held-out records."""
        self.student.eval()
        row = measure(
            self.target,
            self.student_draft,
            self.source.held_out,
            folder,
            k=self.settings.draft_tokens,
            batch_tokens=self.settings.batch_tokens,
            max_answer_tokens=self.settings.max_answer_tokens,
        )
        row = {"step": self.step, "minutes": round(self._elapsed() / 60, 2)} | row
        self.report(row)
        return row

    def save(self) -> None:
        """Write the state; what comes after it is lost when the run is stopped."""

        def write(folder: Path) -> None:
            self.accelerator.save_state(str(folder))
            (folder / LOG).write_text("".join(json.dumps(row) + "\n" for row in self.log), encoding="utf-8")

        position = {"step": self.step, "segment": self.segment, "drawn": self.drawn, "spent": self._elapsed()}
        answers = self.remembered.answers if self.remembered else {}
        self.state.save(self.step, write, position | {"settings": self.named, "answers": answers})

    def load(self, progress: dict[str, Any]) -> None:
        """Go on from the newest state."""
        folder = self.state.latest()
        assert folder is not None
        self.accelerator.load_state(str(folder))
        self.step, self.segment, self.drawn = progress["step"], progress["segment"], progress["drawn"]
        self.spent = progress["spent"]
        self.log = [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]
        if self.remembered:
            self.remembered.answers = progress["answers"]

    def _answered(self, batches: Iterator[PageBatch]) -> Answered:
        batch = next(batches).to(self.accelerator.device)
        self.drawn += 1
        if self.remembered:
            batch = self.remembered.recall(batch)
        answered = answer(self.target, batch, self.answering)
        if self.drawn == 1 and not bool(torch.isfinite(answered.logits).all()):
            raise UserError(f"The target's logits are not finite in {answered.logits.dtype}: use --precision float32.")
        if self.remembered and self.settings.temperature == 0:
            self.remembered.keep(answered)
        return answered

    def _pool_size(self) -> int:
        if self.settings.steps is None:
            return self.settings.pool
        return min(self.settings.pool, math.ceil((self.settings.steps - self.step) / self.settings.replay))

    def _step(self, answered: Answered, stage: int) -> None:
        rate = learning_rate(self.progress, self.step, self.peak, self._warm_up())
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        logits, balance, features = self.student(answered.batch)
        divergence = forward_kl(answered.logits, logits, answered.known)
        error = divergence.new_zeros(()) if features is None else feature_error(features, answered.features)
        loss = divergence + self.settings.balance * balance + self.settings.align * error
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.student.parameters(), 1.0)
        assert isinstance(norm, Tensor)
        if bool(torch.isfinite(norm)):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.meter.add(answered, logits, torch.stack([x.detach().float() for x in (divergence, balance, error, norm)]))
        if self.step % self.settings.log_every == 0:
            self._report(stage, rate)

    def _report(self, stage: int, rate: float) -> None:
        row = {"step": self.step, "minutes": round(self._elapsed() / 60, 2), "stage": stage, **self.meter.read()}
        row["lr"] = float(f"{rate:.3g}")
        self.log.append(row)
        self.report(row)

    def _warm_up(self) -> int:
        return 300 if self.settings.steps is None else max(1, min(300, self.settings.steps // 20))

    def _elapsed(self) -> float:
        return self.spent + (0.0 if self.started is None else time.monotonic() - self.started)


class Meter:
    """What a row of the log says about the steps since the last one."""

    def __init__(self, k: int) -> None:
        self.k = k
        self._clear()

    def _clear(self) -> None:
        self.sums: list[Tensor] = []
        self.matched: list[Tensor] = []
        self.tokens = 0
        self.started = time.monotonic()

    def add(self, answered: Answered, logits: Tensor, losses: Tensor) -> None:
        """Count one step; `losses` are its KL, balance, feature error and gradient norm. Nothing waits for the GPU."""
        self.sums.append(losses)
        same = (logits.detach().argmax(-1) == answered.logits.argmax(-1)) & answered.known
        self.matched.append(torch.stack((same.sum(), answered.known.sum())))
        self.last = same, answered.known
        self.tokens += answered.batch.input_ids.numel()

    def read(self) -> dict[str, Any]:
        """The row, and start anew; `tokens_per_step` is of the last batch, `expected` follows from the agreement."""
        divergence, balance, error, norm = torch.stack(self.sums).mean(0).tolist()
        matched, answers = torch.stack(self.matched).sum(0).tolist()
        agreement = matched / max(answers, 1)
        same, known = (tensor.tolist() for tensor in self.last)
        rows = [[s for s, k in zip(row, real, strict=True) if k] for row, real in zip(same, known, strict=True)]
        elapsed = max(time.monotonic() - self.started, 1e-9)
        row = {
            "loss": round(divergence, 4),
            "agreement": round(agreement, 4),
            "expected": round(expected_tokens(agreement, self.k), 3),
            "tokens_per_step": round(replay(rows, self.k).tokens_per_step, 3),
            "features": round(error, 4),
            "balance": round(balance, 3),
            "norm": round(norm, 3),
            "tokens_s": round(self.tokens / elapsed),
            "answer_tokens_s": round(answers / elapsed),
        }
        self._clear()
        return row


def learning_rate(progress: float, step: int, peak: float, warm_up: int) -> float:
    """Linear over `warm_up` steps, then constant, then from 55% of the training a cosine down to 1% of the peak."""
    warm = min(1.0, (step + 1) / warm_up)
    part = min(1.0, max(0.0, (progress - 0.55) / 0.45))
    return peak * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * part)))


def default_batch_tokens(device: str) -> int:
    """What keeps a GPU busy, or what a CPU gets through in seconds and a few gigabytes."""
    return 3_000 if device == "cpu" or not torch.cuda.is_available() else 100_000


def _optimizer(student: Student, lr: float, fused: bool) -> torch.optim.Optimizer:
    """AdamW; norms, biases and single vectors are not decayed."""
    matrices = [p for p in student.parameters() if p.dim() >= 2]
    vectors = [p for p in student.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.97), fused=fused)


def _accelerator(settings: TrainSettings) -> Accelerator:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("There is no CUDA device here; train with --device cpu.")
    on_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    precision = settings.precision if settings.precision != "auto" else "float32" if on_cpu else "bf16"
    torch.set_float32_matmul_precision("high")
    return Accelerator(cpu=on_cpu, mixed_precision="bf16" if precision == "bf16" else "no")


def _target_dtype(config: ModelConfig, accelerator: Accelerator) -> torch.dtype:
    """The target runs in what it was published in, as it will in its engine; in float32 when the training does."""
    if accelerator.mixed_precision == "no":
        return torch.float32
    return {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(config.torch_dtype, torch.float32)


def _workers(settings: TrainSettings) -> int:
    return settings.workers if settings.workers is not None else min(15, max(0, (os.cpu_count() or 1) - 1))


def _compile(model: DeepseekVL2) -> None:
    for block in model.vision.blocks:
        block.forward = torch.compile(block.forward, dynamic=True)
    for layer in model.language.model.layers:
        assert isinstance(layer, DecoderLayer)
        layer.forward_train = torch.compile(layer.forward_train, dynamic=True)  # type: ignore[method-assign]


def _digest(folder: Path) -> str:
    """What tells one checkpoint from another, without reading gigabytes: its configuration and its files' sizes."""
    sizes = sorted((file.name, file.stat().st_size) for file in folder.glob("*.safetensors"))
    return hashlib.sha256((folder / "config.json").read_bytes() + json.dumps(sizes).encode()).hexdigest()[:16]
