"""The kernels of linear layers, the LM head and experts compile for every architecture, within what SM 8.6 has."""

import pytest

from trtvlm.model.config import LanguageConfig
from trtvlm.model.sizes import SIZES, language_size
from trtvlm.plugins.cuda.compiler import ARCHITECTURES, PLUGINS, SHARED_LIMIT, compile_source
from trtvlm.plugins.cuda.launch import defines
from trtvlm.plugins.int4_linear import decode as linear
from trtvlm.plugins.int4_moe import decode as moe
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
    macros, blocks, warps = linear.macros(inputs, tiles, halves, epilogue=epilogue, normalised=normalised, scaled=True)
    values = dict(macros)
    held = int(values["INT4_BLOCK"]) * (2 if epilogue == 2 else 1)
    shared = linear.shared_bytes(inputs, warps, ROWS, tiles=held, normalised=normalised)
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


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("model", MODELS)
def test_experts(model: str, arch: str) -> None:
    config = language_size(model)
    width = config.moe_intermediate_size
    sigmoid = config.scoring_func == "sigmoid"
    macros = defines(
        HIDDEN=config.hidden_size, WIDTH=width, EXPERTS=config.n_routed_experts or 0,
        TOP_K=config.num_experts_per_tok or 0, SHARED=width * (config.n_shared_experts or 0), SIGMOID=int(sigmoid),
        NORMALISE=int(config.norm_topk_prob), SCALING=float(config.routed_scaling_factor), BIASED=int(sigmoid),
        EXPERT_SCALED=1, SHARED_SCALED=1, DOWN_BLOCK_WARPS=moe.down_warps(config.hidden_size),
    )  # fmt: skip
    route = linear.shared_bytes(config.hidden_size, 8, ROWS, tiles=2, normalised=True)
    shared = {"route": route, "experts_up": moe.up_bytes(config.hidden_size)}
    threads = {
        "route": 256,
        "fix_inputs": 256,
        "experts_up": 256,
        "experts_down": 32 * moe.down_warps(config.hidden_size),
    }
    check(moe.SOURCE, dict(macros), arch, threads, shared)
    threads = {"route_row": 256, "experts_up_row": 128, "experts_down_row": 512}
    shared = {"experts_down_row": moe.row_down_bytes(width)}
    check(moe.ROW_SOURCE, dict(macros), arch, threads, shared)
