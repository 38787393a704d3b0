"""GPUs by name, from NVIDIA's data sheets and architecture papers."""

from __future__ import annotations

import re
from dataclasses import dataclass

from trtvlm.model.errors import UserError


@dataclass(frozen=True)
class GPU:
    """Memory in GiB, bandwidth in GB/s (1e9 bytes), and dense float16 tensor TFLOP/s with float32 accumulation.

    GeForce cards accumulate in float32 at half their float16 rate; professional and data-centre cards at the full one.
    """

    name: str
    memory_gib: float
    bandwidth_gbps: float
    multiprocessors: int
    compute_capability: tuple[int, int]
    tensor_tflops: float

    @property
    def memory(self) -> int:
        """Memory in bytes."""
        return int(self.memory_gib * 2**30)


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("rtx3060", 12, 360, 28, (8, 6), 25.5),
        GPU("rtx3080", 10, 760, 68, (8, 6), 59.5),
        GPU("rtx3090", 24, 936, 82, (8, 6), 71.0),
        GPU("rtx3090ti", 24, 1008, 84, (8, 6), 80.0),
        GPU("rtx4080", 16, 717, 76, (8, 9), 97.5),
        GPU("rtx4090", 24, 1008, 128, (8, 9), 165.2),
        GPU("a10", 24, 600, 72, (8, 6), 125.0),
        GPU("a100-40g", 40, 1555, 108, (8, 0), 312.0),
        GPU("a100-80g", 80, 2039, 108, (8, 0), 312.0),
        GPU("l4", 24, 300, 58, (8, 9), 121.0),
        GPU("h100", 80, 3350, 132, (9, 0), 989.0),
        GPU("h200", 140, 4800, 132, (9, 0), 989.0),
        GPU("a4000", 16, 448, 48, (8, 6), 76.7),
        GPU("a5000", 24, 768, 64, (8, 6), 111.1),
        GPU("a6000", 48, 768, 84, (8, 6), 154.8),
    )
}


def find_gpu(name: str) -> GPU:
    """The GPU of that name, or of the name a driver gives it; capitals, blanks and dashes do not matter.

    UserError lists the names.
    """
    wanted = re.sub(r"^(nvidia)?(geforce)?", "", _folded(name))
    for key, gpu in GPUS.items():
        if _folded(key) in (wanted, wanted.removeprefix("rtx")):
            return gpu
    raise UserError(f"The GPU '{name}' is not in the table; give one of {', '.join(GPUS)}.")


def _folded(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()
