"""What runs a language model for the speculative loop: one small interface, several implementations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from trtvlm.model.config import ModelConfig
    from trtvlm.model.inputs import ImageView

MAX_DECODE_WIDTH = 8
"""The most tokens one decode call takes: every executor is built for widths 1 to this."""

EXECUTORS = ("auto", "torch", "tensorrt", "onnxruntime")
"""What may run an engine directory. "auto" is torch, which is what has been measured; onnxruntime runs the graphs that the
engines were compiled from on a CPU, to look at a directory without its GPU."""


class Decoder(Protocol):
    """The part that the speculative loop needs: tokens in, logits out, and a cursor that moves back."""

    @property
    def max_length(self) -> int:
        """Positions that the cache has room for."""
        ...

    @property
    def length(self) -> int:
        """Positions in the cache now."""
        ...

    def rollback(self, length: int) -> None:
        """Forget everything from position `length` on; only the cursor moves. ValueError if `length` is ahead of it."""
        ...

    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Append 1 to MAX_DECODE_WIDTH tokens. Returns float32 [tokens, vocab]: row i follows token i.

        Batch invariance: the bits of row i are those that a call with tokens[:i + 1] alone, or token by token, gives.
        """
        ...


class Executor(Decoder, Protocol):
    """A vision tower and a language model over one preallocated cache, for one conversation at a time."""

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        ...

    def encode_image(self, image: ImageView) -> Tensor:
        """[image tokens, hidden]: tower, projector, newlines and separator of one image."""
        ...

    def embed(self, tokens: Tensor) -> Tensor:
        """Input embeddings [T, hidden] of int64 token ids [T]."""
        ...

    def prefill(self, embeds: Tensor) -> Tensor:
        """Append a prompt's embeddings [T, hidden] to the cache. Returns float32 [vocab]: logits after the last one."""
        ...
