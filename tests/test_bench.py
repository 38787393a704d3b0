"""`trtvlm bench` without a GPU: percentiles, the measuring loop, counted bytes, the file, tables, the chart, the command line."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tests.tiny import tiny_config, tiny_model
from trtvlm.builder.planner.bytes import step_bytes
from trtvlm.model.bench_file import check, merged, read_bench, write_bench
from trtvlm.model.bench_results import BenchResults
from trtvlm.model.cache_kind import CACHE_KINDS, CacheKind
from trtvlm.model.errors import UserError
from trtvlm.model.sizes import SIZES, language_size
from trtvlm.plugins.int4_linear.packing import unpack
from trtvlm.plugins.random_checkpoint import RandomCheckpoint
from trtvlm.plugins.speculative_accept.state import INPUTS, LIMIT, STATE_SIZE, TARGET_CURSOR
from trtvlm.runtime.cuda import measure_start
from trtvlm.runtime.cuda.child import lines_of
from trtvlm.runtime.cuda.measure import Launch, Spread, replay_times
from trtvlm.runtime.cuda.measure_baselines import (
    DIRECT,
    Baseline,
    measure,
    measure_baselines,
    transformers_config,
    ways,
)
from trtvlm.runtime.cuda.measure_decode import Bench, Step, measure_step
from trtvlm.runtime.cuda.measure_memory import Ledger, check_cap, parse_size
from trtvlm.runtime.cuda.measure_operators import kernel_bytes, measure_operators
from trtvlm.runtime.cuda.measured_model import MeasuredModel
from trtvlm.runtime.cuda.reference import reference_model
from trtvlm.runtime.cuda.weights import load_weights
from trtvlm.scripts.bench_plot import OTHER, plot, stacks
from trtvlm.scripts.bench_tables import show
from trtvlm.scripts.cli import cli

GIB = 1 << 30
SMALL = "deepseek-vl2-small"

# Times


@given(st.lists(st.floats(0.001, 1e4), min_size=1, max_size=600))
def test_percentiles_are_numpy_s(times: list[float]) -> None:
    found = Spread.of(times)
    assert found.replays == len(times)
    for percent, value in ((50, found.p50), (95, found.p95), (99, found.p99)):
        assert value == pytest.approx(np.percentile(times, percent), abs=1e-5)
    assert found.p50 == pytest.approx(statistics.median(times), abs=1e-5)


def test_no_times_have_no_percentiles() -> None:
    with pytest.raises(ValueError, match="no times"):
        Spread.of([])


class FakeClock:
    """Time passes when the fake device is told that it does."""

    def __init__(self) -> None:
        self.now, self.waits = 0.0, 0

    def mark(self) -> float:
        return self.now

    def between(self, start: float, end: float) -> float:
        return end - start

    def wait(self) -> None:
        self.waits += 1


def test_each_replay_has_inputs_of_its_own_and_is_timed_alone() -> None:
    clock, state = FakeClock(), torch.zeros(1)
    seen: list[float] = []

    def replay() -> None:
        seen.append(float(state[0]))
        clock.now += float(state[0])

    states = torch.arange(1.0, 8.0).unsqueeze(1)
    assert replay_times(replay, state, states, clock, warmup=3) == list(range(1, 8))
    assert seen == [1, 2, 3, *range(1, 8)]
    assert clock.waits == 2, "the host waits after the warm-up and at the end, never between replays"


class FakeProgram:
    """Looks at what a step is launched with; the most likely token of every row is the one after its own."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.seen: list[tuple[list[int], int, int, int]] = []
        self.found = torch.zeros(16, 4), torch.zeros(16, 4, dtype=torch.int32)

    def launch(self, tokens: torch.Tensor, cursor: torch.Tensor, rows: int, span: int) -> None:
        self.seen.append((tokens.tolist(), int(cursor), rows, span))
        self.clock.now += rows


def test_a_step_runs_from_the_tokens_to_their_acceptance(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    program = FakeProgram(clock)
    accepted: list[Any] = []

    def accept_greedy(state: Any, ring: Any, drafted: int, *, candidates: Any) -> None:
        accepted.append((drafted, candidates[0].shape, candidates[1].shape))
        clock.now += 0.5
        state[TARGET_CURSOR] += 1

    monkeypatch.setattr("trtvlm.plugins.speculative_accept.cuda.accept_greedy", accept_greedy)
    bench = Bench(100, replays=50, clock=clock, capture=lambda step: step)
    step = Step(program, 4, bench.span(4), "cpu", pinned=False)
    spread, _ = measure_step(step, step.state, 1000, 4, bench)
    assert (spread.p50, spread.p99, spread.replays) == (4.5, 4.5, 50)
    assert set(accepted) == {(3, (4, 4), (4, 4))}
    measured = program.seen[-50:]
    assert {cursor for _, cursor, _, _ in measured} == {100}, (
        "acceptance moves the cursor; every replay begins where all do"
    )
    assert {(len(tokens), rows, span) for tokens, _, rows, span in measured} == {(4, 4, 256)}
    assert len({tuple(tokens) for tokens, *_ in measured}) == 50


@pytest.mark.parametrize("rows", [1, 16])
def test_states_differ_in_their_tokens_alone(rows: int) -> None:
    states = Bench(1024, replays=500).states(102400, rows, "cpu")
    assert states.shape == (500, STATE_SIZE)
    assert states.dtype == torch.int32
    tokens = states[:, INPUTS + 1 : INPUTS + 1 + rows]
    assert len(tokens[:, 0].unique()) > 480
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < 102400
    assert set(states[:, TARGET_CURSOR].tolist()) == {1024}
    assert int(states[:, LIMIT].min()) > 500
    states[:, INPUTS : INPUTS + 1 + rows] = 0
    assert len(states.unique(dim=0)) == 1
    assert Bench(1024).span(rows) == 1280


# Bytes


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("rows", [1, 8])
def test_kernels_move_what_the_planner_counts(name: str, rows: int) -> None:
    config = language_size(name)
    found = kernel_bytes(config, "int8", rows, 1024)
    assert sum(found.values()) == pytest.approx(sum(step_bytes(config, "int4", "int8", rows, 1024).values()))
    assert ("absorb" in found) == config.use_mla
    assert found["head"] == pytest.approx(config.vocab_size * (config.hidden_size + 4) + 2 * config.hidden_size)


def test_experts_bytes_by_hand() -> None:
    config = language_size(SMALL)
    one = 2048 * 1408 * 0.53125
    found = kernel_bytes(config, "int8", 1, 1024)
    scales = 26 * 2 * 6 / 64
    # Of one row: the shared expert, as wide as two, has its first half where attention's projection and the router are.
    router, dense = 4 * 64 * 2048 + 2 * 2048, 2048 * 2048 * 0.53125 + 2 * 2048
    assert found["dense_row"] == pytest.approx(26 * (router + dense + 2 * 2 * one + 4 * 2048))
    assert found["experts_row"] == pytest.approx(26 * (6 * 3 + 2) * one + scales * (2048 + 1408) + 26 * 2 * 2816)
    assert found["attend"] == 2 * 1025 * 27 * 576
    # Of several rows up to 8, all of an expert is in one launch.
    assert (
        {"route", "experts_rows"}
        <= set(kernel_bytes(config, "int8", 4, 1024))
        == set(kernel_bytes(config, "int8", 8, 1024))
    )
    assert {"route", "experts_up", "experts_down"} <= set(kernel_bytes(config, "int8", 9, 1024))


@pytest.mark.parametrize("rows", [1, 8])
def test_latents_in_8_bits_are_what_attention_reads_less(rows: int) -> None:
    config = language_size(SMALL)
    halves, codes = (kernel_bytes(config, "int8", rows, 1024, kind) for kind in CACHE_KINDS)
    assert halves.pop("attend") - codes.pop("attend") == (1024 + rows) * 27 * 510
    assert halves == codes


@pytest.mark.parametrize("kind", CACHE_KINDS)
@pytest.mark.parametrize("name", ["nano", "nano-draft"])
def test_a_measured_cache_is_full_of_something(name: str, kind: CacheKind) -> None:
    config = dataclasses.replace(language_size(name), num_hidden_layers=1)
    model = MeasuredModel.over(load_weights(RandomCheckpoint(config, device="cpu"), "cpu"), 1, 128, kind)
    for tensor in model.cache.layers[0].tensors():
        assert bool(tensor.isfinite().all())
        assert tensor.float().flatten(0, 1).std(0).min() > 0
    assert (model.cache.layers[0].tensors()[0].dtype == torch.int8) == (config.use_mla and kind == "int8")


def test_operators_have_times_launches_and_bytes_of_one_launch() -> None:
    times = {"head": (50.0, 1), "linear": (4.0, 56), "strange": (1.0, 2)}
    found = measure_operators(
        lambda: None, torch.zeros(1), torch.zeros(1), {"head": 2e8, "linear": 5.6e8, "attend": 3e7}, lambda *_: times
    )
    assert list(found) == ["linear", "head", "strange"]
    assert found["linear"] == {"us": 4.0, "launches": 56, "bytes": 10_000_000}
    assert "bytes" not in found["strange"]


def test_rows_of_random_weights_stay_apart_and_so_do_their_experts() -> None:
    config = dataclasses.replace(
        language_size(SMALL), num_hidden_layers=7, hidden_size=1024, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=128, moe_intermediate_size=64, intermediate_size=512, n_routed_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    model = reference_model(RandomCheckpoint(config, device="cpu"), "cpu")
    with torch.no_grad():
        last = model.hidden_states(model.model.embed_tokens(torch.arange(8).unsqueeze(1)))[:, -1]
    cosines = torch.nn.functional.cosine_similarity(last.unsqueeze(0), last.unsqueeze(1), dim=-1)
    assert float((cosines - torch.eye(8)).abs().max()) < 0.4


@pytest.mark.parametrize("lm_head", ["int8", "int4"])
def test_random_codes_have_no_mean(lm_head: Any) -> None:
    checkpoint = RandomCheckpoint(tiny_config("mla").language, "int4", lm_head, device="cpu")
    codes = unpack(checkpoint.get("transformer.layers.1.mlp.fc.weight"))
    assert set(codes.unique().tolist()) == set(range(-7, 8))
    assert abs(float(codes.float().mean())) < 0.05
    head = checkpoint.get("lm_head.weight")
    values = unpack(head) if lm_head == "int4" else head
    assert int(values.min()) == -int(values.max()) == (-7 if lm_head == "int4" else -127)


# Memory


class FakeDevice:
    def __init__(self) -> None:
        self.tensors, self.cached, self.outside, self.most = 0, 0, 0, 0

    def take(self, tensors: int, outside: int = 0, passing: int = 0) -> None:
        self.tensors += tensors
        self.outside += outside
        self.cached = passing
        self.most = max(self.most, self.reserved())

    def allocated(self) -> int:
        return self.tensors

    def reserved(self) -> int:
        return self.tensors + self.cached

    def most_reserved(self) -> int:
        return self.most

    def in_use(self) -> int:
        return 1000 + self.outside + self.reserved()

    def release(self) -> None:
        self.cached = 0


def test_memory_is_told_by_part_and_at_its_peak() -> None:
    device = FakeDevice()
    device.take(0, outside=500)
    ledger = Ledger(1000, device)
    with ledger.part("weights"):
        device.take(8000, passing=3000)
    for _ in range(2):
        with ledger.part("graphs"):
            device.take(10, outside=60)
    assert ledger.to_dict() == {"parts": {"CUDA": 500, "weights": 8000, "graphs": 140}, "held": 8640, "peak": 11620}
    assert check_cap(ledger, 11620).startswith("fits: ")
    with pytest.raises(UserError, match=r"It does not fit: .* GiB were held at most, the cap is"):
        check_cap(ledger, 11619)


def test_out_of_memory_says_where_and_what_there_was() -> None:
    device = FakeDevice()
    ledger = Ledger(1000, device)
    with ledger.part("weights"):
        device.take(15 * GIB)
    words = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.80 GiB"
    with pytest.raises(UserError) as caught, ledger.part("a prompt"):
        raise torch.cuda.OutOfMemoryError(words)
    assert str(caught.value) == (
        "It does not fit: out of memory in 'a prompt' (CUDA out of memory. Tried to allocate 2.00 GiB); GiB before it: "
        "CUDA 0.00, weights 15.00."
    )


@pytest.mark.parametrize(
    ("text", "size"),
    [("20GiB", 20 * GIB), ("1.5 gib", 3 * GIB // 2), ("900MiB", 900 << 20), ("21.5GB", 21_500_000_000)],
)
def test_sizes_of_memory(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "20", "GiB", "-1GiB", "nanGiB", "infGiB", "20 GiB x"])
def test_what_is_no_size_is_one_sentence(text: str) -> None:
    with pytest.raises(UserError, match="is no size of memory"):
        parse_size(text)


# Processes of their own


def test_a_child_s_lines_of_json_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "talker.py").write_text(
        "import sys, time\nprint('{\"a\": 1}', flush=True)\nprint('words', flush=True)\nsys.stderr.write('why\\n')\n"
        "time.sleep(float(sys.argv[1]))\nsys.exit(int(sys.argv[2]))\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert lines_of("talker", ["0", "0"], 60) == ([{"a": 1}], None)
    assert lines_of("talker", ["0", "3"], 60) == ([{"a": 1}], "why")
    assert lines_of("talker", ["60", "0"], 1) == ([{"a": 1}], "not done in 1 s")


def test_a_cold_start_is_measured_twice_with_one_cache_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    caches = []

    def run(module: str, arguments: list[str], timeout: float, environment: dict[str, str]) -> Any:
        assert module == measure_start.MODULE
        assert arguments[:3] == ["random", SMALL, "int8"]
        caches.append(environment["TRTVLM_CACHE"])
        assert Path(caches[-1]).is_dir()
        return [{"imports": 1.0, "first token": 20.0 / len(caches)}], None

    monkeypatch.setattr(measure_start, "lines_of", run)
    found = measure_start.measure_start("random", SMALL, "int8")
    assert [found[how]["first token"] for how in ("compiled", "from disk")] == [20, 10]
    assert len(set(caches)) == 1
    monkeypatch.setattr(measure_start, "lines_of", lambda *_: ([], "CUDA is gone"))
    with pytest.raises(UserError, match=r"measures the cold start failed: CUDA is gone\."):
        measure_start.measure_start("random", SMALL)


def test_baselines_that_end_early_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([([{"name": "eager", "failed": "x"}], None), ([], "not done in 9 s")])
    monkeypatch.setattr("trtvlm.runtime.cuda.measure_baselines.lines_of", lambda *_: next(answers))
    found = measure_baselines(SMALL, 1024)
    assert [entry["failed"] for entry in found] == ["x", "the process ended early: not done in 9 s"]


def test_plain_attention_has_no_class_in_transformers() -> None:
    with pytest.raises(UserError, match="no class for plain attention"):
        transformers_config(tiny_config("mha").language)


# The file

SPREAD = {"p50": 0.8, "p95": 0.9, "p99": 1.0, "replays": 500}
RECORD: dict[str, Any] = {
    "schema": "trtvlm-bench", "version": 1, "gpu": "NVIDIA H200", "driver": "580.1", "torch": "2.11.0", "nvrtc": "13.0",
    "cuda_core": "1.2", "date": "2026-11-21", "command": "trtvlm bench", "context": 1024, "lm_head": "int8",
    "copy_gbps": 4000.0,
    "models": {
        SMALL: {
            "weights": "random",
            "steps": [
                {"rows": 1, "ms": SPREAD, "bytes": 1_600_000_000, "kernels": {
                    "linear": {"us": 4.0, "launches": 100, "bytes": 8_000_000}, "head": {"us": 50.0, "launches": 1}}},
                {"rows": 8, "ms": SPREAD | {"p50": 1.6, "p95": 1.7, "p99": 1.9}, "bytes": 4_000_000_000, "kernels": {
                    "linear": {"us": 6.0, "launches": 100, "bytes": 8_000_000}, "head": {"us": 60.0, "launches": 1}}},
            ],
            "speculation": {"draft": "tiny", "drafted": 4, "accepted": 2.5, "ms": SPREAD | {"p50": 0.95, "p95": 0.96}},
            "prefill": [{"tokens": 256, "ms": 7.25}],
            "vision": [{"tiles": 10, "ms": SPREAD, "tiles_a_second": 812.5}],
            "memory": {"parts": {"CUDA": GIB // 2, "weights": 9 * GIB}, "held": 19 * GIB // 2, "peak": 10 * GIB},
            "capped_memory": {"parts": {"weights": 9 * GIB}, "held": 9 * GIB, "peak": 10 * GIB, "cap": 20 * GIB,
                              "draft": "tiny"},
            "cold_start": {"compiled": {"imports": 9.0, "first token": 30.0}, "from disk": {"first token": 15.0}},
            "baselines": [{"name": "eager", "ms": SPREAD | {"p50": 60.0, "p95": 61.0, "p99": 62.0}, "seconds": 5.0},
                          {"name": "graph", "failed": "AcceleratorError: not permitted"}],
        }
    },
}  # fmt: skip


def _changed(path: str, value: Any) -> dict[str, Any]:
    """RECORD with one place changed; "..." removes it."""
    record = copy.deepcopy(RECORD)
    *way, last = path.split("/")
    at: Any = record
    for name in way:
        at = at[int(name) if isinstance(at, list) else name]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return record


def test_a_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "bench.json"
    write_bench(path, RECORD)
    assert read_bench(path) == RECORD
    assert [entry.name for entry in path.parent.iterdir()] == ["bench.json"]
    steps = BenchResults.read(path).steps[SMALL]
    assert [(step.rows, step.ms, step.launches) for step in steps] == [(1, 0.8, 101), (8, 1.6, 101)]
    assert steps[0].operators[0].share(4000.0) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("version", 2),
        ("schema", "other"),
        ("gpu", ...),
        ("copy_gbps", None),
        (f"models/{SMALL}/steps/0/ms/p99", 0.1),
        (f"models/{SMALL}/steps/0/ms/p50", float("nan")),
        (f"models/{SMALL}/steps/1/rows", 1),
        (f"models/{SMALL}/steps/0/kernels/head/us", ...),
        (f"models/{SMALL}/speculation/ms", ...),
        (f"models/{SMALL}/memory/peak", -1),
        (f"models/{SMALL}/memory/parts/weights", "much"),
        (f"models/{SMALL}/cold_start/compiled/first token", ...),
        (f"models/{SMALL}/baselines/0/ms", ...),
        ("models", []),
    ],
)
def test_a_file_that_lacks_something_is_one_sentence(tmp_path: Path, path: str, value: Any) -> None:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(_changed(path, value)), encoding="utf-8")
    with pytest.raises(UserError, match=r"bench\.json is no result of `trtvlm bench` \("):
        read_bench(file)


def test_models_of_one_machine_share_a_file() -> None:
    tiny = _changed("models", {"deepseek-vl2-tiny": RECORD["models"][SMALL], SMALL: {"vision": []}}) | {"date": "later"}
    both = merged(RECORD, tiny, Path("x"))
    check(both)
    assert set(both["models"]) == {SMALL, "deepseek-vl2-tiny"}
    assert both["models"][SMALL] == RECORD["models"][SMALL] | {"vision": []}
    assert both["date"] == "later"
    with pytest.raises(
        UserError, match=r"x was measured with torch 2\.11\.0, this run with 2\.12\.0: give another --output"
    ):
        merged(RECORD, RECORD | {"torch": "2.12.0"}, Path("x"))


def test_a_file_says_how_latents_were_cached(tmp_path: Path) -> None:
    coded = RECORD | {"kv_cache": "int8"}
    assert merged(RECORD, RECORD | {"kv_cache": "fp16"}, Path("x"))["kv_cache"] == "fp16"
    with pytest.raises(UserError, match="x was measured with kv_cache fp16, this run with int8: give another --output"):
        merged(RECORD, coded, Path("x"))
    write_bench(tmp_path / "bench.json", coded)
    assert BenchResults.read(tmp_path / "bench.json").kv_cache == "int8"
    assert "batch 1, greedy, latents cached in 8 bits" in _shown(coded)
    assert "8 bits" not in _shown(RECORD)
    with pytest.raises(ValueError, match="kv_cache is 'int3', none of fp16, int8"):
        check(RECORD | {"kv_cache": "int3"})


# Tables and the chart


def _shown(record: dict[str, Any]) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    show(record, console)
    return console.export_text()


def test_tables_say_what_was_measured() -> None:
    text = _shown(RECORD)
    rows = {line.split("  ")[0].strip(): line.split() for line in text.splitlines() if line.strip()}
    assert rows["8"] == ["8", "1.600", "1.700", "1.900", "500", "2.00", "101", "4.000", "GB", "2,500", "62%"]
    linear = next(line.split() for line in text.splitlines() if line.startswith("linear"))
    assert linear == ["linear", "100", "4.00", "400.0", "89%", "0.800", "GB", "2,000", "50%"]
    assert rows["between kernels"][-1] == "350.0"
    assert "linear  400.0 (50%)  600.0 (33%)" in text
    assert rows["2.50 of 4"] == ["2.50", "of", "4", "3,684", "0.271", "2.95"]
    assert rows["weights"][-1] == "9.000"
    assert rows["at most at any time"][-1] == "10.000"
    assert rows["first token"] == ["first", "token", "30.00", "15.00"]
    assert rows["imports"] == ["imports", "9.00", "-"]
    assert "graph: AcceleratorError: not permitted" in text
    assert "p50 0.8, p95 0.9, p99 1, replays 500" in text
    assert "A large copy on the device moved 4,000 GB/s" in text


@pytest.mark.parametrize("section", [name for name in RECORD["models"][SMALL] if name != "weights"])
def test_what_was_not_measured_is_not_shown(section: str) -> None:
    titles = set(re.findall(r"^deepseek-vl2-small: (.*)$", _shown(RECORD), re.MULTILINE))
    less = set(
        re.findall(r"^deepseek-vl2-small: (.*)$", _shown(_changed(f"models/{SMALL}/{section}", ...)), re.MULTILINE)
    )
    assert less < titles


def test_stacks_add_up_to_the_step() -> None:
    found = stacks(RECORD["models"][SMALL]["steps"])
    assert list(found) == ["linear", "head", OTHER]
    assert [sum(times[width] for times in found.values()) for width in range(2)] == pytest.approx([0.8, 1.6])


def test_the_chart_names_kernels_and_models(tmp_path: Path) -> None:
    plot(RECORD, tmp_path / "bench.svg")
    text = (tmp_path / "bench.svg").read_text(encoding="utf-8")
    for word in ("linear", "head", OTHER, SMALL, "NVIDIA H200", "rows"):
        assert word in text
    with pytest.raises(UserError, match="No decode steps were measured"):
        plot(_changed(f"models/{SMALL}/steps", ...), tmp_path / "none.svg")


# The command


def _bench(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["bench", *arguments], prog_name="trtvlm", env={"COLUMNS": "140"})


def test_a_file_is_shown_and_drawn_without_a_gpu(tmp_path: Path) -> None:
    file, chart = tmp_path / "bench.json", tmp_path / "chart.png"
    write_bench(file, RECORD)
    result = _bench("--from", str(file), "--plot", str(chart))
    assert result.exit_code == 0, result.output
    assert "deepseek-vl2-small: decode steps at a context of 1,024" in result.stdout
    assert chart.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--random", "deepseek-vl3"), "There is no model 'deepseek-vl3'"),
        (("--random", SMALL, "--draft", "deepseek-vl2-tiny"), "its vocabulary size is 129280, the target's 102400"),
        (("--engine", "nowhere"), "There is no model_config.json in nowhere"),
        (("--from", "absent.json"), "absent.json is no result of `trtvlm bench` (No such file or directory)"),
        (
            ("--random", SMALL, "--plot", "chart.txt"),
            "chart.txt cannot be drawn: give a name that ends in .svg or .png.",
        ),
        (("--random", "deepseek-vl2-tiny", "--kv-cache", "int8"), "which deepseek-vl2-tiny has not: leave it out."),
        (("--random", SMALL, "--context", "4096"), "A context of 4096 leaves no room in a cache of 4096 positions"),
        (("--random", SMALL, "--accepted", "5"), "--accepted 5 is more than the 4 tokens drafted a step"),
        (("--random", SMALL, "--memory-cap", "20GiB"), "--memory-cap runs speculative steps: give a --draft."),
        (("--random", SMALL, "--draft", SMALL, "--memory-cap", "20"), "'20' is no size of memory"),
        (("--random", SMALL, "--random", SMALL, "--memory-cap", "1GiB"), "--memory-cap is for one model at a time"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    result = _bench(*arguments)
    assert result.exit_code == 2, result.output
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    result = _bench("--random", SMALL)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: There is no CUDA GPU here: measure on a machine that has one")


@pytest.mark.parametrize("arguments", [(), ("--random", SMALL, "--from", "x"), ("--engine", "x", "--from", "y")])
def test_one_thing_is_measured_or_shown(arguments: tuple[str, ...]) -> None:
    result = _bench(*arguments)
    assert result.exit_code == 2
    assert "Give one of --random, --engine and --from." in result.stderr


# transformers, where it is installed


@pytest.mark.parametrize("kind", ["mla", "base"])
def test_the_baseline_is_the_same_model(kind: str) -> None:
    pytest.importorskip("transformers")
    from transformers import AutoModelForCausalLM

    config, model = tiny_config(kind).language, tiny_model(kind, 0).language
    baseline = AutoModelForCausalLM.from_config(transformers_config(config), dtype=torch.float32).eval()
    ours, weights = model.state_dict(), {}
    for name in baseline.state_dict():
        at, _, fused = name.rpartition(".experts.")
        if not at:
            weights[name] = ours[name]
            continue
        parts = ("gate_proj", "up_proj") if fused == "gate_up_proj" else ("down_proj",)
        experts = range(config.n_routed_experts or 0)
        weights[name] = torch.stack(
            [torch.cat([ours[f"{at}.experts.{number}.{part}.weight"] for part in parts]) for number in experts]
        )
    baseline.load_state_dict(weights)
    ids = torch.randint(config.vocab_size, (1, 12))
    with torch.no_grad():
        expected = model(model.model.embed_tokens(ids))
        torch.testing.assert_close(baseline(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_every_way_of_running_the_baseline_gives_the_same_token() -> None:
    pytest.importorskip("transformers")
    config = transformers_config(tiny_config("mla").language)
    clock = FakeClock()
    baseline = Baseline.make(config, 40, "cpu", torch.float32)
    found = {}
    for name, make in ways(baseline, DIRECT, lambda step: step):
        replay = make()
        baseline.token.fill_(7)
        baseline.rewind()
        replay()
        found[name] = int(baseline.chosen)
    assert len(found) == 5
    assert len(set(found.values())) == 1

    def replay_of(step: Launch) -> Launch:
        calls.append(step)
        if len(calls) == 2:
            raise RuntimeError("operation not permitted\nmore words")
        return step

    calls: list[Launch] = []
    entries = list(measure(config, 40, 3, DIRECT, "cpu", clock, replay_of, torch.float32))
    assert [entry["name"] for entry in entries] == list(found)
    assert [entry.get("failed") for entry in entries] == [
        None,
        None,
        None,
        "RuntimeError: operation not permitted",
        None,
    ]
