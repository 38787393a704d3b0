"""One step of distillation: the draft follows the target's distribution at every token of the target's own answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trtvlm.model.pages.batches import PageBatch, to_float
from trtvlm.model.vlm import DeepseekVL2


@dataclass
class Forced:
    """A model's teacher-forced pass over a batch.

    logits [B, A, vocab]: position a predicts answer token a. balance: the routers' mean load-balancing loss.
    features [B * V, h * h, hidden]: what the projector made of the views.
    """

    logits: Tensor
    balance: Tensor
    features: Tensor


def forced(model: DeepseekVL2, batch: PageBatch) -> Forced:
    """Run `model` over prompts and answers; batch.input_ids hold the answers from batch.answer_start on."""
    seen: list[Tensor] = []
    hook = model.projector.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        logits, balance = model.forward_train(
            batch.input_ids[:, :-1],
            batch.image_start,
            pixels_of(batch, model.image_newline.dtype),
            batch.tiles,
            keep_from=batch.answer_start - 1,
        )
    finally:
        hook.remove()
    return Forced(logits, balance, seen[0])


def pixels_of(batch: PageBatch, dtype: torch.dtype) -> Tensor:
    """The batch's pixels as the vision tower takes them; bytes are normalised here, on the model's device."""
    return to_float(batch.pixels, dtype) if batch.pixels.dtype == torch.uint8 else batch.pixels.to(dtype)


class Student(nn.Module):
    """The draft and, for training only, a linear map from its image tokens to the target's."""

    def __init__(self, draft: DeepseekVL2, target: DeepseekVL2) -> None:
        super().__init__()
        self.draft = draft
        self.bridge: nn.Linear | None = None
        if draft.config.view_tokens_side == target.config.view_tokens_side:
            self.bridge = nn.Linear(draft.config.projector.n_embed, target.config.projector.n_embed)
            nn.init.zeros_(self.bridge.bias)
            # The identity: first weights that depend on no seed.
            nn.init.eye_(self.bridge.weight)

    def forward(self, batch: PageBatch) -> tuple[Tensor, Tensor, Tensor | None]:
        """-> logits [B, A, vocab], balance, bridged image features [B * V, h * h, target hidden] or None."""
        out = forced(self.draft, batch)
        return out.logits, out.balance, None if self.bridge is None else self.bridge(out.features)


def forward_kl(target_logits: Tensor, draft_logits: Tensor, known: Tensor) -> Tensor:
    """KL(target || draft), averaged over the positions where `known` [B, A] is true, in nats; logits [B, A, vocab].

    The whole distribution, not its winner, is what rejection sampling compares; forward KL makes the draft cover
    everything the target may say (Agarwal et al., arXiv 2306.13649, section 2).
    """
    target = F.log_softmax(target_logits.float(), dim=-1)
    draft = F.log_softmax(draft_logits.float(), dim=-1)
    divergence = (target.exp() * (target - draft)).sum(-1)
    return (divergence * known).sum() / known.sum().clamp(min=1)


def feature_error(features: Tensor, wanted: Tensor) -> Tensor:
    """Squared error of image features relative to their variance: 1 for the mean, 0 for a perfect copy.

    Learning to read from answers alone starts with a long plateau on which the decoder ignores the image; what the
    target's tower already knows carries the draft's over it.
    """
    wanted = wanted.float()
    spread = wanted.var(dim=(0, 1), unbiased=False).mean().clamp(min=1e-6)
    return (features.float() - wanted).square().mean() / spread
