"""Weights in the kernels' order, made from the checkpoint's tensors once and kept as long as these are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")


class Repacked(Generic[T]):
    """make(*tensors, *numbers) of the same tensors is called once, and again after one of them was written to.

    The first tensor is held weakly: when it goes, so does what was made. The others live as long as it does, and beside
    the packed copy: a model that keeps its checkpoint's tensors has its weights twice.
    """

    def __init__(self, make: Callable[..., T]) -> None:
        self._make = make
        self._made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __call__(self, first: Tensor, *rest: Tensor | None, numbers: tuple[int, ...] = ()) -> T:
        versions = (_version(first), *map(_version, rest), numbers)
        kept = self._made.get(first)
        if kept is not None:
            others, at, made = kept
            if at == versions and all(mine is theirs for mine, theirs in zip(others, rest, strict=True)):
                out: T = made
                return out
        made = self._make(first, *rest, *numbers)
        self._made[first] = rest, versions, made
        return made

    def __len__(self) -> int:
        return len(self._made)


def _version(tensor: Tensor | None) -> int:
    """How often a tensor was written to; inference tensors do not tell."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version
