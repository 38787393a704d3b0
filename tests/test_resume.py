"""A build that is killed goes on after its last finished layer, and ends with the very same bytes."""

from __future__ import annotations

import fcntl
import hashlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny import tiny_checkpoint
from trtvlm.builder import quantize
from trtvlm.builder.build import BuildSettings, build
from trtvlm.builder.trtllm_config import BuildConfig
from trtvlm.builder.unfinished import FinishedLayers
from trtvlm.model.errors import UserError

SETTINGS = BuildSettings(
    calibration_samples=3, verify_samples=0, compile=False, build=BuildConfig(max_seq_len=512, engines=False)
)
# The same build in a process of its own, which ends itself without a word when layer argv[3] is finished (-1: never).
BUILD = """
import os, sys
from pathlib import Path
from tests.test_resume import SETTINGS
from trtvlm.builder import build, unfinished

finish = unfinished.FinishedLayers.finish
def last(self, outputs, report):
    finish(self, outputs, report)
    if self.count == int(sys.argv[3]):
        os._exit(9)
unfinished.FinishedLayers.finish = last
build.build(sys.argv[1], Path(sys.argv[2]), SETTINGS)
"""


def digests(engine: Path) -> dict[str, str]:
    """Of every file but the report, which has times in it."""
    return {
        str(path.relative_to(engine)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(engine.rglob("*"))
        if path.is_file() and path.name != "build_report.json"
    }


def start(source: Path, output: Path, last: int = -1) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", BUILD, str(source), str(output), str(last)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], int]:
    """A checkpoint, its engine's digests when nothing goes wrong, and its layers."""
    source = tiny_checkpoint(tmp_path_factory.mktemp("in"), "mla")
    output = tmp_path_factory.mktemp("out") / "engine"
    report = build(str(source), output, SETTINGS)
    return source, digests(output), 1 + max(map(int, report["parts"]["target"]["expert_tokens"]))


def test_only_what_is_left_is_done_again(
    whole: tuple[Path, dict[str, str], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, expected, layers = whole
    output = tmp_path / "engine"
    assert start(source, output, layers - 1).wait() == 9
    assert not output.exists()
    done: list[int] = []
    write = quantize._write_layer
    monkeypatch.setattr(quantize, "_write_layer", lambda *args: (done.append(args[2]), write(*args)))
    report = build(str(source), output, SETTINGS)
    assert done == [layers - 1]
    assert digests(output) == expected
    assert report["parts"]["target"]["calibration_tokens"] > 0
    assert len(report["parts"]["target"]["expert_tokens"]) == layers - 1  # the first layer is dense
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_other_options_begin_anew(whole: tuple[Path, dict[str, str], int], tmp_path: Path) -> None:
    source, expected, _ = whole
    output = tmp_path / "engine"
    assert start(source, output, 1).wait() == 9
    build(str(source), output, BuildSettings(**{**vars(SETTINGS), "awq": "lite"}))
    other = digests(output)
    assert other.keys() == expected.keys()
    assert other["rank0.safetensors"] != expected["rank0.safetensors"]


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random(whole: tuple[Path, dict[str, str], int], tmp_path: Path, kills: int) -> None:
    source, expected, _ = whole
    output = tmp_path / "engine"
    began = time.monotonic()
    assert start(source, output).wait() == 0
    took = time.monotonic() - began
    rng = random.Random(kills)
    for kill in range(kills):
        place = tmp_path / f"engine{kill}"
        process = start(source, place)
        try:
            process.wait(timeout=took * rng.uniform(0.4, 1.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert not place.exists() or digests(place) == expected
        if not place.exists():
            assert start(source, place).wait() == 0
        assert digests(place) == expected
    assert all(not path.name.startswith(".") for path in tmp_path.iterdir())


def test_two_builds_to_one_output(whole: tuple[Path, dict[str, str], int], tmp_path: Path) -> None:
    with (tmp_path / ".engine.unfinished.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="Another build"):
            build(str(whole[0]), tmp_path / "engine", SETTINGS)


def test_a_journal_of_another_build_is_not_believed(tmp_path: Path) -> None:
    state = FinishedLayers(tmp_path / "part", "one")
    state.weights.write_bytes(b"")
    state.finish([], {})
    assert FinishedLayers(tmp_path / "part", "one").count == 1
    (tmp_path / "part" / "journal.json").write_text("{", encoding="utf-8")
    assert FinishedLayers(tmp_path / "part", "one").count == 0
    assert FinishedLayers(tmp_path / "part", "two").count == 0
