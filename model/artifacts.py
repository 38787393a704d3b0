"""The directories the project writes: made whole or not at all, and the only place that knows their file names."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trtvlm.model.errors import UserError


@contextmanager
def atomic_directory(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling of `path` to write into; it becomes `path` when the block ends well, else it is removed.

    Raises UserError when `path` exists and is not an empty folder (unless `overwrite`), or cannot be written.
    """
    path = Path(path).expanduser().absolute()
    occupied = path.exists() and (not path.is_dir() or any(path.iterdir()))
    if occupied and not overwrite:
        raise UserError(f"{path} exists already: give another output, delete it, or overwrite it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): give an output in a folder you may write.") from None
    try:
        temporary.chmod(0o755)
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        temporary.rename(path)
    except OSError as error:
        raise UserError(f"Writing {path} failed ({error.strerror or error}); nothing was left there.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
