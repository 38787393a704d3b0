"""The state of a training on disk: where a stopped run goes on. Beside the output, and gone when that is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trtvlm.model.errors import UserError

_DONE = "progress.json"


class TrainingState:
    """`OUTPUT.state/step-N/`: what accelerate saves, then progress.json; a folder without that is no state."""

    def __init__(self, output: Path) -> None:
        self.folder = output.parent / f"{output.name}.state"

    def latest(self) -> Path | None:
        """The newest whole state, if there is one."""
        whole = [path.parent for path in self.folder.glob(f"step-*/{_DONE}")]
        return max(whole, key=lambda path: int(path.name.partition("-")[2]), default=None)

    def begin(self, resume: bool, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The progress to go on from, or None for a new run.

        Raises UserError when there is a state and `resume` is off, none and it is on, or it was made with other
        `settings`.
        """
        latest = self.latest()
        if latest is None:
            if resume:
                raise UserError(f"There is nothing to resume in {self.folder}; run without --resume.")
            shutil.rmtree(self.folder, ignore_errors=True)
            return None
        if not resume:
            raise UserError(f"{self.folder} holds a stopped run: go on with --resume, or delete that folder.")
        progress: dict[str, Any] = json.loads((latest / _DONE).read_text(encoding="utf-8"))
        for name, value in settings.items():
            if progress["settings"].get(name) != value:
                raise UserError(
                    f"The run in {self.folder} was started with {name} = {progress['settings'].get(name)!r}, not "
                    f"{value!r}: give the same, or delete that folder to start anew."
                )
        return progress

    def save(self, step: int, write: Callable[[Path], None], progress: dict[str, Any]) -> None:
        """Make `step` the newest state: `write` fills the folder it is given; older ones go after this one is whole."""
        folder = self.folder / f"step-{step:08d}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write(folder)
        unfinished = folder / f"{_DONE}.part"
        unfinished.write_text(json.dumps(progress), encoding="utf-8")
        unfinished.replace(folder / _DONE)
        for other in self.folder.glob("step-*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)

    def remove(self) -> None:
        """Forget the run."""
        shutil.rmtree(self.folder, ignore_errors=True)
