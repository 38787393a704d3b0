"""What blocks take of a multiprocessor, and whether a launch leaves room for another one whatever it takes.

The units in which registers and shared memory are given out: CUDA C++ programming guide, "Compute Capabilities", and the
occupancy calculator of Nsight Compute.
"""

from __future__ import annotations

from dataclasses import dataclass

_WARP, _WARPS, _REGISTERS, _SHARED = 32, 4, 8, 128
_RESERVED = 1024  # bytes of each block's shared memory that the driver keeps for itself, from SM 8.0 on


@dataclass(frozen=True)
class Use:
    """What one block takes: registers, threads, and bytes of shared memory, in the units they are given out in."""

    registers: int
    threads: int
    shared: int

    @classmethod
    def of(cls, registers: int, threads: int, shared: int) -> Use:
        """A block of `threads` threads with `registers` each, and `shared` bytes, static and dynamic together.

        Warps are dealt out to four schedulers, each of which has a quarter of the registers: they count in fours.
        """
        threads = _round_up(threads, _WARPS * _WARP)
        return cls(_round_up(registers, _REGISTERS) * threads, threads, _round_up(shared + _RESERVED, _SHARED))


@dataclass(frozen=True)
class Multiprocessor:
    """What a multiprocessor has for all blocks that are on it at once, and how many those may be."""

    registers: int
    threads: int
    shared: int
    blocks: int

    def beside(self, use: Use, count: int = 1) -> Multiprocessor:
        """What `count` blocks leave of it; something is below 0 if they do not fit."""
        return Multiprocessor(
            self.registers - count * use.registers,
            self.threads - count * use.threads,
            self.shared - count * use.shared,
            self.blocks - count,
        )

    def fits(self, use: Use) -> bool:
        """Whether there is room for one block."""
        left = self.beside(use)
        return min(left.registers, left.threads, left.shared, left.blocks) >= 0


@dataclass(frozen=True)
class Device:
    """So many multiprocessors of one kind."""

    count: int
    multiprocessor: Multiprocessor

    def leaves_room(self, blocks: int, use: Use, other: Use) -> bool:
        """Whether `blocks` blocks of `use` find room all at once, and a block of `other` beside them, wherever they are.

        Of all multiprocessors, one has no more than the average of them. `other` has to fit there.
        """
        most, rest = divmod(blocks, self.count)
        full = self.multiprocessor.beside(use, most)
        return full.fits(other) and (not rest or full.fits(use))


def device(index: int) -> Device:
    """A CUDA device, by its number among those torch sees. RuntimeError: the driver does not say."""
    from cuda.bindings import driver

    def attribute(name: str) -> int:
        key = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        status, value = driver.cuDeviceGetAttribute(key, driver.CUdevice(index))
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"the driver does not tell {name} of device {index}: {status}")
        return int(value)

    names = ("REGISTERS", "THREADS", "SHARED_MEMORY", "BLOCKS")
    limits = [attribute(f"MAX_{name}_PER_MULTIPROCESSOR") for name in names]
    return Device(attribute("MULTIPROCESSOR_COUNT"), Multiprocessor(*limits))


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
