"""The kernels of linear layers, the LM head and experts compile for every architecture, within what SM 8.6 has."""

import pytest
import torch

from trtvlm.model.config import LanguageConfig
from trtvlm.model.sizes import SIZES, language_size
from trtvlm.plugins.cuda.compiler import ARCHITECTURES, PLUGINS, SHARED_LIMIT, compile_source
from trtvlm.plugins.cuda.launch import defines
from trtvlm.plugins.int4_linear import decode as linear
from trtvlm.plugins.int4_linear.decode import LinearWeight
from trtvlm.plugins.int4_moe import decode as moe
from trtvlm.plugins.int4_moe import row as moe_row
from trtvlm.plugins.int4_moe import rows as moe_rows
from trtvlm.plugins.int4_moe.layer import ROUTE_WARPS, MoEWeights, Tiles, down_warps
from trtvlm.plugins.int4_moe.reference import Routing
from trtvlm.plugins.int8_linear import decode as head

MODELS = (*SIZES, "nano", "nano-draft")
ROWS = 8
REGISTERS, THREADS = 65536, 1536  # of a multiprocessor of SM 8.6


def check(
    path: str,
    macros: dict[str, int | float],
    arch: str,
    threads: int | dict[str, int],
    shared: int | dict[str, int] = 0,
) -> None:
    """shared: dynamic, in bytes."""
    source = (PLUGINS / path).read_text(encoding="utf-8")
    _, kernels = compile_source(source, macros, arch)
    assert kernels
    for name, usage in kernels.items():
        assert usage.spilled == 0, f"{name} spills {usage.spilled} bytes"
        assert usage.shared + (shared if isinstance(shared, int) else shared.get(name, 0)) <= SHARED_LIMIT
        block = threads if isinstance(threads, int) else threads[name]
        assert usage.registers * block <= REGISTERS
        assert block <= THREADS


def linears(config: LanguageConfig) -> dict[str, tuple[int, int, int, int, bool]]:
    """The fused layers of a decoder layer: inputs, INT4 tiles, half tiles, epilogue, normalised."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    if config.use_mla:
        qkv, halves = heads * config.head_dim, (config.kv_lora_rank or 0) + config.qk_rope_head_dim
    else:
        qkv, halves = (heads + 2 * config.num_key_value_heads) * config.head_dim, 0
    return {
        "qkv": (hidden, qkv // 16, halves // 16, 0, True),
        "o": (heads * config.value_head_dim, hidden // 16, 0, 1, False),
        "fc": (hidden, 2 * config.intermediate_size // 16, 0, 2, True),
        "proj": (config.intermediate_size, hidden // 16, 0, 1, False),
    }


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("layer", ["qkv", "o", "fc", "proj"])
@pytest.mark.parametrize("model", MODELS)
def test_linear(model: str, layer: str, arch: str) -> None:
    inputs, tiles, halves, epilogue, normalised = linears(language_size(model))[layer]
    for one_row in (False, True):
        macros, blocks, warps = linear.macros(
            inputs, tiles, halves, epilogue=epilogue, normalised=normalised, scaled=True, one_row=one_row
        )
        values = dict(macros)
        held = int(values["INT4_BLOCK"]) * (2 if epilogue == 2 else 1)
        rows = 1 if one_row else ROWS
        factors = linear.norm_factors(True) if normalised and not one_row else 0
        shared = linear.shared_bytes(inputs, warps, rows, tiles=held, staged=normalised or one_row, factors=factors)
        check(linear.SOURCE, values, arch, 32 * warps, shared)
        assert blocks >= halves


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", head.KINDS)
@pytest.mark.parametrize("model", MODELS)
def test_head(model: str, kind: str, arch: str) -> None:
    config = language_size(model)
    blocks, warps = head.blocks_and_warps(config.vocab_size)
    assert blocks * warps * -(-config.vocab_size // 16 // (blocks * warps)) * 16 >= config.vocab_size
    macros = defines(HIDDEN=config.hidden_size, VOCAB=config.vocab_size, HEAD_WARPS=warps, HEAD_KIND=head.KINDS[kind])
    check(head.SOURCE, dict(macros), arch, 32 * warps, ROWS * (config.hidden_size + 8) * 2)


def experts(config: LanguageConfig) -> MoEWeights:
    """A MoE layer without its numbers."""
    hidden, width, shared = config.hidden_size, config.moe_intermediate_size, config.n_shared_experts or 0

    def tiles(outputs: int, inputs: int, *stacked: int) -> Tiles:
        return Tiles(
            *(
                torch.empty(*stacked, *shape, device="meta")
                for shape in ((outputs // 16, inputs // 64), (1,), (inputs,))
            )
        )

    count, scoring = config.n_routed_experts or 0, config.scoring_func
    routing = Routing(config.num_experts_per_tok or 0, scoring, config.norm_topk_prob, config.routed_scaling_factor)
    return MoEWeights(
        torch.empty(hidden // 16, count, 16, device="meta"), torch.empty(count) if scoring == "sigmoid" else None, routing,
        tiles(2 * width, hidden, count), tiles(hidden, width, count),
        tiles(2 * shared * width, hidden), tiles(hidden, shared * width),
    )  # fmt: skip


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("model", MODELS)
def test_experts(model: str, arch: str) -> None:
    layer = experts(language_size(model))
    hidden = layer.hidden
    route = linear.shared_bytes(
        hidden, 8, ROWS, tiles=2 * layer.shared_pairs, staged=True, factors=linear.norm_factors(True)
    )
    threads = {"route": 256, "fix_inputs": 256, "experts_up": 256, "experts_down": 32 * down_warps(hidden)}
    check(moe.SOURCE, dict(layer.macros), arch, threads, {"route": route, "experts_up": moe.up_bytes(hidden)})


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("model", MODELS)
def test_experts_of_a_lone_row(model: str, arch: str) -> None:
    layer = experts(language_size(model))
    shared = moe_row.expert_bytes(layer)
    check(moe_row.EXPERTS_SOURCE, dict(layer.macros), arch, 32 * moe_row.EXPERT_WARPS, shared)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("turns", [1, 2])
def test_the_projection_of_a_lone_row(model: str, arch: str, turns: int) -> None:
    config = language_size(model)
    inputs = config.num_attention_heads * config.value_head_dim
    dense = LinearWeight(torch.empty(config.hidden_size // 16, inputs // 64), torch.empty(1), torch.empty(inputs))
    values = moe_row.dense_macros(dense, experts(config), turns)
    check(moe_row.DENSE_SOURCE, dict(values), arch, 32 * ROUTE_WARPS, moe_row.dense_bytes(values))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("model", MODELS)
def test_experts_of_several_rows(model: str, arch: str) -> None:
    layer = experts(language_size(model))
    check(
        moe_rows.SOURCE,
        dict(layer.macros),
        arch,
        32 * moe_row.EXPERT_WARPS,
        moe_row.expert_bytes(layer, moe_rows.SLOTS),
    )
