"""Lets `pytest plugins/x` mean `pytest trtvlm/plugins/x`, and hypothesis take its time.

The code folders are reached through the links in `trtvlm/`; collected under their own names, their tests would import
an operator a second time and register it twice.
"""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

_ROOT = Path(__file__).parent
_FOLDERS = ("model", "plugins", "builder", "draft", "runtime", "scripts")

# How long an example takes depends on the machine and its neighbours, and is no failure.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_configure(config: pytest.Config) -> None:
    """Prefix `trtvlm/` to arguments inside a code folder."""
    config.args = [_linked(argument) for argument in config.args]


def _linked(argument: str) -> str:
    path, separator, test = argument.partition("::")
    # Not resolved: that would follow the links back.
    absolute = Path(path) if Path(path).is_absolute() else Path.cwd() / path
    if not absolute.is_relative_to(_ROOT):
        return argument
    relative = absolute.relative_to(_ROOT)
    if not relative.parts or relative.parts[0] not in _FOLDERS:
        return argument
    return f"{_ROOT / 'trtvlm' / relative}{separator}{test}"
