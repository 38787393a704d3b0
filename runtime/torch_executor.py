"""The executor that runs the PyTorch modules themselves: on a CPU, or on any device that PyTorch knows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trtvlm.model.cache import KVCache
from trtvlm.plugins.replace import RowwiseLanguage
from trtvlm.runtime.executor import MAX_DECODE_WIDTH

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from trtvlm.model.cache_kind import CacheKind
    from trtvlm.model.config import ModelConfig
    from trtvlm.model.inputs import ImageView
    from trtvlm.model.vlm import DeepseekVL2


class TorchExecutor:
    """`trtvlm.runtime.executor.Executor` over a DeepseekVL2 in evaluation mode, on the device its weights are on.

    Logits come back as float32 on the CPU. A model out of `trtvlm.plugins.replace.for_cpu` decodes the tokens of a call
    together, which is what makes speculation pay; any other decodes them one by one, whose rows depend on nothing.
    """

    def __init__(self, model: DeepseekVL2, max_length: int, kv_cache: CacheKind = "fp16") -> None:
        self.config: ModelConfig = model.config
        self.max_length = max_length
        self._model = model
        weight = model.image_newline
        self._dtype, self._device = weight.dtype, weight.device
        self._together = isinstance(model.language, RowwiseLanguage)
        self.cache = KVCache(model.config.language, 1, max_length, self._dtype, self._device, kv_cache)

    @property
    def length(self) -> int:
        """Positions in the cache now."""
        return self.cache.length

    def rollback(self, length: int) -> None:
        """Forget everything from position `length` on."""
        self.cache.rollback(length)

    @torch.inference_mode()
    def encode_image(self, image: ImageView) -> Tensor:
        """[image tokens, hidden] of one image; alone, so that its bits do not depend on the images beside it."""
        features = self._model.encode_views(image.pixels.to(self._device, self._dtype))
        return self._model.image_embeds(features, image.tiles)

    @torch.inference_mode()
    def embed(self, tokens: Tensor) -> Tensor:
        """Input embeddings [T, hidden] of int64 token ids [T]."""
        out: Tensor = self._model.language.model.embed_tokens(tokens.to(self._device))
        return out

    @torch.inference_mode()
    def prefill(self, embeds: Tensor) -> Tensor:
        """Append embeddings [T, hidden]. Returns float32 [vocab]: logits after the last one."""
        return self._forward(embeds, last_only=True)[-1]

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Append 1 to MAX_DECODE_WIDTH tokens. Returns float32 [tokens, vocab]; no row depends on the later ones."""
        if not 1 <= len(tokens) <= MAX_DECODE_WIDTH:
            raise ValueError(f"{len(tokens)} tokens in one decode call; 1 to {MAX_DECODE_WIDTH} are supported")
        embeds = self.embed(torch.tensor(tokens))
        if self._together:
            return self._forward(embeds, last_only=False)
        return torch.cat([self._forward(row, last_only=True) for row in torch.split(embeds, 1)])

    def _forward(self, embeds: Tensor, last_only: bool) -> Tensor:
        logits: Tensor = self._model.language(embeds.unsqueeze(0), self.cache, last_only=last_only)
        return logits[0].to("cpu", torch.float32)
