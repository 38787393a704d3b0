"""Which TensorRT builds an engine directory: TensorRT-RTX, anywhere, a chain of engines; or TensorRT, on the GPU, one engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trtvlm.builder.trtllm_config import BuildConfig
from trtvlm.model.errors import UserError

RTX, FULL = "tensorrt-rtx", "tensorrt"


def resolve(flavour: str, sm: int) -> str:
    """The flavour meant by "auto": TensorRT-RTX where it builds for `sm` (86 is 8.6), else TensorRT where that does.

    Another name is taken as it is. UserError, TensorRT-RTX's: "auto" and neither can.
    """
    if flavour != "auto":
        return flavour
    try:
        check(RTX, sm)
    except UserError as first:
        try:
            check(FULL, sm)
        except UserError:
            raise first from None
        return FULL
    return RTX


def check(flavour: str, sm: int) -> None:
    """UserError unless engines of this flavour can be built here for compute capability `sm`."""
    if flavour == FULL:
        from trtvlm.builder.one_engine import check_gpu

        check_gpu(sm)
    else:
        from trtvlm.builder.compile import check_sm

        check_sm(sm)


def build(folder: Path, limits: BuildConfig, progress: Callable[[str], None], unfinished: Path) -> list[dict[str, Any]]:
    """Build the engines of a quantized directory -> their records. An interrupted chain of engines goes on from `unfinished`."""
    sizes = {"sm": limits.sm, "max_seq_len": limits.max_seq_len, "max_width": limits.max_width}
    if limits.flavour == FULL:
        from trtvlm.builder.one_engine import build_one_engine

        return build_one_engine(folder, **sizes, progress=progress)
    from trtvlm.builder.engines import build_engines

    return build_engines(folder, **sizes, progress=progress, unfinished=unfinished)
