"""A draft measured on held-out records: what greedy speculation would accept, and whether its experts are all used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trtvlm.draft.acceptance import Acceptance, replay, total
from trtvlm.draft.answers import Answered, AnswerSettings, answer
from trtvlm.draft.data import Record, grouped, prepare, processor_of, shapes
from trtvlm.draft.distil import forced, forward_kl
from trtvlm.model.language import DecoderLayer
from trtvlm.model.moe import MoE
from trtvlm.model.vlm import DeepseekVL2


@torch.no_grad()
def measure(
    target: DeepseekVL2,
    draft: DeepseekVL2,
    records: Sequence[Record],
    folder: Path,
    *,
    k: int,
    batch_tokens: int,
    max_answer_tokens: int,
) -> dict[str, Any]:
    """The acceptance (see `Acceptance.to_dict`), the mean KL and the experts that no token chose.

    The answers are the target's own greedy ones, whole; folder: the target's.
    """
    answering = AnswerSettings(max_tokens=max_answer_tokens)
    device = target.image_newline.device
    tokens: dict[int, Tensor] = {}
    measured: list[Acceptance] = []
    divergences: list[Tensor] = []
    for indices in grouped(shapes(records, folder), range(len(records)), batch_tokens):
        batch = prepare([records[index] for index in indices], processor_of(folder)).to(device)
        answered = answer(target, batch, answering)
        with counted(draft, tokens):
            out = forced(draft, answered.batch)
        measured.append(replay(_matches(answered, out.logits), k))
        divergences.append(forward_kl(answered.logits, out.logits, answered.known) * len(indices))
    unused = [
        f"layer {layer}, expert {e}"
        for layer, counts in tokens.items()
        for e in (counts == 0).nonzero().flatten().tolist()
    ]
    return {
        "held_out": len(records),
        **total(measured).to_dict(),
        "kl": round(float(torch.stack(divergences).sum()) / len(records), 4),
        "unused_experts": unused,
    }


def _matches(answered: Answered, logits: Tensor) -> list[list[bool]]:
    same = (logits.argmax(-1) == answered.logits.argmax(-1)).tolist()
    return [
        [match for match, real in zip(row, known, strict=True) if real]
        for row, known in zip(same, answered.known.tolist(), strict=True)
    ]


@contextmanager
def counted(model: DeepseekVL2, tokens: dict[int, Tensor]) -> Iterator[None]:
    """While open, add up how many tokens chose each expert: `tokens[layer]` is int64 [experts]."""

    def count(index: int, layer: DecoderLayer, normed: Tensor) -> None:
        assert isinstance(layer.mlp, MoE)
        with torch.autocast(normed.device.type, enabled=False):  # as the layer itself routes
            chosen = layer.mlp.gate(normed.flatten(0, -2))[0]
        seen = torch.bincount(chosen.flatten(), minlength=len(layer.mlp.experts)).cpu()
        tokens[index] = tokens.get(index, 0) + seen

    hooks = []
    for index, layer in enumerate(model.language.model.layers):
        assert isinstance(layer, DecoderLayer)
        if isinstance(layer.mlp, MoE):
            # The norm before the experts: in training they run all at once, without their router being called.
            hook = lambda _module, _inputs, normed, index=index, layer=layer: count(index, layer, normed)  # noqa: E731
            hooks.append(layer.post_attention_layernorm.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
