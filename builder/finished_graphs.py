"""What a build that is killed leaves of its engines: every graph that was checked and compiled, and what was said of it.

As `unfinished.FinishedLayers`, for what comes after the layers: a graph's files are on the disk before its record is, and
the record appears whole. Everything that decides the result is in a digest.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

DIGEST = "digest"


class FinishedGraphs:
    """The finished graphs of one part in `folder`; those of a build with another `digest` are forgotten."""

    def __init__(self, folder: Path, digest: str) -> None:
        self.folder = folder
        try:
            same = (folder / DIGEST).read_text(encoding="utf-8") == digest
        except OSError:
            same = False
        if same:
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / DIGEST).write_text(digest, encoding="utf-8")

    def record(self, name: str) -> dict[str, Any] | None:
        """What `finish` was told of the graph, or None: it is not finished."""
        try:
            record: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return record

    def finish(self, name: str, graph: bytes, engine: bytes, record: dict[str, Any]) -> None:
        """Keep NAME.onnx and NAME.engine, and then their record."""
        for suffix, content in (("onnx", graph), ("engine", engine)):
            _write(self.folder / f"{name}.{suffix}", content)
        new = self.folder / f"{name}.new"
        _write(new, json.dumps(record).encode())
        new.replace(self.folder / f"{name}.json")

    def place(self, name: str, folder: Path) -> None:
        """Put a finished graph's two files into `folder`: as links where the disk has them, else as copies."""
        folder.mkdir(exist_ok=True)
        for suffix in ("onnx", "engine"):
            source, target = (where / f"{name}.{suffix}" for where in (self.folder, folder))
            target.unlink(missing_ok=True)
            link(source, target)


def link(source: Path, target: Path) -> None:
    """Give a file a second name, or, where the disk has no such thing, a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
