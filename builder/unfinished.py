"""What a build that is killed leaves for the next one: the layers it had finished, in a hidden folder beside its output.

A kill at any moment leaves a finished layer or nothing of it: its tensors are in the file and its outputs beside it, both on
the disk, before the journal says so, and the journal is replaced whole. Everything that decides the result is in a digest; a
build with another digest begins anew. A build that ends by itself, well or not, leaves nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trtvlm.model.artifacts import resolved
from trtvlm.model.errors import UserError

JOURNAL, WEIGHTS = "journal.json", "rank0.safetensors"


@contextmanager
def unfinished(output: Path) -> Iterator[Path]:
    """The folder beside `output` for what is not finished; only one build to `output` has it at a time.

    What killed builds left otherwise is removed. UserError: another build is at work there, or it cannot be written.
    """
    output = resolved(output)
    name = f".{output.name}.unfinished"
    folder, lock = output.with_name(name), output.with_name(f"{name}.lock")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        held = lock.open("w")
    except OSError as error:
        raise UserError(
            f"{output} cannot be written ({error.strerror}): give an output in a folder you may write."
        ) from None
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"Another build is writing {output}: wait for it, or give another output.") from None
        try:
            for left in output.parent.glob(f".{output.name}.????????"):
                shutil.rmtree(left, ignore_errors=True)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)
    finally:
        held.close()


class FinishedLayers:
    """The journal of one part: how many layers are finished, what was reported of them, and what the last one gave."""

    def __init__(self, folder: Path, digest: str) -> None:
        self.folder = folder
        self._digest = digest
        self.count, self.report = 0, {}
        try:
            journal = json.loads((folder / JOURNAL).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            journal = {}
        if journal.get("digest") == digest and (folder / WEIGHTS).is_file():
            self.count, self.report = journal["layers"], journal["report"]
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    @property
    def weights(self) -> Path:
        """The checkpoint being written."""
        return self.folder / WEIGHTS

    def outputs(self) -> list[Tensor]:
        """What the last finished layer gave, sample by sample."""
        stored = load_file(self._outputs(self.count))
        return [stored[str(index)] for index in range(len(stored))]

    def finish(self, outputs: list[Tensor], report: dict[str, Any]) -> None:
        """Another layer is finished, and its tensors are on the disk."""
        file = self._outputs(self.count + 1)
        save_file({str(index): tensor.contiguous() for index, tensor in enumerate(outputs)}, file)
        _sync(file)
        self._journal({"digest": self._digest, "layers": self.count + 1, "report": report})
        self._outputs(self.count).unlink(missing_ok=True)
        self.count += 1

    def _outputs(self, count: int) -> Path:
        return self.folder / f"outputs-{count}.safetensors"

    def _journal(self, journal: dict[str, Any]) -> None:
        new = self.folder / f"{JOURNAL}.new"
        new.write_text(json.dumps(journal), encoding="utf-8")
        _sync(new)
        new.replace(self.folder / JOURNAL)
        _sync(self.folder)


def digest_of(*parts: object) -> str:
    """A digest of values with a faithful repr, of files (their names, sizes and times) and of tensors."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            for file in sorted(path for path in part.iterdir() if path.is_file()):
                status = file.stat()
                found.update(repr((file.name, status.st_size, status.st_mtime_ns)).encode())
        elif isinstance(part, Tensor):
            found.update(repr((part.dtype, part.shape)).encode())
            found.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(part).encode())
    return found.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
