"""NVIDIA's compute-sanitizer over the operators' GPU tests at small sizes: `make sanitize`, on a CUDA device.

    python -m trtvlm.scripts.sanitize [--tool memcheck --tool racecheck] [--seconds 300] [--output sanitizer]

Only this package's kernels are watched; PyTorch's own would take most of the time. How to tell them apart differs
between versions of the sanitizer, so a kernel that is wrong on purpose comes first: a filter counts if its error is seen.
Then the tools run one after the other. Exits with status 1 if a tool found anything, a test failed, or time ran out.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

from trtvlm.model.errors import UserError
from trtvlm.plugins.cuda.compiler import PLUGINS

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
TESTS = (
    "not graph and not replay and not opcheck and not 102400 and not 129280 and not (test_linear_operators and 300)"
    " and (nano or test_embedding_cuda or (test_fused_add_rms_norm_cuda and not 1000) or (test_sampling_cuda and 1024)"
    " or test_speculative_accept_cuda or (test_device and not 300 and not 40 and not do_not_take)"
    " or divide_into_no_whole_blocks)"
)
"""What pytest's -k is given: sizes of the bundled models, no CUDA graphs (they want the caching allocator), and nothing that
PyTorch's own matrix products compute (racecheck breaks in one of them, though it is told to leave it alone)."""

WRONG = {
    # Far outside, however the allocator rounds.
    "memcheck": "out[1 << 26] = 1;",
    "racecheck": "__shared__ int a[64]; a[threadIdx.x] = out[0]; out[threadIdx.x] = a[63 - threadIdx.x];",
    "synccheck": "if (threadIdx.x < 40) __syncthreads();",
    "initcheck": "out[threadIdx.x] += 1;",
}
CONTROL = "wrong_on_purpose"
FOUND = 99  # the sanitizer's exit status where it found something
_SUMMARY = re.compile(r"=+ (?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)")


@dataclass(frozen=True)
class Outcome:
    """How one tool fared. findings: None where it did not come to its summary."""

    tool: str
    findings: int | None
    status: int
    seconds: float
    tests: str
    log: Path

    @property
    def tested(self) -> bool:
        """Whether -k wanted anything there; where it did not, tools say so with a status of their own."""
        return re.fullmatch(r"\d+ deselected", self.tests.strip()) is None

    @property
    def clean(self) -> bool:
        """Nothing found, and every test passed."""
        return self.findings == 0 and self.status == 0 and "passed" in self.tests

    def line(self) -> str:
        """For people."""
        found = "no summary" if self.findings is None else f"{self.findings} found"
        word = "ok" if self.clean else "FAILED"
        return f"{self.tool:10} {word:6} {found}; {self.tests or f'status {self.status}'}; {self.seconds:.0f} s; {self.log}"


def kernel_names() -> list[str]:
    """All kernels of plugins/, and the one that is wrong on purpose."""
    pattern = re.compile(
        r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\s*\('
    )
    found = {name for file in PLUGINS.glob("*/*.cu") for name in pattern.findall(file.read_text(encoding="utf-8"))}
    return sorted(found | {CONTROL})


def filters() -> list[list[str]]:
    """Ways to say which kernels are watched, the fastest first; the last watches all."""
    ours = f"^({'|'.join(kernel_names())})$"
    # Kernels of C++ libraries have mangled names; ours are extern "C".
    return [
        ["--kernel-name", f"regex={ours}"],
        ["--kernel-name-exclude", "regex=_Z.*"],
        ["--kernel-regex-exclude", "kns=_Z"],
        [],
    ]


def command(sanitizer: str, tool: str, which: list[str], arguments: list[str]) -> list[str]:
    """What is run."""
    options = ["--tool", tool, "--target-processes", "all", "--error-exitcode", str(FOUND), "--print-limit", "20"]
    # A driver call that fails and is tried another way (cuda-core loads modules so) is no error of a kernel.
    options += ["--report-api-errors", "no"] if tool == "memcheck" else []
    return [sanitizer, *options, *which, sys.executable, *arguments]


def start(words: list[str], tool: str, log: Path) -> subprocess.Popen[bytes]:
    """Begin, with everything that is said in the log. Under memcheck every tensor gets memory of its own."""
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    if tool in ("memcheck", "initcheck"):
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    with log.open("wb") as out:
        return subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, env=environment)


def finish(process: subprocess.Popen[bytes], tool: str, log: Path, began: float, until: float) -> Outcome:
    """Wait until then at most, and read the log. 124: time ran out."""
    try:
        status = process.wait(max(0.1, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        status = 124
    text = log.read_text(encoding="utf-8", errors="replace")
    summaries = [int(number) for number in _SUMMARY.findall(text)]
    tests = re.findall(r"^=* ?((?:\d+ (?:passed|failed|deselected|skipped|errors?|warnings?)(?:, )?)+)", text, re.M)
    return Outcome(
        tool, sum(summaries) if summaries else None, status, time.monotonic() - began, tests[-1] if tests else "", log
    )


def places(tool: str) -> list[Path]:
    """What each process tests. racecheck gives up ("internal sanitizer error") in a process with hundreds of kernels."""
    if tool != "racecheck":
        return [PLUGINS]
    return sorted(file for file in PLUGINS.rglob("test_*.py") if "mark.gpu" in file.read_text(encoding="utf-8"))


def together(outcomes: list[Outcome]) -> Outcome:
    """One tool's processes as one; the log is the first with something wrong. A file of which -k wants no test is well."""
    if len(outcomes) == 1:
        return outcomes[0]
    tested = [outcome for outcome in outcomes if outcome.tested]
    wrong = next((outcome for outcome in tested if not outcome.clean), None)
    unknown = wrong is not None and wrong.findings is None
    counts = {
        word: sum(int(n) for o in tested for n in re.findall(rf"(\d+) {word}", o.tests))
        for word in ("passed", "failed")
    }
    return Outcome(
        outcomes[0].tool,
        None if unknown or not tested else sum(outcome.findings or 0 for outcome in tested),
        wrong.status if wrong else 0,
        sum(outcome.seconds for outcome in outcomes),
        ", ".join(f"{count} {word}" for word, count in counts.items() if count),
        (wrong or outcomes[-1]).log,
    )


def run_control(tool: str) -> None:
    """Launch the kernel that this tool has something to say about."""
    import tempfile

    import torch

    from trtvlm.plugins.cuda.launch import kernel

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "control.cu"
        file.write_text(f'extern "C" __global__ void __launch_bounds__(64) {CONTROL}(int* out) {{ {WRONG[tool]} }}\n')
        out = torch.empty(64, dtype=torch.int32, device="cuda")
        kernel(str(file), CONTROL)((1,), 64, out)
        torch.cuda.synchronize()


def seeing_filter(sanitizer: str, folder: Path, seconds: float, say: Callable[[str], None]) -> list[str]:
    """The first filter under which the wrong kernel is noticed. UserError: none."""
    for number, which in enumerate(filters()):
        log, began = folder / f"control-{number}.log", time.monotonic()
        words = command(sanitizer, "memcheck", which, ["-m", "trtvlm.scripts.sanitize", "--control", "memcheck"])
        outcome = finish(start(words, "memcheck", log), "memcheck", log, began, began + seconds)
        if outcome.findings:
            say(f"kernels are told apart by {' '.join(which[:1]) or 'nothing'} ({outcome.seconds:.0f} s to find out)")
            return which
    raise UserError(f"compute-sanitizer did not notice a kernel that is wrong on purpose: see {folder}/control-*.log.")


@click.command()
@click.option("--tool", "tools", multiple=True, type=click.Choice(TOOLS), default=("memcheck", "racecheck"))
@click.option("--seconds", default=300.0, help="For everything.", show_default=True)
@click.option("--tests", default=TESTS, help="What pytest's -k is given.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("sanitizer"), help="Folder for the logs.")
@click.option("--sanitizer", default="compute-sanitizer", help="The program; also looked for beside CUDA.")
@click.option("--control", type=click.Choice(TOOLS), hidden=True)
def main(tools: tuple[str, ...], seconds: float, tests: str, output: Path, sanitizer: str, control: str | None) -> None:
    """Run compute-sanitizer over the operators' tests."""
    if control is not None:
        run_control(control)
        return
    began = time.monotonic()
    program = _program(sanitizer)
    output.mkdir(parents=True, exist_ok=True)
    which = seeing_filter(program, output, seconds / 3, click.echo)
    arguments = ["-m", "pytest", "-p", "no:cacheprovider", "-v", "-m", "gpu", "-k", tests]
    outcomes = []
    for tool in tools:  # side by side, one of them has been seen to break
        found = []
        for number, place in enumerate(places(tool)):
            log, begun = output / f"{tool}-{number}.log", time.monotonic()
            process = start(command(program, tool, which, [*arguments, str(place)]), tool, log)
            found.append(finish(process, tool, log, begun, began + seconds))
        outcomes.append(together(found))
        click.echo(outcomes[-1].line())
    sys.exit(0 if all(outcome.clean for outcome in outcomes) else 1)


def _program(name: str) -> str:
    import shutil

    found = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if found is None:
        raise UserError(f"There is no {name}: it comes with the CUDA toolkit; name it with --sanitizer.")
    return found


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"{error}")
