"""The quantized model beside the float one on held-out answers, layer by layer: neither ever stands whole in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from trtvlm.builder.calibrate import Sample, prepare
from trtvlm.model.config import LanguageConfig
from trtvlm.model.inputs import ModelInputs
from trtvlm.model.language import DecoderLayer
from trtvlm.model.processor import Processor
from trtvlm.plugins.int4_linear import packing as int4
from trtvlm.plugins.int8_linear import packing as int8
from trtvlm.plugins.quantized_checkpoint import PREQUANT, SCALES, layer_prefix, linears, pieces, plain_tensors

# Rows of the LM head at a time.
VOCABULARY_SLICE = 4096


@dataclass(frozen=True)
class Answer:
    """A held-out sample, and the position its answer begins at."""

    inputs: ModelInputs
    first: int


def answers(samples: Sequence[Sample], processor: Processor) -> list[Answer]:
    """The samples that have an answer."""
    known = [sample for sample in samples if sample.answer]
    asked = prepare([Sample(sample.image, sample.prompt) for sample in known], processor)
    pairs = zip(prepare(known, processor), asked, strict=True)
    return [Answer(whole, int(question.input_ids.numel())) for whole, question in pairs]


@dataclass
class Verification:
    """Held-out samples on their way through both models: hidden states [1, T, hidden] a sample, on the CPU."""

    answers: list[Answer]
    expected: list[Tensor] = field(default_factory=list)
    found: list[Tensor] = field(default_factory=list)
    layer_errors: list[float] = field(default_factory=list)

    def compare_layer(self, run: Callable[[Tensor], Tensor], quantize: Callable[[], None]) -> None:
        """Run both through a layer, which `quantize` turns from float into what was written."""
        if not self.answers:
            return
        self.expected = [run(x) for x in self.expected]
        quantize()
        self.found = [run(x) for x in self.found]
        lost = sum(float((a - b).square().sum()) for a, b in zip(self.expected, self.found, strict=True))
        self.layer_errors.append(round((lost / sum(float(a.square().sum()) for a in self.expected)) ** 0.5, 6))

    def report(
        self,
        norm: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]],
        head: Callable[[int, int], tuple[Tensor, Tensor]],
        vocabulary: int,
        device: torch.device,
    ) -> dict[str, Any]:
        """Next-token agreement and KL(float || quantized) over the answers, teacher-forced.

        norm: the final norm of both models; head(start, stop): rows of both LM heads, float32.
        """
        result: dict[str, Any] = {"samples": len(self.answers), "tokens": 0}
        if not self.answers:
            return result
        firsts = [answer.first for answer in self.answers]
        wanted, got = (
            norm[side](torch.cat([x[0, first - 1 : -1] for x, first in zip(rows, firsts, strict=True)]).to(device))
            for side, rows in enumerate((self.expected, self.found))
        )
        slices = (head(s, min(vocabulary, s + VOCABULARY_SLICE)) for s in range(0, vocabulary, VOCABULARY_SLICE))
        totals = _Totals(wanted.shape[0], device)
        for ours, theirs in slices:
            totals.add(wanted @ ours.t(), got @ theirs.t())
        agreement, divergence = totals.result()
        tokens = wanted.shape[0]
        return result | {"tokens": tokens, "next_token_agreement": agreement / tokens, "kl": divergence / tokens}


class _Totals:
    """Argmax and KL of two softmaxes whose logits come in slices: maxima, sums and the weighted difference so far."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self._highest = torch.full((2, rows), -torch.inf, device=device)
        self._best = torch.zeros(2, rows, dtype=torch.int64, device=device)
        self._sums = torch.zeros(2, rows, dtype=torch.float64, device=device)
        self._apart = torch.zeros(rows, dtype=torch.float64, device=device)
        self._start = 0

    def add(self, wanted: Tensor, got: Tensor) -> None:
        """Logits float32 [rows, more of the vocabulary] of both models."""
        for side, logits in enumerate((wanted, got)):
            highest, index = logits.max(-1)
            better = highest > self._highest[side]
            self._best[side] = torch.where(better, index + self._start, self._best[side])
            new = torch.where(better, highest, self._highest[side])
            shrink = (self._highest[side] - new).double().exp()
            shares = (logits - new.unsqueeze(-1)).double().exp()
            self._sums[side] = self._sums[side] * shrink + shares.sum(-1)
            if side == 0:
                self._apart = self._apart * shrink + (shares * (wanted - got).double()).sum(-1)
            self._highest[side] = new
        self._start += wanted.shape[-1]

    def result(self) -> tuple[int, float]:
        """How many rows agree on the most likely token, and the sum of KL(wanted || got)."""
        logs = self._highest.double() + self._sums.log()
        divergence = self._apart / self._sums[0] - logs[0] + logs[1]
        return int((self._best[0] == self._best[1]).sum()), float(divergence.sum())


@torch.no_grad()
def load_written(path: Path, layer: DecoderLayer, config: LanguageConfig, index: int) -> None:
    """Put what a checkpoint being written says of decoder layer `index` into `layer`: float32, an expert at a time."""
    prefix = layer_prefix(index)
    with safe_open(str(path), framework="pt") as file:
        names = set(file.keys())
        for name, (sources, _, _) in plain_tensors(config, index).items():
            tensor, start = file.get_tensor(prefix + name), 0
            for source in sources:
                parameter = layer.get_parameter(source)
                parameter.copy_(tensor[start : start + parameter.shape[0]])
                start += parameter.shape[0]
        for fused in linears(config, index):
            for number in range(fused.experts or 1):
                which = slice(None) if fused.experts is None else slice(number, number + 1)
                device = next(layer.parameters()).device
                weight = _float_weight(file, names, prefix + fused.name, which, device)
                weight = weight if fused.experts is None else weight[0]
                for source, rows in pieces(config, fused):
                    layer.get_parameter(f"{source.format(number)}.weight").copy_(weight[rows])


def written_head(path: Path, start: int, stop: int, device: torch.device) -> Tensor:
    """Rows of the LM head as a checkpoint being written has them: float32 [stop - start, hidden]."""
    with safe_open(str(path), framework="pt") as file:
        names = set(file.keys())
        if f"lm_head.{SCALES['int4']}" in names:
            packed = file.get_slice("lm_head.weight")[start // 2 : stop // 2].to(device)
            return int4.dequantize(packed, file.get_slice(f"lm_head.{SCALES['int4']}")[start:stop].to(device))
        return _float_weight(file, names, "lm_head", slice(start, stop), device)


def _float_weight(file: Any, names: set[str], name: str, which: slice, device: torch.device) -> Tensor:
    def get(part: str) -> Tensor:
        tensor: Tensor = file.get_slice(f"{name}.{part}")[which]
        return tensor.to(device)

    weight = get("weight")
    if f"{name}.{SCALES['int4']}" in names:
        scale = get(PREQUANT) if f"{name}.{PREQUANT}" in names else None
        return int4.dequantize(weight, get(SCALES["int4"]), scale)
    if f"{name}.{SCALES['int8']}" in names:
        return int8.dequantize(weight, get(SCALES["int8"]))
    return weight.float()
