"""The GPU at hand: what it is, and how much of its memory is in use."""

from __future__ import annotations

import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from trtvlm.model.errors import UserError

GIB = 1 << 30


def check_gpu() -> None:
    """UserError unless there is a GPU that the kernels run on."""
    if not torch.cuda.is_available():
        raise UserError("There is no CUDA GPU here: measure on a machine that has one, or show a file with --from.")
    if torch.cuda.get_device_capability() < (8, 0):
        raise UserError(
            f"{torch.cuda.get_device_name()} is older than SM 8.0, which the kernels need: use another GPU."
        )


def describe() -> dict[str, Any]:
    """Names and versions of what times depend on."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": _smi("driver_version"),
        "torch": torch.__version__,
        "nvrtc": _version("nvidia-cuda-nvrtc"),
        "cuda_core": _version("cuda-core"),
    }


def bytes_in_use() -> int:
    """Of the device's memory, by all processes: contexts, modules and graphs are in it, which torch does not count.

    By nvidia-smi, which needs no context of this process; without it by the driver, which makes one.
    """
    used = _smi("memory.used")
    if used is not None and used.isdigit():
        return int(used) << 20
    free, total = torch.cuda.mem_get_info()
    return total - free


def _smi(field: str) -> str | None:
    """One field of the first GPU, or None where nvidia-smi is not there or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "-i", "0", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None if run.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
