"""Measurements in a process of their own: what it leaves on the device, or breaks there, ends with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trtvlm


def lines_of(
    module: str, arguments: list[str], timeout: float, environment: Mapping[str, str] | None = None
) -> tuple[list[Any], str | None]:
    """What `python -m module` printed as lines of JSON, and why it did not end well: its last words, or the time.

    Other lines are left out, and so is what came after `timeout` seconds: the process is killed then.
    """
    path = [str(Path(trtvlm.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path)} | dict(environment or {})
    command = [sys.executable, "-m", module, *arguments]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            code: int | None = subprocess.run(command, env=env, stdout=out, stderr=err, timeout=timeout).returncode
        except subprocess.TimeoutExpired:
            code = None
        out.seek(0)
        err.seek(0)
        found = [value for line in out if (value := _parsed(line)) is not None]
        words = [line.strip() for line in err if line.strip()]
    if code is None:
        return found, f"not done in {timeout:g} s"
    return found, (words or ["it said nothing"])[-1] if code else None


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
