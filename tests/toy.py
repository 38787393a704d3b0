"""A toy language model for the speculative loop: logits are a pure function of the whole context, and cheap."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np
import torch

from trtvlm.runtime.executor import MAX_DECODE_WIDTH

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class ToyModel:
    """Random logits by context, so that any wrong cursor shows. `noise` moves a model away from another of its seed."""

    def __init__(self, vocab: int, seed: int = 0, noise: float = 0.0, spread: float = 1.5) -> None:
        self.vocab, self.seed, self.noise, self.spread = vocab, seed, noise, spread
        self._known: dict[tuple[int, ...], Tensor] = {}

    def logits(self, context: tuple[int, ...]) -> Tensor:
        """float32 [vocab] after these tokens."""
        if context not in self._known:
            rng = np.random.default_rng(zlib.crc32(repr((self.seed, context)).encode()))
            row = self.spread * rng.standard_normal(self.vocab)
            row += self.noise * rng.standard_normal(self.vocab)
            self._known[context] = torch.from_numpy(row.astype(np.float32))
        return self._known[context]


class ToyDecoder:
    """A Decoder over a ToyModel; its cache is the list of tokens."""

    def __init__(self, model: ToyModel, prompt: Sequence[int] = (0,), max_length: int = 64) -> None:
        self.model = model
        self.max_length = max_length
        self.cache = list(prompt)

    @property
    def length(self) -> int:
        return len(self.cache)

    def rollback(self, length: int) -> None:
        assert 0 <= length <= len(self.cache)
        del self.cache[length:]

    def decode(self, tokens: Sequence[int]) -> Tensor:
        assert 1 <= len(tokens) <= MAX_DECODE_WIDTH
        assert len(self.cache) + len(tokens) <= self.max_length
        rows = []
        for token in tokens:
            self.cache.append(token)
            rows.append(self.model.logits(tuple(self.cache)))
        return torch.stack(rows)


def plain_greedy(model: ToyModel, prompt: Sequence[int], newest: int, max_tokens: int, eos: int | None) -> list[int]:
    """What greedy decoding means, with no cache at all."""
    context = [*prompt, newest]
    out: list[int] = []
    while len(out) < max_tokens and (not out or out[-1] != eos):
        out.append(int(model.logits(tuple(context)).argmax()))
        context.append(out[-1])
    return out
