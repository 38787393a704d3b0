"""Run the kernels of plugins/*/*.cu on CPU tensors.

    with emulated():                      # the Python launchers launch here, and their tensors are on the CPU
        moe_decode(residual, norm, weights, workspace, rows)

    emulated_kernel("int4_moe/decode.cu", "route", defines(...))((blocks,), 256, x, out, rows, shared=4096)

Found out on the way, and raised as EmulationError: accesses outside of the tensors given and of dynamic shared memory,
misaligned ones, lanes that meet at different instructions, deadlocks, copies nobody waits for, arguments of the wrong
kind. Shared memory is full of NaNs at the start; warps and blocks run ahead of each other as far as they can, in an order
that can be chosen, so that a missing barrier gives wrong results. Not seen: a tensor reached through a table of pointers
has no guard, static shared memory no borders, and PTX's rules on memory order are not modelled.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from torch import Tensor

from trtvlm.plugins.cuda import launch
from trtvlm.plugins.cuda.compiler import PLUGINS, cache_folder
from trtvlm.plugins.cuda.emulation.translate import Edit, translate
from trtvlm.plugins.cuda.occupancy import Use

HERE = Path(__file__).parent
ORDERS = ("forward", "reversed", "shuffled")
COMPILERS = ("g++", "c++")

Argument = Tensor | int | float | None


class EmulationError(RuntimeError):
    """A kernel did what it may not, or would never end."""


@dataclass(frozen=True)
class Schedule:
    """How the threads of a launch take turns.

    order: of blocks, warps and lanes: one of ORDERS. seed: of the shuffled order.
    resident: blocks that may be there at once. together: they start at once, and if shuffled take turns in the midst of
    their work; otherwise one more comes when all wait.
    guarded: tensors are moved to pages of their own for the launch, so that accesses outside of them are seen.
    stack: bytes a thread's variables may take.
    """

    order: str = "forward"
    seed: int = 0
    resident: int = 1024
    together: bool = False
    guarded: bool = True
    stack: int = 64 * 1024


class _Options(ctypes.Structure):
    _fields_ = [
        ("order", ctypes.c_uint),
        ("seed", ctypes.c_uint),
        ("resident", ctypes.c_int),
        ("together", ctypes.c_int),
        ("stack", ctypes.c_int),
    ]


@dataclass
class _State:
    """What `emulated` changes. launches: counted, so that no two of a shuffled schedule are alike."""

    schedule: Schedule = field(default_factory=Schedule)
    edits: dict[str, Edit] = field(default_factory=dict)
    launches: int = 0


_state = _State()


def compiler() -> str | None:
    """The C++ compiler that kernels are made with; None: this machine has none, and nothing can be emulated."""
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


class EmulatedKernel:
    """`launch.Kernel` on the CPU: the same call, with CPU tensors."""

    def __init__(self, path: str, name: str, macros: launch.Defines = (), edit: Edit | None = None) -> None:
        source = (PLUGINS / path).read_text(encoding="utf-8")
        self.name = name
        library = _library(edit(source) if edit else source, macros)
        try:
            self._launch = getattr(library, f"emulated_launch_{name}")
        except AttributeError:
            raise ValueError(f"{path} has no kernel {name}") from None
        self._launch.restype = ctypes.c_char_p
        kinds = getattr(library, f"emulated_kinds_{name}")
        kinds.restype = ctypes.c_char_p
        self._kinds: str = kinds().decode()

    def __call__(self, grid: tuple[int, ...], block: int, *arguments: Argument, shared: int = 0) -> None:
        """Launch, and wait. EmulationError: see the module."""
        _state.launches += 1
        schedule = _state.schedule
        found = "".join("f" if isinstance(a, float) else "i" if isinstance(a, int) else "p" for a in arguments)
        if found != self._kinds:
            raise EmulationError(f"{self.name} takes {self._kinds} (p pointer, i int, f float), and was given {found}")
        options = _Options(
            ORDERS.index(schedule.order),
            schedule.seed + _state.launches,
            schedule.resident,
            schedule.together,
            schedule.stack,
        )
        with _guarded([a for a in arguments if isinstance(a, Tensor)], schedule.guarded) as places:
            values: list[ctypes.c_void_p | ctypes.c_float | ctypes.c_int32] = []
            for argument in arguments:
                if isinstance(argument, Tensor):
                    values.append(ctypes.c_void_p(places[argument.data_ptr()]))
                elif argument is None:
                    values.append(ctypes.c_void_p(0))
                elif isinstance(argument, float):
                    values.append(ctypes.c_float(argument))
                else:
                    values.append(ctypes.c_int32(argument))
            pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
            sizes = [ctypes.c_uint(size) for size in (*grid, 1, 1)[:3]]
            wrong = self._launch(*sizes, ctypes.c_uint(block), ctypes.c_int(shared), ctypes.byref(options), pointers)
            if wrong is not None:
                raise EmulationError(f"{self.name}: {wrong.decode()}")

    def use(self, block: int, shared: int = 0) -> Use:
        """What a block takes; registers and static shared memory are not known here, and count for nothing."""
        return Use.of(0, block, shared)

    @property
    def overlapping(self) -> EmulatedKernel:
        """As `launch.Kernel.overlapping`; here one launch ends before the next begins."""
        return self


@cache
def emulated_kernel(path: str, name: str, macros: launch.Defines = ()) -> EmulatedKernel:
    """The kernel `name` of plugins/<path> under these macros, for the CPU."""
    return EmulatedKernel(path, name, macros)


@contextmanager
def emulated(schedule: Schedule | None = None, edits: dict[str, Edit] | None = None) -> Iterator[None]:
    """Within: `launch.kernel` gives emulated kernels. `edits`: of sources, by their path under plugins/."""
    before = replace(_state)
    _state.schedule, _state.edits = schedule or Schedule(), edits or {}

    def make(path: str, name: str, macros: launch.Defines, device: int | None) -> EmulatedKernel:
        if path in _state.edits:
            return EmulatedKernel(path, name, macros, _state.edits[path])
        return emulated_kernel(path, name, macros)

    launch.makers.append(make)
    try:
        yield
    finally:
        launch.makers.pop()
        _state.schedule, _state.edits = before.schedule, before.edits


def _library(source: str, macros: launch.Defines) -> ctypes.CDLL:
    """A kernel source compiled for this machine, out of the cache where the same text was compiled before.

    RuntimeError: there is no compiler, or it refuses the text.
    """
    program = compiler()
    if program is None:
        raise RuntimeError(f"the emulator needs a C++ compiler, one of: {', '.join(COMPILERS)}")
    # Products and sums are rounded each, as they are written: what a GPU contracts is its compiler's choice.
    flags = ["-O1", "-std=c++17", "-fPIC", "-shared", "-w", "-fno-strict-aliasing", "-ffp-contract=off"]
    flags += ["-fno-ipa-reference", "-fno-ipa-pure-const", "-fno-ipa-modref", "-fcf-protection=none"]
    flags += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error", *_features()]
    flags += [f"-D{name}={value!r}{'f' * isinstance(value, float)}" for name, value in sorted(macros)]
    text = translate(source)
    headers = [(HERE / name).read_text(encoding="utf-8") for name in ("runtime.hpp", "builtins.hpp", "ptx.hpp")]
    digest = hashlib.sha256(repr((text, headers, flags, program)).encode()).hexdigest()[:32]
    file = cache_folder() / "emulated" / f"{digest}.so"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            text_file, out = Path(folder) / "kernel.cpp", Path(folder) / "kernel.so"
            text_file.write_text(text, encoding="utf-8")
            made = subprocess.run(
                [program, *flags, f"-I{HERE}", str(text_file), "-o", str(out)], capture_output=True, text=True
            )
            if made.returncode:
                raise RuntimeError(f"a kernel does not compile for the emulator:\n{made.stderr[:4000]}")
            out.replace(file)
    return ctypes.CDLL(str(file))


@cache
def _features() -> tuple[str, ...]:
    """Compiler flags for half conversions in hardware, where /proc/cpuinfo has them."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return ()
    return tuple(f"-m{name}" for name in ("f16c", "avx2") if name in words)


# ---- guards ------------------------------------------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)
_POISON = 0xFF  # NaN in every floating type, -1 as an integer


@dataclass
class _Region:
    """Bytes [start, end) of this process that tensors of a launch lie in, and where they are meanwhile."""

    start: int
    end: int
    place: int = 0


@contextmanager
def _guarded(tensors: list[Tensor], guarded: bool) -> Iterator[dict[int, int]]:
    """Where each tensor is during a launch, by its address: copied between two pages that may not be touched, and back.

    Tensors that overlap move together. EmulationError: the kernel wrote before a tensor's first byte or past its last.
    """
    for tensor in tensors:
        if tensor.device.type != "cpu":
            raise EmulationError(f"the emulator takes tensors of the CPU, not of {tensor.device}")
    addresses = {tensor.data_ptr() for tensor in tensors}
    if not guarded:
        yield {address: address for address in addresses}
        return
    regions: list[_Region] = []
    for start, end in sorted(_extent(tensor) for tensor in tensors):
        if regions and start < regions[-1].end:
            regions[-1].end = max(end, regions[-1].end)
        else:
            regions.append(_Region(start, end))
    maps = []
    try:
        for region in regions:
            maps.append(_Map(region.end - region.start, region.start % 16))
            region.place = maps[-1].start
            ctypes.memmove(region.place, region.start, region.end - region.start)
        # An empty tensor has no bytes to point at.
        places = dict.fromkeys(addresses, 0)
        for region in regions:
            inside = (address for address in addresses if region.start <= address < region.end)
            places.update({address: region.place + address - region.start for address in inside})
        yield places
        for region, one in zip(regions, maps, strict=True):
            if not one.intact():
                raise EmulationError(f"the kernel wrote outside of a tensor of {region.end - region.start} bytes")
            ctypes.memmove(region.start, region.place, region.end - region.start)
    finally:
        for one in maps:
            one.close()


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor, and the one after its last."""
    start = tensor.data_ptr()
    if not tensor.numel():
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


class _Map:
    """`size` bytes whose end is as near as alignment allows to a page that may not be touched; one is before them, too."""

    def __init__(self, size: int, phase: int) -> None:
        page = mmap.PAGESIZE
        room = -(-(size + 16) // page) * page
        self._map = mmap.mmap(-1, room + 2 * page)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._size, self._room = size, room
        last = self._base + page + room
        # As far from a multiple of 16 as the tensor itself: kernels may ask for alignment, and tensors lack it.
        self.start = last - size - (last - size - phase) % 16
        ctypes.memset(self._base + page, _POISON, room)
        for guard in (self._base, last):
            _protect(guard, page, 0)

    def intact(self) -> bool:
        """Whether the bytes around, within the pages, are as they were."""
        page = mmap.PAGESIZE
        begin = self._base + page
        before = ctypes.string_at(begin, self.start - begin)
        after_start = self.start + self._size
        after = ctypes.string_at(after_start, begin + self._room - after_start)
        return not (before.strip(b"\xff") or after.strip(b"\xff"))

    def close(self) -> None:
        for guard in (self._base, self._base + mmap.PAGESIZE + self._room):
            _protect(guard, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE)
        self._map = None  # type: ignore[assignment]


def _protect(address: int, size: int, access: int) -> None:
    if _libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_int(access)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
