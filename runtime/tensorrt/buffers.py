"""The tensors between a chain's steps: allocated once, and shared by those that are never needed at the same time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trtvlm.model.chain import Chain


@dataclass(frozen=True)
class Kind:
    """What two tensors must agree in to share a buffer: element type and whole shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of such a buffer."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        count = dtype.itemsize
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Layout:
    """Which buffer each tensor of a chain lies in, by number, and what the buffers are."""

    places: Mapping[str, int]
    kinds: tuple[Kind, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(kind.nbytes for kind in self.kinds)

    def allocate(self, device: torch.device) -> dict[str, Tensor]:
        """The buffers, zeroed: every tensor's name -> its buffer. What lies in rows that no pass wrote is finite."""
        buffers = [torch.zeros(kind.shape, dtype=getattr(torch, kind.dtype), device=device) for kind in self.kinds]
        return {name: buffers[place] for name, place in self.places.items()}


def lifetimes(chain: Chain) -> dict[str, tuple[int, int]]:
    """Of each tensor the step that makes it and the last step that reads it.

    What comes from outside (the tokens; a prompt's embeddings) is there before step 0, and the result after the last.
    """
    made = {chain.input: -1, chain.hidden: -1}
    used: dict[str, int] = {chain.output: len(chain.steps)}
    for number, step in enumerate(chain.steps):
        for name in step.outputs.values():
            made.setdefault(name, number)
        for name in step.inputs.values():
            used[name] = max(used.get(name, -1), number)
    return {name: (start, max(start, used.get(name, start))) for name, start in made.items()}


def plan_buffers(chain: Chain, rows: int, decode_rows: int) -> Layout:
    """Buffers for passes of up to `rows` rows. What a step makes that a prefill runs on its last row only has `decode_rows`.

    A step never writes over what it reads.
    """
    narrow = {
        name
        for step in chain.engines()
        if step.rows == "last"
        for name in step.outputs.values()
    }  # fmt: skip
    places: dict[str, int] = {}
    kinds: list[Kind] = []
    until: list[int] = []  # the last step that needs a buffer's tensor
    for name, (start, end) in sorted(lifetimes(chain).items(), key=lambda item: item[1][0]):
        spec = chain.tensors[name]
        long = decode_rows if name in narrow else max(rows, decode_rows)
        kind = Kind(spec.dtype, tuple(long if size == "rows" else int(size) for size in spec.shape))
        free = (place for place, held in enumerate(kinds) if held == kind and until[place] < start)
        place = next(free, len(kinds))
        if place == len(kinds):
            kinds.append(kind)
            until.append(end)
        until[place] = end
        places[name] = place
    return Layout(places, tuple(kinds))
