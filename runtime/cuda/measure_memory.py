"""Device memory by what it is for, and as a whole: also what torch's allocator does not see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from trtvlm.model.errors import UserError
from trtvlm.runtime.cuda.device import GIB, bytes_in_use

MARGIN = 512 << 20
"""Of a cap, kept from torch's allocator: kernels' code and graphs come after it."""


class Device(Protocol):
    """Where bytes are counted."""

    def allocated(self) -> int:
        """Of tensors alive."""

    def reserved(self) -> int:
        """Held by torch's allocator now."""

    def most_reserved(self) -> int:
        """Held by torch's allocator at most so far."""

    def in_use(self) -> int:
        """Of the device, by everybody."""

    def release(self) -> None:
        """Finish what runs, and give back what the allocator holds unused."""


class Cuda:
    """The current GPU; made once this process has its context there.

    nvidia-smi also sees what was in use before that, the driver answers at once: it says what came since then.
    """

    def __init__(self) -> None:
        self._elsewhere = bytes_in_use() - self._by_driver()

    def allocated(self) -> int:
        """Bytes of tensors alive."""
        return torch.cuda.memory_allocated()

    def reserved(self) -> int:
        """Bytes held by torch's allocator now."""
        return torch.cuda.memory_reserved()

    def most_reserved(self) -> int:
        """Bytes held by torch's allocator at most so far."""
        return torch.cuda.max_memory_reserved()

    def in_use(self) -> int:
        """Bytes of the device in use, by everybody."""
        return self._by_driver() + self._elsewhere

    def release(self) -> None:
        """Synchronise and empty the allocator's cache."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def _by_driver(self) -> int:
        free, total = torch.cuda.mem_get_info()
        return total - free


@dataclass
class Ledger:
    """Bytes by part, in the order they were taken. `before`: in use on the device before this process began.

    The first part is what there is already: CUDA's context. A part's bytes are the tensors it left and what grew outside the
    allocator (modules, graphs).
    """

    before: int
    device: Device = field(default_factory=Cuda)
    parts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parts["CUDA"] = self._outside()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what the block leaves. An allocator out of memory ends in a UserError that says what there was before."""
        allocated, outside = self.device.allocated(), self._outside()
        try:
            yield
        except torch.cuda.OutOfMemoryError as error:
            held = ", ".join(f"{part} {size / GIB:.2f}" for part, size in self.parts.items())
            raise UserError(
                f"It does not fit: out of memory in '{name}' ({_first_sentence(error)}); GiB before it: {held}."
            ) from None
        self.device.release()
        grown = self.device.allocated() - allocated + self._outside() - outside
        self.parts[name] = self.parts.get(name, 0) + max(0, grown)

    def peak(self) -> int:
        """The most that the process held: the allocator's most, and what is outside it now."""
        return self._outside() + self.device.most_reserved()

    def _outside(self) -> int:
        return max(0, self.device.in_use() - self.before - self.device.reserved())

    def to_dict(self) -> dict[str, object]:
        """For JSON, in bytes."""
        return {"parts": dict(self.parts), "held": sum(self.parts.values()), "peak": self.peak()}


def parse_size(text: str) -> int:
    """Bytes of "20GiB", "900MiB" or "21.5GB". UserError: anything else."""
    units = {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
    folded = text.strip().lower()
    for unit, size in units.items():
        if folded.endswith(unit):
            try:
                value = float(folded.removesuffix(unit))
            except ValueError:
                break
            if 0 < value < float("inf"):
                return int(value * size)
    raise UserError(f"'{text}' is no size of memory: give a number with GiB, MiB, GB or MB, as in 20GiB.")


def limit_allocator(cap: int, outside: int) -> None:
    """Let torch allocate what is left of `cap` bytes beside `outside` bytes and MARGIN. UserError: nothing is."""
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    room = cap - outside - MARGIN
    if room <= 0:
        raise UserError(f"A cap of {cap / GIB:.2f} GiB leaves nothing beside CUDA's own {outside / GIB:.2f} GiB.")
    torch.cuda.set_per_process_memory_fraction(min(1.0, room / total))


def check_cap(ledger: Ledger, cap: int) -> str:
    """The sentence that says it fits. UserError: the process held more than `cap` bytes at some time."""
    peak = ledger.peak()
    if peak > cap:
        raise UserError(f"It does not fit: {peak / GIB:.2f} GiB were held at most, the cap is {cap / GIB:.2f} GiB.")
    return f"fits: {peak / GIB:.2f} GiB of {cap / GIB:.2f} GiB at most, {sum(ledger.parts.values()) / GIB:.2f} GiB held"


def _first_sentence(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].partition(". GPU")[0].rstrip(".")
