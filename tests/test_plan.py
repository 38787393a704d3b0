"""`trtvlm plan`: sizes against the published ones, bytes against the anchors, and what a projection may say."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import tiny_config
from trtvlm.builder.planner.building import building
from trtvlm.builder.planner.bytes import step_bytes
from trtvlm.builder.planner.fits import SHARED_BYTES, cache_bytes, card_memory, image_bytes, needed, prefill_bytes
from trtvlm.builder.planner.gpus import GPUS, find_gpu
from trtvlm.builder.planner.parts import (
    ATTENTION,
    HEAD,
    PARTS,
    PROJECTOR,
    ROUTED,
    VISION,
    parts,
    total,
    unused_parameters,
)
from trtvlm.builder.planner.projection import (
    Basis,
    Decoding,
    Measured,
    Range,
    first_token,
    floor_ms,
    image_tokens,
    speculation,
    view_flops,
)
from trtvlm.builder.stream import nbytes
from trtvlm.model import bench_results
from trtvlm.model.bench_results import BenchResults, Operator
from trtvlm.model.cache_kind import CACHE_KINDS
from trtvlm.model.config import ModelConfig
from trtvlm.model.errors import UserError
from trtvlm.model.presets import PRESETS, preset, preset_of, read_config
from trtvlm.model.vision import Projector, VisionTower
from trtvlm.model.vlm import DeepseekVL2
from trtvlm.plugins.quantized_checkpoint import QUANTIZATIONS, layout
from trtvlm.plugins.step_bytes import CACHE, expected_experts
from trtvlm.scripts.cli import cli

TINY, SMALL, BASE = PRESETS
RTX3090, H200 = GPUS["rtx3090"], GPUS["h200"]


def _step(name: str, kind: Any = "int4", head: Any = "int8", rows: int = 1, context: int = 0) -> float:
    return sum(step_bytes(preset(name).language, kind, head, rows, context).values())


# Parameters


@pytest.mark.parametrize(("name", "gigabytes"), [(TINY, 6.74), (SMALL, 32.3)])
def test_parameters_are_those_of_the_published_files(name: str, gigabytes: float) -> None:
    config = preset(name)
    stored = total(parts(config, "fp16", "fp16").values()).parameters + unused_parameters(config)
    assert 2 * stored / 1e9 == pytest.approx(gigabytes, rel=2e-3)


def test_the_largest_has_27_billion_parameters() -> None:
    assert total(parts(preset(BASE), "int4", "int8").values()).parameters / 1e9 == pytest.approx(27.5, rel=2e-3)


@pytest.mark.parametrize("kind", ["mla", "mha", "base"])
def test_parts_are_the_model_s_parameters(kind: str) -> None:
    config = tiny_config(kind)
    with torch.device("meta"):
        model = DeepseekVL2(config)
    found = parts(config, "int4", "int8")
    assert tuple(found) == PARTS
    assert total(found.values()).parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found[HEAD].parameters == model.language.lm_head.weight.numel()
    experts = [p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name]
    assert found[ROUTED].parameters == sum(experts)
    assert found[ROUTED].active == sum(experts) * 2 // 4
    attention = sum(p.numel() for name, p in model.named_parameters() if ".self_attn." in name)
    assert found[ATTENTION].parameters == attention


@pytest.mark.parametrize(("name", "body"), [(TINY, 0.41e9), (SMALL, 2.24e9), (BASE, 3.79e9)])
def test_active_parameters_are_the_anchor_s(name: str, body: float) -> None:
    found = parts(preset(name), "int4", "int8")
    assert total(found.values()).active - found[HEAD].active == pytest.approx(body, rel=5e-3)


# Bytes


@pytest.mark.parametrize("quant", QUANTIZATIONS)
@pytest.mark.parametrize("head", ["fp16", "int8", "int4"])
def test_checkpoint_bytes_are_those_of_the_layout(quant: str, head: Any) -> None:
    config, kind = tiny_config("base"), QUANTIZATIONS[quant]
    found = parts(config, kind, head)
    vision = 2 * (found[VISION].parameters + found[PROJECTOR].parameters)
    stored = sum(nbytes(spec) for spec in layout(config.language, kind, head).values())
    assert total(found.values()).checkpoint_bytes == stored + vision


@pytest.mark.parametrize("name", PRESETS)
def test_int4_weights_take_0_53125_bytes_on_the_device(name: str) -> None:
    routed = parts(preset(name), "int4", "int8")[ROUTED]
    language = preset(name).language
    scales = 2 * (language.hidden_size + language.moe_intermediate_size) * (language.num_hidden_layers - 1)
    assert routed.device_bytes == 0.53125 * routed.parameters + scales
    assert routed.device_bytes < routed.checkpoint_bytes


ANCHORS = {  # gigabytes a token with a head of 16, 8 and 4 bits, all else at 4.156 bits
    TINY: (0.54, 0.38, 0.30),
    SMALL: (1.59, 1.38, 1.28),
    BASE: (2.64, 2.31, 2.15),
}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("head", [0, 1, 2])
def test_bytes_a_token_are_the_anchor_s_but_for_what_stays_in_16_bits(name: str, head: int) -> None:
    language = preset(name).language
    kind: Any = ("fp16", "int8", "int4")[head]
    found = _step(name, head=kind)
    latent = 0
    if language.use_mla:
        rank, rope = language.kv_lora_rank or 0, language.qk_rope_head_dim
        up = language.num_attention_heads * (language.qk_nope_head_dim + language.v_head_dim)
        latent = language.num_hidden_layers * ((rank + rope) * language.hidden_size + up * rank)
    # The anchors count latent projections at 4.156 bits too.
    assert found - latent * (2 - 4.156 / 8) == pytest.approx(1e9 * ANCHORS[name][head], rel=0.05)


@pytest.mark.parametrize(("name", "gigabytes"), [(SMALL, 4.90), (BASE, 8.24)])
def test_16_bit_bytes_a_token_are_the_anchor_s(name: str, gigabytes: float) -> None:
    assert _step(name, "fp16", "fp16") / 1e9 == pytest.approx(gigabytes, rel=0.005)


def test_rows_cost_what_the_anchors_say() -> None:
    # The anchors' multiples, for a head of 16 bits; ours have more bytes that rows share, the latent projections.
    anchors = {2: 1.40, 3: 1.76, 4: 2.09, 5: 2.39, 6: 2.66, 8: 3.12, 12: 3.82, 16: 4.29}
    for rows, multiple in anchors.items():
        found = _step(SMALL, head="fp16", rows=rows) / _step(SMALL, head="fp16")
        assert 0.93 * multiple < found < multiple


@pytest.mark.parametrize(("experts", "chosen", "rows"), [(4, 2, 2), (5, 1, 3), (4, 3, 3)])
def test_expected_experts_are_the_mean_over_all_draws(experts: int, chosen: int, rows: int) -> None:
    draws = list(itertools.combinations(range(experts), chosen))
    counts = [len(set().union(*picked)) for picked in itertools.product(draws, repeat=rows)]
    assert expected_experts(experts, chosen, rows) == pytest.approx(sum(counts) / len(counts))


@given(st.integers(1, 128), st.data(), st.integers(1, 32))
def test_experts_grow_with_rows_and_never_beyond_all(experts: int, data: st.DataObject, rows: int) -> None:
    chosen = data.draw(st.integers(1, experts))
    found = expected_experts(experts, chosen, rows)
    assert chosen - 1e-9 <= found <= min(experts, rows * chosen) + 1e-9
    assert found <= expected_experts(experts, chosen, rows + 1) + 1e-9


@given(
    st.sampled_from(["mla", "mha", "base"]),
    st.sampled_from(["fp16", "int8", "int4"]),
    st.integers(1, 16),
    st.integers(0, 1000),
)
def test_bytes_grow_with_rows_and_context_and_never_beyond_all_weights(
    kind: str, quant: Any, rows: int, context: int
) -> None:
    language = tiny_config(kind).language
    found, more = (step_bytes(language, quant, "int8", n, context) for n in (rows, rows + 1))
    assert sum(found.values()) < sum(more.values())
    assert all(more[name] >= found[name] for name in found)
    everything = parts(tiny_config(kind), quant, "int8")
    assert all(
        found[name] <= everything[name].device_bytes for name in found if name in everything and name != "embeddings"
    )
    longer = step_bytes(language, quant, "int8", rows, context + 1)
    width = 64 + 16 if language.use_mla else 2 * 64
    assert longer[CACHE] - found[CACHE] == 2 * 3 * width
    assert sum(longer.values()) - sum(found.values()) == pytest.approx(longer[CACHE] - found[CACHE])


# Memory


@pytest.mark.parametrize(("name", "width", "layers"), [(TINY, 2 * 1280, 12), (SMALL, 576, 27), (BASE, 576, 30)])
def test_cache_is_latent_or_heads(name: str, width: int, layers: int) -> None:
    assert cache_bytes(preset(name).language, 4096) == 2 * 4096 * width * layers
    assert cache_bytes(preset(name).language, 65) == 2 * 128 * width * layers


@pytest.mark.parametrize(("name", "layers"), [(SMALL, 27), (BASE, 30)])
def test_latents_in_8_bits_take_a_byte_and_a_scale(name: str, layers: int) -> None:
    config = preset(name)
    assert cache_bytes(config.language, 4096, "int8") == 4096 * layers * (512 + 2 + 2 * 64)
    halves, codes = (card_memory(config, "int4", "int8", 4096, 10, 8, kind) for kind in CACHE_KINDS)
    # What the codes of one layer say is there while a prompt is computed.
    assert 0 < codes.prefill - halves.prefill <= 2 * 4096 * 512
    assert halves.held - codes.held > 0.4 * halves.cache
    found, other = (step_bytes(config.language, "int4", "int8", 5, 1024, kind) for kind in CACHE_KINDS)
    assert found[CACHE] - other[CACHE] == 1029 * layers * (512 - 2)
    assert {key: size for key, size in found.items() if key != CACHE} == {
        key: size for key, size in other.items() if key != CACHE
    }


def test_keys_and_values_are_as_they_were() -> None:
    language = preset(TINY).language
    assert cache_bytes(language, 4096, "int8") == cache_bytes(language, 4096)
    assert step_bytes(language, "int4", "int8", 1, 9, "int8") == step_bytes(language, "int4", "int8", 1, 9)


def test_image_activations_are_what_pytorch_allocates() -> None:
    config = preset(TINY)
    vision = dataclasses.replace(config.vision, layers=2)
    with torch.no_grad():
        tower, projector, pixels = VisionTower(vision), Projector(config.projector), torch.zeros(2, 3, 384, 384)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
            projector(tower(pixels))
    assert profiled.profiler is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    # float32 here, halves on a card; the pixels were there before.
    assert image_bytes(config, 2) - 2 * pixels.numel() == pytest.approx(max(live) / 2, rel=0.02)


@pytest.mark.parametrize("name", PRESETS)
def test_memory_grows_with_what_is_asked(name: str) -> None:
    config = preset(name)
    small = needed([card_memory(config, "int4", "int8", 1024, 2, 8)])
    assert small > total(parts(config, "int4", "int8").values()).device_bytes
    assert small <= needed([card_memory(config, "int4", "int8", 4096, 2, 8)])
    assert small <= needed([card_memory(config, "int4", "int8", 1024, 10, 8)])
    assert small < needed([card_memory(config, "int8", "int8", 1024, 2, 8)])
    assert small < needed([card_memory(config, kind, "int8", 1024, 2, 8) for kind in ("int4", "int4")])


def test_a_pair_shares_what_is_gone_after_a_prompt() -> None:
    config = preset(SMALL)
    alone = card_memory(config, "int4", "int8", 4096, 10, 8)
    assert alone.running == alone.held + max(alone.image, alone.prefill)
    assert needed([alone, alone]) == SHARED_BYTES + 2 * alone.held + max(alone.image, alone.prefill)


def test_a_prompt_is_bounded_by_a_chunk_and_by_what_is_attended_to() -> None:
    small, tiny = (prefill_bytes(preset(name).language, 4096) for name in (SMALL, TINY))
    # Of 1,024 rows: 14 bytes a value of the residual stream, and six experts' inner and outer halves with the shared one's.
    assert small == 1024 * (14 * 2048 + 2 * (2048 + 6 * (2048 + 1408) + 2 * 1408))
    assert tiny == prefill_bytes(preset(TINY).language, 1024) < small
    base = preset(BASE).language
    assert prefill_bytes(base, 4096) == 1024 * 14 * 2560 + 2 * (1024 * (32 * 320 + 576) + (4096 + 512) * 32 * 256)
    assert prefill_bytes(base, 4096) > prefill_bytes(base, 1024) > prefill_bytes(base, 100)


@pytest.mark.parametrize("name", PRESETS)
def test_no_stage_of_a_build_holds_an_official_model_whole(name: str) -> None:
    found = building(preset(name), "int4", "int8")
    whole = 4 * total(parts(preset(name), "int4", "int8").values()).parameters
    assert found["verify"] == 0
    assert 8e9 < found["compile"] < 20e9
    assert found["quantize"] < 32e9
    assert building(preset(name), "int8", "int8")["quantize"] < found["quantize"]
    assert max(found.values()) < whole or name == TINY


def test_a_small_model_is_read_with_whole() -> None:
    config = read_config("nano")
    whole = total(parts(config, "int4", "int8").values())
    assert building(config, "int4", "int8")["verify"] > 8 * whole.parameters


# GPUs


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("rtx3090", "rtx3090"),
        ("RTX 3090 Ti", "rtx3090ti"),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("NVIDIA H200", "h200"),
        ("A100_80g", "a100-80g"),
        ("NVIDIA RTX A4000", "a4000"),
    ],
)
def test_a_gpu_is_found_however_it_is_written(said: str, name: str) -> None:
    assert find_gpu(said) is GPUS[name]


@pytest.mark.parametrize("name", ["", "rtx", "rtx30900", "tpu"])
def test_an_unknown_gpu_ends_in_a_sentence_that_lists_them(name: str) -> None:
    with pytest.raises(UserError) as caught:
        find_gpu(name)
    assert str(caught.value) == f"The GPU '{name}' is not in the table; give one of {', '.join(GPUS)}."


# Presets


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_configuration_like_any_other(name: str) -> None:
    config = preset(name)
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert preset_of(config.language) == name
    assert preset_of(dataclasses.replace(config.language, eos_token_id=7, n_group=None)) == name
    assert preset_of(dataclasses.replace(config.language, num_hidden_layers=5)) is None
    assert config.image_tokens(1, 1) == 421
    assert config.image_tokens(3, 3) == 2017
    assert (image_tokens(config, 10), image_tokens(config, 2), image_tokens(config, 1)) == (2101, 421, 421)


def test_of_a_hub_name_only_the_configuration_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        (tmp_path / file).write_text(json.dumps(preset(SMALL).to_dict()), encoding="utf-8")
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert read_config("deepseek-ai/deepseek-vl2-small") == preset(SMALL)
    assert asked == [("deepseek-ai/deepseek-vl2-small", "config.json")]


def test_what_cannot_be_fetched_names_the_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: str) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(UserError, match=f"no route.*{SMALL}"):
        read_config("nobody/nothing")
    with pytest.raises(UserError, match=SMALL):
        read_config("nothing")


def test_folders_and_bundled_models_are_read() -> None:
    assert read_config("nano").language.num_hidden_layers == 6


# Projection

STEPS = [Measured(1e9, 1.0, 100), Measured(3e9, 2.0, 100)]


def test_on_the_measured_gpu_the_projection_is_the_measurement() -> None:
    basis = Basis.of(H200, STEPS)
    assert basis.on(H200, 1e9) == Range(1.0, 1.0)
    assert basis.on(H200, 3e9) == Range(2.0, 2.0)
    assert basis.on(H200, 2e9) == Range(1.5, 1.5)
    assert basis.share == pytest.approx(2 / 4.8)
    assert basis.fixed_ms == pytest.approx(0.5)
    assert basis.fixed_us_a_launch == pytest.approx(5)


def test_elsewhere_only_the_bytes_change() -> None:
    found = Basis.of(H200, STEPS).on(RTX3090, 1e9)
    more = 1e9 / 936e6 - 1e9 / 4800e6
    assert found.low == pytest.approx(1 + more)
    assert found.high == pytest.approx(1 + more / (2 / 4.8))
    copying = Basis.of(H200, STEPS, copy_gbps=4000).on(RTX3090, 1e9)
    assert copying.low == pytest.approx(1 + more * 1.2)
    assert copying.high == pytest.approx(found.high)


@given(
    st.lists(st.tuples(st.floats(1e6, 1e11), st.floats(1.01, 100)), min_size=1, max_size=4),
    st.floats(1e6, 1e11),
    st.sampled_from(sorted(GPUS)),
)
def test_a_projection_is_a_range_above_the_floor(steps: list[tuple[float, float]], moved: float, name: str) -> None:
    measured = [Measured(count, factor * floor_ms(count, H200), 10) for count, factor in steps]
    found = Basis.of(H200, measured).on(GPUS[name], moved)
    assert floor_ms(moved, GPUS[name]) <= found.low <= found.high < math.inf


def test_one_measured_step_scales_as_a_whole() -> None:
    basis = Basis.of(H200, STEPS[:1])
    assert basis.fixed_ms == pytest.approx(0)
    assert basis.on(RTX3090, 1e9).high == pytest.approx(4800 / 936)


def test_speculation_by_hand() -> None:
    def target(rows: int) -> Decoding:
        return Decoding(1.0 + 0.25 * rows, Range(2.0 * rows, 3.0 * rows))

    def draft(rows: int) -> Decoding:
        return Decoding(0.1 * rows, Range(0.5, 1.0))

    found = speculation(target, draft, drafted=3, accepted=1.5)
    assert found.tokens_a_step == 2.5
    assert found.decoding.floor_ms == pytest.approx((2.0 + 0.2 + 0.1 + 0.1) / 2.5)
    assert found.decoding.projected_ms is not None
    assert found.decoding.projected_ms.low == pytest.approx((8 + 1.5) / 2.5)
    assert found.decoding.projected_ms.high == pytest.approx((12 + 3) / 2.5)
    assert found.break_even_floor == pytest.approx(2.4 / 1.25)
    assert found.break_even == Range(pytest.approx(9.5 / 2), pytest.approx(15 / 3))
    unknown = speculation(target, lambda rows: Decoding(0.1, None), 3, 1.5)
    assert unknown.decoding.projected_ms is None
    assert unknown.break_even is None


def test_before_the_first_token_is_the_anchor_s_page() -> None:
    config = preset(SMALL)
    assert view_flops(config) / 1e12 == pytest.approx(0.65, rel=0.05)
    found = first_token(config, RTX3090, 10)
    assert found.vision_flops / 71e9 == pytest.approx(0.65e13 / 71e9, rel=0.05)
    assert found.prefill_flops == pytest.approx(2101 * 2 * 2.2417e9, rel=1e-3)


# Measurements

FILE: dict[str, Any] = {
    "gpu": "NVIDIA H200",
    "date": "2026-11-21",
    "command": "bench",
    "context": 1024,
    "lm_head": "int8",
    "models": {
        SMALL: {
            "steps": [
                {"rows": 4, "ms": {"p50": 1.5}, "kernels": {"head": {"us": 50.0, "launches": 1}}},
                {
                    "rows": 1,
                    "ms": {"p50": 1.0},
                    "kernels": {"head": {"us": 50.0, "launches": 1, "bytes": 200_000_000}},
                },
            ]
        }
    },
}


def _file(folder: Path, raw: object) -> Path:
    path = folder / "decode.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    return path


def test_measurements_are_read(tmp_path: Path) -> None:
    found = BenchResults.read(_file(tmp_path, FILE | {"copy_gbps": 4000}))
    assert [(step.rows, step.ms, step.launches) for step in found.steps[SMALL]] == [(1, 1.0, 1), (4, 1.5, 1)]
    assert found.steps[SMALL][0].operators == (Operator("head", 50.0, 1, 200_000_000),)
    assert found.steps[SMALL][0].operators[0].share(4000) == pytest.approx(1.0)
    assert found.steps[SMALL][1].operators[0].share(4000) is None


@pytest.mark.parametrize(
    "raw",
    [
        [],
        {},
        "text",
        FILE | {"models": {SMALL: {"steps": [{"rows": 1, "ms": {"p50": 0}, "kernels": {}}]}}},
        FILE | {"models": {SMALL: {"steps": [{"rows": 1, "ms": {"p50": 1}, "kernels": {}}] * 2}}},
        FILE | {"context": None},
    ],
)
def test_a_file_of_something_else_is_one_sentence(tmp_path: Path, raw: object) -> None:
    with pytest.raises(UserError, match=r"decode\.json does not hold decode measurements"):
        BenchResults.read(_file(tmp_path, raw))


@pytest.mark.skipif(bench_results.default_results() is None, reason="not a checkout")
def test_the_project_s_own_measurements_are_what_is_planned_with() -> None:
    own = bench_results.default_results()
    assert own is not None
    found = BenchResults.read(own)
    planned = _plan("--model", SMALL, "--gpu", find_gpu(found.gpu).name, "--json", "--context", str(found.context))
    widths = {width["rows"]: width["decoding"] for width in json.loads(planned.output)["widths"]}
    measured = [step for step in found.steps[SMALL] if step.rows in widths]
    assert measured
    for step in measured:
        projected = widths[step.rows]["projected_ms"]
        assert projected["low"] == pytest.approx(step.ms)
        assert projected["high"] == pytest.approx(step.ms)
        assert widths[step.rows]["floor_ms"] < step.ms


# The command


def _plan(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["plan", *arguments], prog_name="trtvlm", env={"COLUMNS": "120"})


@pytest.fixture
def measured(tmp_path: Path) -> str:
    return str(_file(tmp_path, FILE))


def test_a_plan_says_what_is_projected_and_from_what(measured: str) -> None:
    result = _plan("--model", SMALL, "--gpu", "rtx3090", "--measured", measured)
    assert result.exit_code == 0, result.output
    assert "projected (not measured)" in result.output
    assert "Projected from steps measured on NVIDIA H200 (2026-11-21): 1.00 ms for one row" in result.output
    assert "Nobody has run this on rtx3090." in result.output
    for part in (*PARTS, "KV cache", "int4_awq"):
        assert part in result.output


def test_on_the_measured_gpu_nothing_is_called_a_projection(measured: str) -> None:
    result = _plan("--model", SMALL, "--gpu", "h200", "--measured", measured)
    assert "by measured steps" in result.output
    assert "Measured on NVIDIA H200 (2026-11-21)" in result.output
    assert "projected" not in result.output.lower()


def test_without_a_measurement_there_is_only_a_floor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_results, "BENCH_H200", tmp_path / "absent.json")
    result = _plan("--model", SMALL, "--gpu", "rtx3090")
    assert "No projection for the target, only floors: there is no measurement here." in result.output
    found = json.loads(_plan("--model", SMALL, "--gpu", "rtx3090", "--json").output)
    assert found["measured"] is None
    assert found["basis"] is None
    assert all(width["decoding"]["projected_ms"] is None for width in found["widths"])
    assert found["widths"][0]["decoding"]["floor_ms"] == pytest.approx(found["widths"][0]["total_bytes"] / 936e6)


@pytest.mark.parametrize("arguments", [("--quant", "int8_wo"), ("--quant", "none")])
def test_what_was_not_measured_is_not_projected(measured: str, arguments: tuple[str, ...]) -> None:
    result = _plan("--model", SMALL, "--gpu", "rtx3090", "--measured", measured, *arguments)
    assert "No projection for the target, only floors: only INT4 steps were measured." in result.output
    other = _plan("--model", TINY, "--gpu", "rtx3090", "--measured", measured)
    assert "no model of these sizes was measured" in other.output


def test_a_draft_that_was_not_measured_leaves_the_target_s_projection(measured: str) -> None:
    found = json.loads(
        _plan("--model", SMALL, "--draft", SMALL, "--gpu", "a10", "--measured", measured, "--json").output
    )
    assert found["no_projection"] == {}
    assert found["speculation"]["decoding"]["projected_ms"] is not None
    raw = json.loads(Path(measured).read_text(encoding="utf-8"))
    raw["models"] = {BASE: raw["models"][SMALL]}
    Path(measured).write_text(json.dumps(raw), encoding="utf-8")
    found = json.loads(_plan("--model", BASE, "--draft", TINY, "--gpu", "a10", "--measured", measured, "--json").output)
    assert found["no_projection"] == {"draft": "no model of these sizes was measured"}
    assert found["widths"][0]["decoding"]["projected_ms"] is not None
    assert found["speculation"]["decoding"]["projected_ms"] is None


def test_json_holds_everything(measured: str) -> None:
    arguments = ("--model", BASE, "--draft", TINY, "--gpu", "rtx4090", "--accepted", "2.5", "--measured", measured)
    found = json.loads(_plan(*arguments, "--json").output)
    assert set(found["models"]) == {"target", "draft"}
    assert found["gpu"]["memory_gib"] == 24
    assert [fit["quant"] for fit in found["fits"]] == list(QUANTIZATIONS)
    assert {fit["quant"]: fit["cards"] for fit in found["fits"]}["int4_awq"] == {"8": False, "12": False, "24": True}
    assert found["needed_bytes"] < 21.5e9
    assert found["needed_bytes"] == {fit["quant"]: fit["bytes"] for fit in found["fits"]}["int4_awq"]
    assert [width["rows"] for width in found["widths"]] == list(range(1, 9))
    assert found["speculation"]["accepted"] == 2.5
    bytes_of = {width["rows"]: width["total_bytes"] for width in found["widths"]}
    drafting = [_step(TINY, rows=rows, context=1024) for rows in (2, 1, 1, 1)]
    floor = (bytes_of[5] + sum(drafting)) / 1008e6 / 3.5
    assert found["speculation"]["decoding"]["floor_ms"] == pytest.approx(floor)


def test_the_cache_in_8_bits_is_planned(measured: str) -> None:
    arguments = ("--model", SMALL, "--gpu", "h200", "--measured", measured)
    plain, found = (json.loads(_plan(*arguments, "--kv-cache", kind, "--json").output) for kind in CACHE_KINDS)
    caches = [each["models"]["target"]["memory"]["cache"] for each in (plain, found)]
    assert caches == [2 * 4096 * 576 * 27, 4096 * 642 * 27]
    assert found["settings"]["kv_cache"] == "int8"
    saved = plain["widths"][0]["total_bytes"] - found["widths"][0]["total_bytes"]
    assert saved == pytest.approx(1025 * 27 * 510)
    # Steps were measured with the other cache: they are moved by the bytes.
    assert (
        found["widths"][0]["decoding"]["projected_ms"]["high"] < plain["widths"][0]["decoding"]["projected_ms"]["high"]
    )
    assert "KV cache, latents in 8 bits" in _plan(*arguments, "--kv-cache", "int8").output
    raw = json.loads(Path(measured).read_text(encoding="utf-8"))
    Path(measured).write_text(json.dumps(raw | {"kv_cache": "int8"}), encoding="utf-8")
    again = json.loads(_plan(*arguments, "--kv-cache", "int8", "--json").output)
    assert again["widths"][0]["decoding"]["projected_ms"] == plain["widths"][0]["decoding"]["projected_ms"]
    refused = _plan("--model", TINY, "--gpu", "h200", "--kv-cache", "int8")
    assert refused.exit_code == 2
    assert f"which {TINY} has not" in refused.stderr


def test_the_bundled_pair_speculates_with_its_own_draft() -> None:
    result = _plan("--model", "nano", "--gpu", "rtx3060")
    assert result.exit_code == 0, result.output
    assert "nano-draft (draft)" in result.output
    assert "not of these models" not in result.output


def test_an_acceptance_that_is_not_these_models_says_so(measured: str) -> None:
    arguments = ("--model", BASE, "--draft", TINY, "--gpu", "rtx4090", "--measured", measured)
    assert "is that of the bundled pair, not of these models" in _plan(*arguments).output
    assert "not of these models" not in _plan(*arguments, "--accepted", "1").output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--model", SMALL, "--gpu", "gtx1080"), "The GPU 'gtx1080' is not in the table; give one of rtx3060"),
        (("--model", "nothing", "--gpu", "a10"), "There is no model 'nothing'"),
        (("--model", SMALL, "--gpu", "a10", "--draft", TINY), "its vocabulary size is 129280, the target's 102400"),
        (("--model", SMALL, "--gpu", "a10", "--max-length", "5000"), "more than the 4096 positions"),
        (("--model", SMALL, "--gpu", "a10", "--max-length", "2000"), "takes 2101 positions"),
        (("--model", SMALL, "--gpu", "a10", "--accepted", "5"), "not between 0 and the 4 tokens drafted"),
        (("--model", SMALL, "--gpu", "a10", "--accepted", "nan"), "not between 0 and the 4 tokens drafted"),
        (("--model", SMALL, "--gpu", "a10", "--context", "5000"), "--context 5000 is more than the 4096 positions"),
        (("--model", SMALL, "--gpu", "a10", "--measured", "absent.json"), "absent.json does not hold"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    result = _plan(*arguments)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_cache_longer_than_the_kernels_attend_to_is_refused(tmp_path: Path) -> None:
    config = preset(SMALL)
    long = dataclasses.replace(config, language=dataclasses.replace(config.language, max_position_embeddings=8192))
    (tmp_path / "config.json").write_text(json.dumps(long.to_dict()), encoding="utf-8")
    result = _plan("--model", str(tmp_path), "--gpu", "a10", "--max-length", "8192")
    assert result.exit_code == 2
    assert "the kernels attend to at most 4096 positions" in result.stderr
    assert _plan("--model", str(tmp_path), "--gpu", "a10").exit_code == 0


def test_sizes_that_int4_cannot_store_are_named(tmp_path: Path) -> None:
    config = tiny_config("mha")
    odd = dataclasses.replace(config, language=dataclasses.replace(config.language, intermediate_size=100))
    (tmp_path / "config.json").write_text(json.dumps(odd.to_dict()), encoding="utf-8")
    arguments = ("--model", str(tmp_path), "--gpu", "a10", "--tiles", "2", "--json")
    refused = _plan(*arguments)
    assert refused.exit_code == 2
    assert "layer 0 mlp.proj is 64 x 100; use --quant int8_wo or none." in refused.stderr
    found = json.loads(_plan(*arguments, "--quant", "int8_wo").output)
    assert {fit["quant"]: fit["bytes"] is None for fit in found["fits"]} == {
        "none": False,
        "int8_wo": False,
        "int4_awq": True,
    }


@pytest.mark.skipif(bench_results.default_results() is None, reason="not a checkout")
def test_memory_is_planned_as_it_was_measured_on_a_gpu() -> None:
    """Base with Tiny as its draft, under `trtvlm bench --memory-cap`: within 5%, part by part and in all."""
    own = bench_results.default_results()
    assert own is not None
    measured = json.loads(own.read_text(encoding="utf-8"))["models"]["deepseek-vl2"]["capped_memory"]
    arguments = ("--model", "deepseek-vl2", "--draft", measured["draft"], "--context", str(measured["positions"]))
    planned = json.loads(_plan(*arguments, "--gpu", "rtx3090", "--json").output)
    assert planned["needed_bytes"] == pytest.approx(measured["peak"], rel=0.05)
    for model, suffix in (("target", ""), ("draft", " of the draft")):
        parts = planned["models"][model]["parts"]
        total = sum(part["device_bytes"] for part in parts.values())
        vision = parts["vision"]["device_bytes"] + parts["projector"]["device_bytes"]
        assert vision == pytest.approx(measured["parts"]["vision" + suffix], rel=0.05)
        assert total - vision == pytest.approx(measured["parts"]["weights" + suffix], rel=0.05)
