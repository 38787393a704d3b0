"""Type-checks what calls TensorRT against the published stubs of its Python API, without TensorRT.

    python -m trtvlm.scripts.check_tensorrt_types            needs PyPI, once

The stubs (tensorrt-stubs, MIT) are unpacked under .typings/ and never installed: an installed stub makes `import tensorrt`
succeed where there is no TensorRT. mypy cannot parse five of their lines as published; those are mended.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from trtvlm.model.errors import UserError

STUBS = "tensorrt-stubs==10.13.0.35.1"
ROOT = Path(__file__).resolve().parent.parent
TYPINGS = ROOT / ".typings"
CHECKED = ("trtvlm/runtime/tensorrt", "trtvlm/plugins", "trtvlm/builder")


def take_in(stubs: str, folder: Path) -> None:
    """Download the wheel and unpack what mypy reads of it. UserError: it cannot be had."""
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place, stubs]
        if subprocess.run(command, check=False).returncode:
            raise UserError(f"{stubs} cannot be downloaded; what pip says is above.")
        (wheel,) = Path(place).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.endswith(".pyi"):
                    target = folder / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_text(mended(archive.read(name).decode()), encoding="utf-8")


def mended(text: str) -> str:
    """The stubs as Python: no parameter is called `in`, and none without a default follows one with."""
    text = re.sub(r"\bin: list\[", "in_: list[", text)
    return text.replace("power: Weights = None, channel_axis: int)", "power: Weights = None, channel_axis: int = ...)")


def main() -> int:
    """Take the stubs in where they are missing, and run mypy with them -> its exit status."""
    if not (TYPINGS / "tensorrt").is_dir():
        take_in(STUBS, TYPINGS)
    environment = os.environ | {"MYPYPATH": str(TYPINGS)}
    # A cache of its own: the other runs find no stubs.
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(ROOT / ".mypy_cache" / "tensorrt"), *CHECKED]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
