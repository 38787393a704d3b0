"""CUDA C++ to machine code with NVRTC, on any machine, for any architecture; the result is cached on disk."""

from __future__ import annotations

import hashlib
import io
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from trtvlm.model.errors import UserError

PLUGINS = Path(__file__).parent.parent
INCLUDE = Path(__file__).parent / "include"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90")
"""What every kernel must compile for. sm_90 stands for what is newer: the sources use SM 8.0 instructions only."""
SHARED_LIMIT = 99 * 1024
"""Shared memory a block may use on SM 8.6, bytes (CUDA C++ programming guide, compute capabilities)."""

_USAGE = re.compile(
    r"Function properties for (\w+)\s+ptxas\s+\.?\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)"
)
_REGISTERS = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


@dataclass(frozen=True)
class Usage:
    """What one kernel takes: registers a thread; stack and spilled bytes a thread; static shared bytes a block."""

    registers: int
    stack: int
    spilled: int
    shared: int


def cache_folder() -> Path:
    """Where compiled kernels are kept: $TRTVLM_CACHE, or the user's cache folder."""
    base = os.environ.get("TRTVLM_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "trtvlm"


def compile_source(source: str, defines: Mapping[str, int | float], arch: str) -> tuple[bytes, dict[str, Usage]]:
    """Machine code of a CUDA C++ source and what each of its kernels takes.

    UserError when NVRTC is not installed; RuntimeError with the compiler's words when the source does not compile.
    """
    try:
        from cuda.core import Program, ProgramOptions
    except ImportError:
        raise UserError("CUDA kernels need the package cuda-core: install trtvlm[cuda].") from None
    macros: list[str | tuple[str, str]] = [(name, _literal(value)) for name, value in sorted(defines.items())]
    options = ProgramOptions(
        arch=arch,
        std="c++17",
        include_path=[str(INCLUDE), str(PLUGINS)],
        define_macro=macros or None,
        ptxas_options=["-v"],
    )
    log = io.StringIO()
    try:
        program = Program(source, "c++", options)
        code = program.compile("cubin", logs=log).code
    except Exception as error:
        raise RuntimeError(
            f"a kernel does not compile for {arch} with {dict(defines)}:\n{error}\n{log.getvalue()}"
        ) from error
    return bytes(code), usages(log.getvalue())


def usages(log: str) -> dict[str, Usage]:
    """Read what ptxas says with -v: kernel name -> what it takes; of functions that kernels call, no registers are told."""
    found: dict[str, Usage] = {}
    for properties in _USAGE.finditer(log):
        following = _USAGE.search(log, properties.end())
        used = _REGISTERS.search(log, properties.end(), following.start() if following else len(log))
        stores, loads = int(properties[3]), int(properties[4])
        registers, shared = (int(used[1]), int(used[2] or 0)) if used else (0, 0)
        found[properties[1]] = Usage(registers, int(properties[2]), stores + loads, shared)
    return found


@cache
def cubin(path: str, defines: tuple[tuple[str, int | float], ...], arch: str) -> bytes:
    """Machine code of `plugins/<path>`, out of the cache where the same text was compiled before."""
    source = (PLUGINS / path).read_text(encoding="utf-8")
    digest = hashlib.sha256(
        repr((source, _includes(source), sorted(defines), arch, _nvrtc_version())).encode()
    ).hexdigest()
    file = cache_folder() / "kernels" / f"{Path(path).parent.name}-{arch}-{digest[:32]}.cubin"
    if file.exists():
        return file.read_bytes()
    code, _ = compile_source(source, dict(defines), arch)
    file.parent.mkdir(parents=True, exist_ok=True)
    # Two processes may compile the same kernel: each writes its own file, and renaming is atomic.
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as out:
        out.write(code)
    Path(out.name).replace(file)
    return code


def _includes(source: str) -> list[str]:
    """The texts of all headers a source includes, directly or not."""
    texts: list[str] = []
    for name in re.findall(r'#include "([^"]+)"', source):
        header = next((folder / name for folder in (INCLUDE, PLUGINS) if (folder / name).exists()), None)
        if header is not None:
            text = header.read_text(encoding="utf-8")
            texts += [text, *_includes(text)]
    return texts


@cache
def _nvrtc_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    for name in ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12", "cuda-bindings"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return "unknown"


def _literal(value: int | float) -> str:
    return f"{value!r}f" if isinstance(value, float) else str(value)
