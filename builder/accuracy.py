"""How well the quantized model answers, beside the float one, on held-out samples; both models stand whole in memory.

The build compares layer by layer (`verify.py`), and only has models that are small enough read here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trtvlm.builder.calibrate import Sample, embeddings, prepare
from trtvlm.model.inputs import ModelInputs
from trtvlm.model.processor import Processor
from trtvlm.model.vlm import DeepseekVL2

BATCH = 8
MAX_NEW_TOKENS = 520


@torch.no_grad()
def compare(
    float_model: DeepseekVL2, quantized: DeepseekVL2, samples: list[Sample], processor: Processor, read: bool = True
) -> dict[str, Any]:
    """Next-token agreement and KL(float || quantized) over the answers, teacher-forced; character error rate of reading.

    The character error rate (CER) folds blanks and line breaks; it needs the samples' answers, and `read` to be true.
    """
    matches, tokens, divergence = 0, 0, 0.0
    for inputs, sample in zip(prepare(samples, processor), samples, strict=True):
        if not sample.answer:
            continue
        first = int(inputs.input_ids.numel()) - _answer_length(inputs, sample, processor)
        expected, found = (_logits(model, inputs)[first - 1 : -1] for model in (float_model, quantized))
        matches += int((expected.argmax(-1) == found.argmax(-1)).sum())
        tokens += expected.shape[0]
        wanted, got = expected.log_softmax(-1), found.log_softmax(-1)
        divergence += float((wanted.exp() * (wanted - got)).sum())
    result: dict[str, Any] = {"samples": len(samples), "tokens": tokens}
    if tokens:
        result |= {"next_token_agreement": matches / tokens, "kl": divergence / tokens}
    if read and tokens:
        result |= {
            "cer_float": character_error_rate(float_model, samples, processor),
            "cer_quantized": character_error_rate(quantized, samples, processor),
        }
    return result


def character_error_rate(model: DeepseekVL2, samples: Sequence[Sample], processor: Processor) -> float:
    """CER of greedy reading over the samples that have an answer."""
    import jiwer

    known = [sample for sample in samples if sample.answer.strip()]
    readings = read_greedily(model, known, processor)
    return float(jiwer.cer([_folded(sample.answer) for sample in known], [_folded(text) for text in readings]))


@torch.no_grad()
def read_greedily(model: DeepseekVL2, samples: Sequence[Sample], processor: Processor) -> list[str]:
    """The greedy answers, in the samples' order; prompts of similar length are decoded together, padded on the left."""
    asked = prepare([Sample(sample.image, sample.prompt) for sample in samples], processor)
    order = sorted(range(len(asked)), key=lambda index: asked[index].input_ids.numel())
    texts = [""] * len(asked)
    eos = model.config.language.eos_token_id
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        embeds = [embeddings(model, asked[index])[0] for index in rows]
        longest = max(x.shape[0] for x in embeds)
        padded = torch.stack([torch.nn.functional.pad(x, (0, 0, longest - x.shape[0], 0)) for x in embeds])
        mask = torch.stack([(torch.arange(longest) >= longest - x.shape[0]).long() for x in embeds])
        room = model.config.language.max_position_embeddings - longest
        answers = model.generate_greedy(padded, min(MAX_NEW_TOKENS, room), eos, mask).tolist()
        for index, ids in zip(rows, answers, strict=True):
            texts[index] = processor.decode(ids[: ids.index(eos)] if eos in ids else ids)
    return texts


def _logits(model: DeepseekVL2, inputs: ModelInputs) -> Tensor:
    out: Tensor = model.language(embeddings(model, inputs))
    return out[0]


def _answer_length(inputs: ModelInputs, sample: Sample, processor: Processor) -> int:
    """Tokens of the answer, its end included: what asking without it leaves."""
    asked = prepare([Sample(sample.image, sample.prompt)], processor)[0]
    return int(inputs.input_ids.numel() - asked.input_ids.numel())


def _folded(text: str) -> str:
    return " ".join(text.split())
