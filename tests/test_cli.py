"""The command line as a person meets it: help, versions, errors and interruptions."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import trtvlm
from trtvlm.model.errors import UserError
from trtvlm.scripts import cli

ROOT = Path(__file__).parent.parent
HEAVY = {"PIL", "accelerate", "fastapi", "modelopt", "numpy", "onnx", "onnxruntime", "onnxscript", "pydantic", "rich"}
HEAVY |= {"safetensors", "tensorrt", "tensorrt_rtx", "tokenizers", "torch", "transformers", "uvicorn"}


def _python(*args: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Run a Python of its own on the package of this tree."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, **kwargs
    )


def _imported(arguments: list[str]) -> set[str]:
    """Top-level modules, the standard library's left out, that a run of `trtvlm` imports."""
    code = f"""
import sys
before = set(sys.modules)
from trtvlm.scripts.cli import cli
try:
    cli({arguments!r})
except SystemExit as error:
    assert not error.code, error.code
tops = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print("\\n" + " ".join(tops - sys.stdlib_module_names))
"""
    run = _python("-c", code)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.splitlines()[-1].split())


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], Result]:
    """Run `trtvlm stub`, a command that calls the given function."""

    def run_stub(body: Callable[[], object]) -> Result:
        module = types.ModuleType("trtvlm.scripts.commands.stub")
        module.command = click.command()(lambda: body())  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(cli.COMMANDS, "stub", "A stub.")
        return CliRunner().invoke(cli.cli, ["stub"], prog_name="trtvlm")

    return run_stub


def _raise(error: BaseException) -> Callable[[], None]:
    def body() -> None:
        raise error

    return body


def test_help_imports_click_and_nothing_else() -> None:
    assert _imported(["--help"]) == {"click", "trtvlm"}


def test_help_shows_every_command_and_its_line() -> None:
    text = CliRunner().invoke(cli.cli, ["--help"], terminal_width=200).output
    for name, line in cli.COMMANDS.items():
        assert f"{name} " in text
        assert line in text


def test_help_is_the_same_however_it_is_asked_for() -> None:
    module = _python("-m", "trtvlm.scripts.cli", "--help")
    assert module.returncode == 0
    assert module.stdout.startswith("Usage: trtvlm ")
    assert module.stdout == _python("-m", "trtvlm.scripts.cli", "-h").stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_explains_itself(name: str) -> None:
    command = importlib.import_module(f"trtvlm.scripts.commands.{name.replace('-', '_')}").command
    assert command.get_short_help_str(limit=200) == cli.COMMANDS[name]
    for parameter in command.params:
        assert getattr(parameter, "help", "argument"), f"trtvlm {name} {parameter.opts[0]} has no help"
    help_text = CliRunner().invoke(cli.cli, [name, "--help"], prog_name="trtvlm").output
    assert help_text.startswith(f"Usage: trtvlm {name} ")
    assert f"\n  trtvlm {name} --" in help_text, "an example to start from"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_s_help_loads_no_framework(name: str) -> None:
    assert not _imported([name, "--help"]) & HEAVY


def test_every_command_file_is_in_the_table() -> None:
    files = (ROOT / "scripts" / "commands").glob("[!_]*.py")
    assert {file.stem.replace("_", "-") for file in files} == set(cli.COMMANDS)


def test_version() -> None:
    assert _python("-m", "trtvlm.scripts.cli", "--version").stdout == f"trtvlm {trtvlm.__version__}\n"


def test_installed_command_is_this_one() -> None:
    try:
        assert version("trtvlm") == trtvlm.__version__
    except PackageNotFoundError:
        pytest.skip("trtvlm is not installed")
    (entry,) = entry_points(group="console_scripts", name="trtvlm")
    assert entry.load() is cli.main


def test_unknown_command() -> None:
    result = CliRunner().invoke(cli.cli, ["biuld"])
    assert result.exit_code == 2
    assert "No such command 'biuld'" in result.stderr


def test_what_a_user_can_mend_is_one_sentence(run: Callable[..., Result]) -> None:
    result = run(_raise(UserError("There is no image 'a.png': name one that exists.")))
    assert result.exit_code == 2
    assert result.stderr == "Error: There is no image 'a.png': name one that exists.\n"
    assert result.stdout == ""


def test_what_a_user_cannot_mend_keeps_its_traceback(run: Callable[..., Result]) -> None:
    result = run(_raise(ValueError("ours")))
    assert isinstance(result.exception, ValueError)


def test_missing_extra_is_named(run: Callable[..., Result]) -> None:
    result = run(_raise(ModuleNotFoundError("No module named 'uvicorn'", name="uvicorn")))
    assert result.exit_code == 2
    assert result.stderr == "Error: uvicorn is not installed: run `pip install 'trtvlm[serve]'`.\n"


def test_other_missing_modules_are_not_explained_away(run: Callable[..., Result]) -> None:
    result = run(_raise(ModuleNotFoundError("No module named 'trtvlm.nothing'", name="trtvlm.nothing")))
    assert isinstance(result.exception, ModuleNotFoundError)


STUB = """
import os, signal, sys, types
import click
from trtvlm.scripts import cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit SIGINT ignored
module = types.ModuleType("trtvlm.scripts.commands.stub")
module.command = click.command()(lambda: {body})
sys.modules[module.__name__] = module
cli.COMMANDS["stub"] = "A stub."
sys.argv = ["trtvlm", "stub"]
cli.main()
"""


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_interrupted() -> None:
    run = _python("-c", STUB.format(body="os.kill(os.getpid(), signal.SIGINT)"))
    assert run.returncode == 128 + signal.SIGINT
    assert run.stderr == "\nInterrupted.\n"
    assert run.stdout == ""


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_terminated_leaves_nothing_half_made(tmp_path: Path) -> None:
    code = STUB.format(body="half_made()").replace(
        "sys.argv = ",
        f"""
def half_made():
    from trtvlm.model.artifacts import atomic_directory
    with atomic_directory({str(tmp_path / "out")!r}) as folder:
        (folder / "file").write_text("half")
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
sys.argv = """,
    )
    run = _python("-c", code)
    assert run.returncode == 128 + signal.SIGTERM, run.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("body", ['click.echo("text")', 'print("text" * 9999)'])
def test_a_reader_that_leaves_early_is_no_error(body: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", STUB.format(body=body)]
    run = subprocess.run(command, cwd=ROOT, env=env, stdout=writing, stderr=subprocess.PIPE, timeout=120)
    os.close(writing)
    assert run.stderr == b""
    assert run.returncode == 1
