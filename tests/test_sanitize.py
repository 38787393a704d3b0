"""`make sanitize` says what the sanitizer said, notices when it sees nothing, and stops in time."""

import stat
from pathlib import Path

import pytest
from click.testing import CliRunner

from trtvlm.model.errors import UserError
from trtvlm.plugins.cuda.compiler import PLUGINS
from trtvlm.scripts import sanitize


def program(folder: Path, control: str, tests: str) -> str:
    """A stand-in for compute-sanitizer: one answer to the kernel that is wrong on purpose, one to the tests."""
    file = folder / "compute-sanitizer"
    file.write_text(
        f'#!/bin/sh\necho "$@" >> {folder}/calls\ncase "$*" in *--control*) {control};; *) {tests};; esac\n'
    )
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return str(file)


def run(folder: Path, control: str, tests: str, *options: str) -> tuple[int, str]:
    words = ["--sanitizer", program(folder, control, tests), "--output", str(folder / "logs"), *options]
    outcome = CliRunner().invoke(sanitize.main, words)
    if outcome.exception is not None and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    return outcome.exit_code, outcome.output


SEEN = 'echo "========= ERROR SUMMARY: 64 errors"; exit 99'
CLEAN = 'echo "==== 12 passed, 3 deselected in 2.00s ===="; echo "========= ERROR SUMMARY: 0 errors"'


def test_clean(tmp_path: Path) -> None:
    status, said = run(tmp_path, SEEN, CLEAN)
    assert status == 0
    assert "memcheck   ok     0 found; 12 passed, 3 deselected" in said
    calls = (tmp_path / "calls").read_text().splitlines()
    places = sanitize.places("racecheck")
    assert len(places) > 5
    assert len(calls) == 2 + len(places)
    assert sum("--tool racecheck" in call for call in calls) == len(places)
    assert f"racecheck  ok     0 found; {12 * len(places)} passed" in said
    assert all("|experts_up|" in call and sanitize.CONTROL in call for call in calls)


def test_a_file_without_tests_is_well(tmp_path: Path) -> None:
    none = 'case "$*" in *test_turns.py*) echo "= 14 deselected in 3.1s ="; exit 255;; esac; '
    status, said = run(tmp_path, SEEN, none + CLEAN, "--tool", "racecheck")
    assert status == 0
    assert f"racecheck  ok     0 found; {12 * (len(sanitize.places('racecheck')) - 1)} passed" in said


@pytest.mark.parametrize(
    ("tests", "words"),
    [
        ('echo "= 12 passed in 1s ="; echo "========= RACECHECK SUMMARY: 3 hazards displayed (1 error)"; exit 99', "3 found"),
        ('echo "= 1 failed, 11 passed in 1s ="; echo "========= ERROR SUMMARY: 0 errors"; exit 1', "1 failed, 11 passed"),
        ('echo "= 12 deselected in 1s ="; echo "========= ERROR SUMMARY: 0 errors"', "12 deselected"),
        ('echo "= 12 passed in 1s ="', "no summary"),
        ("exit 3", "status 3"),
        ("exec sleep 60", "status 124"),
    ],
)  # fmt: skip
def test_anything_else_is_not(tmp_path: Path, tests: str, words: str) -> None:
    status, said = run(tmp_path, SEEN, tests, "--seconds", "2", "--tool", "memcheck")
    assert status == 1
    assert "memcheck   FAILED" in said
    assert words in said


def test_a_sanitizer_that_sees_nothing_is_no_proof(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="wrong on purpose"):
        run(tmp_path, CLEAN, CLEAN)
    # Every way to tell kernels apart was tried, and none at last.
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == len(sanitize.filters())
    assert "--kernel" not in calls[-1]


def test_no_sanitizer() -> None:
    with pytest.raises(UserError, match="no-such-program"):
        CliRunner().invoke(sanitize.main, ["--sanitizer", "no-such-program"], catch_exceptions=False)


def test_every_kernel_is_named() -> None:
    names = sanitize.kernel_names()
    assert {"linear", "route", "experts_up", "attend", "head", "gemm", "grouped", "refine_1"} <= set(names)
    sources = [file.read_text() for file in PLUGINS.glob("*/*.cu")]
    assert sum(text.count("__global__ void") for text in sources) >= len(names) - 1
