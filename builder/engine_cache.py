"""Engines kept between builds, found by what went into them.

TensorRT-RTX's own timing cache does nothing (it says so: "timing cache operations are no-ops"), and nothing is timed. But the
same graph gives the same engine, so a finished one can stand in for a compilation: its name is a digest of the graph, the
profiles, the chip, TensorRT's version and the code that compiles.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from trtvlm.builder import compile as compiling
from trtvlm.builder.compile import Profile, compile_onnx, read_header, tensorrt_version
from trtvlm.model.errors import GraphError
from trtvlm.plugins.cuda.compiler import cache_folder

LIMIT = 8 << 30
"""Bytes that are kept; what was longest unused goes first."""


class EngineCache:
    """Engines below `folder`, of `limit` bytes at most. A folder that cannot be written is a cache that keeps nothing."""

    def __init__(self, folder: Path | None = None, limit: int = LIMIT) -> None:
        self.folder = cache_folder() / "engines" if folder is None else folder
        self.limit = limit
        self.hits = 0

    def compile(self, name: str, graph: bytes, profiles: Sequence[Profile], *, sm: int) -> bytes:
        """`compile_onnx`, or what it gave before for the same graph."""
        file = self.folder / f"sm{sm}-{_digest(graph, profiles, sm)}.engine"
        found = self._read(name, file)
        if found is not None:
            self.hits += 1
            return found
        engine = compile_onnx(name, graph, profiles, sm=sm)
        # A full disk or a folder of somebody else's costs the next build time, not this one its success.
        with contextlib.suppress(OSError):
            self._write(file, engine)
        return engine

    def _read(self, name: str, file: Path) -> bytes | None:
        try:
            engine = file.read_bytes()
            read_header(name, engine)
            os.utime(file)
        except (OSError, GraphError):
            return None
        return engine

    def _write(self, file: Path, engine: bytes) -> None:
        if len(engine) > self.limit:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        # Two builds may compile the same graph: each writes a file of its own, and renaming is atomic.
        handle, name = tempfile.mkstemp(dir=self.folder, prefix=".new-")
        try:
            with os.fdopen(handle, "wb") as new:
                new.write(engine)
            Path(name).replace(file)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        kept = 0
        for path in sorted(self.folder.glob("*.engine"), key=lambda path: path.stat().st_mtime, reverse=True):
            kept += path.stat().st_size
            if kept > self.limit:
                path.unlink(missing_ok=True)


def _digest(graph: bytes, profiles: Sequence[Profile], sm: int) -> str:
    ranges = [sorted((name, size.least, size.best, size.most) for name, size in each.items()) for each in profiles]
    code = Path(compiling.__file__).read_bytes()
    found = hashlib.sha256(repr((ranges, sm, tensorrt_version())).encode())
    for part in (hashlib.sha256(code).digest(), hashlib.sha256(graph).digest()):
        found.update(part)
    return found.hexdigest()
