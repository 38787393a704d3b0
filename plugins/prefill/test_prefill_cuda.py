"""The launches between a prompt's products: they compile everywhere, and give what their references give."""

import dataclasses

import pytest
import torch
from torch import Tensor

from trtvlm.model.cache import KVCache, LatentCache
from trtvlm.model.cache_kind import CacheKind
from trtvlm.model.config import LanguageConfig
from trtvlm.model.latent_codes import quantize_latent
from trtvlm.model.rope import rope_table
from trtvlm.model.sizes import SIZES, language_size
from trtvlm.plugins.cuda.compiler import ARCHITECTURES, PLUGINS, SHARED_LIMIT, compile_source
from trtvlm.plugins.cuda.emulation.emulator import ORDERS, Schedule, compiler, emulated
from trtvlm.plugins.cuda.launch import defines
from trtvlm.plugins.int4_moe.reference import Routing
from trtvlm.plugins.mla_attention.decode import MLAWeights, MLAWorkspace, mla_decode
from trtvlm.plugins.prefill import cuda, reference

MODELS = (*SIZES, "nano", "nano-draft")
REGISTERS = 65536
DEVICE, SPAN = "cuda", 700


def routing(config: LanguageConfig) -> Routing:
    return Routing(
        config.num_experts_per_tok or 1, config.scoring_func, config.norm_topk_prob, config.routed_scaling_factor
    )


def compiled(source: str, macros: dict[str, int | float], arch: str, threads: int, shared: int) -> None:
    _, kernels = compile_source((PLUGINS / "prefill" / source).read_text(encoding="utf-8"), macros, arch)
    assert kernels
    for name, usage in kernels.items():
        assert usage.spilled == 0, f"{name} spills {usage.spilled} bytes"
        assert usage.shared + shared <= SHARED_LIMIT
        assert usage.registers * threads <= REGISTERS


# All kernels of a model take a second or two: the sizes differ, so each architecture has its own.
PAIRS = [*zip(MODELS, (*ARCHITECTURES, "sm_86"), strict=True), (SIZES[-1], "sm_86")]


@pytest.mark.parametrize(("model", "arch"), PAIRS)
def test_compiles(model: str, arch: str) -> None:
    config = language_size(model)
    heads, hidden = config.num_attention_heads, config.hidden_size
    compiled("norm.cu", {"HIDDEN": hidden}, arch, cuda.NORM_THREADS, 0)
    macros = cuda.route_macros(routing(config), config.n_routed_experts or 0, hidden, biased=model == SIZES[-1])
    compiled("route.cu", dict(macros), arch, cuda.ROUTE_THREADS, cuda.route_shared(hidden))
    if config.use_mla:
        nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        append = cuda.append_macros(heads, nope, rope, config.kv_lora_rank or 0, coded=False)
        coded = cuda.append_macros(heads, nope, rope, config.kv_lora_rank or 0, coded=True)
        compiled("append_latent.cu", dict(coded), arch, cuda.APPEND_THREADS, 0)
        attend = cuda.attend_macros(heads, heads, nope, rope, value)
    else:
        width, kv_heads = config.head_dim, config.num_key_value_heads
        append = defines(HEADS=heads, KV_HEADS=kv_heads, WIDTH=width)
        attend = cuda.attend_macros(heads, kv_heads, width, 0, width)
    compiled(f"append_{'latent' if config.use_mla else 'heads'}.cu", dict(append), arch, cuda.APPEND_THREADS, 0)
    shared = cuda.attend_shared(config.head_dim, config.value_head_dim)
    compiled("attention.cu", dict(attend), arch, 2 * cuda.ATTEND_THREADS, shared)


def test_refuses_what_does_not_fit() -> None:
    x, norm = torch.zeros(3, 64), torch.ones(64).half()
    with pytest.raises(ValueError, match="1 or 2 results"):
        cuda.add_norm(x, None, None, norm, 1e-6, ())
    with pytest.raises(ValueError, match="residual"):
        cuda.add_norm(x.half(), None, None, norm, 1e-6, (None,))
    with pytest.raises(ValueError, match="of 200 in 1 groups"):
        cuda.route(x, norm, 1e-6, torch.zeros(200, 64), None, Routing(2))
    q, keys, cursor = torch.zeros(3, 2, 64).half(), torch.zeros(9, 2, 64).half(), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="do not fit"):
        cuda.attend(q, keys[..., :32], None, keys, cursor)
    with pytest.raises(ValueError, match="heads of 40"):
        cuda.attend(q[..., :40], keys[..., :40], None, keys, cursor)
    with pytest.raises(ValueError, match="side by side"):
        cuda.attend(torch.zeros(3, 2, 96).half()[..., :64], keys, None, keys, cursor)
    with pytest.raises(ValueError, match="latents"):
        cuda.append_latent(
            q, torch.zeros(3, 50).half(), norm, (x, x), cursor, keys[:, 0, :32], torch.zeros(9, 32).half()
        )


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def half(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE).half()


def near_one(width: int) -> Tensor:
    return torch.rand(width, device=DEVICE).add(0.5).half()


@pytest.mark.gpu
@pytest.mark.parametrize("model", MODELS)
def test_norms_and_routing(model: str) -> None:
    config = language_size(model)
    hidden, number = config.hidden_size, config.n_routed_experts or 0
    weight, scale = near_one(hidden), near_one(hidden)
    router = torch.randn(number, hidden, device=DEVICE) * hidden**-0.5
    bias = 0.1 * torch.randn(number, device=DEVICE) if model == SIZES[-1] else None
    for rows in (1, 8, 77):
        residual = torch.randn(rows, hidden, device=DEVICE)
        for floats, halves in (
            (None, None),
            (torch.randn_like(residual), None),
            (torch.randn_like(residual), half(rows, hidden)),
        ):
            mine, other = residual.clone(), residual.clone()
            found = cuda.add_norm(mine, floats, halves, weight, 1e-6, (scale, None))
            expected = reference.add_norm(other, floats, halves, weight, 1e-6, (scale, None))
            assert torch.equal(mine, other)
            assert all(error(*pair) < 1e-3 for pair in zip(found, expected, strict=True))
            last = [None if part is None else part[-1:] for part in (floats, halves)]
            (single,) = cuda.add_norm(residual[-1:].clone(), last[0], last[1], weight, 1e-6, (scale,))
            assert torch.equal(single[0], found[0][-1])
        index, weights = cuda.route(residual, weight, 1e-6, router, bias, routing(config))
        expected_index, expected_weights = reference.route(residual, weight, 1e-6, router, bias, routing(config))
        assert (index == expected_index).float().mean() > 0.99
        same = (index == expected_index).all(1)
        assert error(weights[same], expected_weights[same]) < 1e-3
        alone, alone_weights = cuda.route(residual[-1:], weight, 1e-6, router, bias, routing(config))
        assert torch.equal(alone[0], index[-1])
        assert torch.equal(alone_weights[0], weights[-1])


@pytest.mark.gpu
@pytest.mark.parametrize("model", MODELS)
def test_appends(model: str) -> None:
    config = language_size(model)
    heads, rows, positions = config.num_attention_heads, 70, 128
    cursor = torch.tensor([33], dtype=torch.int32, device=DEVICE)
    rope = rope_table(config.rope_dim, positions, config.rope_theta, DEVICE)
    runs: list[list[Tensor]] = []
    if config.use_mla:
        rank, turned = config.kv_lora_rank or 0, config.qk_rope_head_dim
        q, kv, norm = half(rows, heads, config.head_dim), half(rows, rank + turned), near_one(rank)
        for module in (cuda, reference):
            mine, caches = q.clone(), [torch.zeros(positions, width, device=DEVICE).half() for width in (rank, turned)]
            module.append_latent(mine, kv, norm, rope, cursor, *caches)
            runs.append([mine, *caches])
    else:
        kv_heads = config.num_key_value_heads
        qkv = half(rows, heads + 2 * kv_heads, config.head_dim)
        for module in (cuda, reference):
            mine = qkv.clone()
            caches = [torch.zeros(kv_heads, positions, config.head_dim, device=DEVICE).half() for _ in range(2)]
            module.append_heads(mine, heads, rope, cursor, *caches)
            runs.append([mine, *caches])
    for found, expected in zip(*runs, strict=True):
        assert error(found, expected) < 1e-3
        assert torch.equal(found == 0, expected == 0)  # nothing outside the new rows' places


@pytest.mark.gpu
@pytest.mark.parametrize("model", [model for model in MODELS if language_size(model).use_mla])
def test_codes_are_those_of_the_halves_and_the_same_by_a_decode_step(model: str) -> None:
    config = language_size(model)
    heads, rank, turned, rows, start, positions = (
        config.num_attention_heads, config.kv_lora_rank or 0, config.qk_rope_head_dim, 9, 21, 64
    )  # fmt: skip
    nope, value = config.qk_nope_head_dim, config.v_head_dim
    q, kv, norm = half(rows, heads, config.head_dim), half(rows, rank + turned), near_one(rank)
    kv[3, :rank] = 0
    cursor = torch.tensor([start], dtype=torch.int32, device=DEVICE)
    rope = rope_table(turned, positions, config.rope_theta, DEVICE)

    def cache(kind: CacheKind) -> LatentCache:
        (layer,) = KVCache(
            dataclasses.replace(config, num_hidden_layers=1), 1, positions, torch.half, DEVICE, kind
        ).layers
        assert isinstance(layer, LatentCache)
        return layer

    halves, codes, decoded = cache("fp16"), cache("int8"), cache("int8")
    for held in (halves, codes):
        cuda.append_latent(q.clone(), kv, norm, rope, cursor, *(tensor[0] for tensor in held.tensors()))
    weights = MLAWeights.pack(half(heads * (nope + value), rank), norm, heads, nope, turned)
    workspace = MLAWorkspace.allocate(rows, positions, heads, rank, turned, DEVICE)
    latents, rotated, scales = (tensor[0] for tensor in decoded.tensors())
    out = q.new_empty(rows, heads * value)
    mla_decode(
        q.flatten(1), kv, weights, rope, latents, rotated, cursor, out, workspace, rows, positions, scales=scales
    )
    new = slice(start, start + rows)
    expected, expected_scales = quantize_latent(halves.latent[0, new])
    assert torch.equal(codes.latent[0, new], expected)
    assert torch.equal(codes.tensors()[2][0, new], expected_scales)
    assert int(codes.latent.count_nonzero()) == int(expected.count_nonzero())
    for mine, theirs in zip(codes.tensors(), decoded.tensors(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("model", MODELS)
def test_attention(model: str) -> None:
    config = language_size(model)
    heads, kv_heads, value = config.num_attention_heads, config.num_key_value_heads, config.value_head_dim
    span = SPAN
    q = half(span, heads, config.head_dim)
    scale = near_one(heads * value)
    if config.use_mla:
        # As `trtvlm.runtime.cuda.prefill.expand` has them: keys by head, padded; values by position.
        nope = config.qk_nope_head_dim
        keys = half(heads, span, -(-nope // 64) * 64).transpose(0, 1)[..., :nope]
        shared, values = half(span, config.qk_rope_head_dim), half(span, heads, value)
    else:
        caches = half(2, kv_heads, span + 68, value)
        keys, values = (cache[:, :span].transpose(0, 1) for cache in caches)
        shared = None
    whole = cuda.attend(q, keys, shared, values, torch.zeros(1, dtype=torch.int32, device=DEVICE), scale)
    assert error(whole, reference.attend(q, keys, shared, values, torch.zeros(1, dtype=torch.int32), scale)) < 2e-3
    for start, rows in ((0, 1), (63, 1), (64, 1), (1, 70), (span // 2, span // 3), (span - 1, 1)):
        end = start + rows
        cursor = torch.tensor([start], dtype=torch.int32, device=DEVICE)
        part = None if shared is None else shared[:end]
        found = cuda.attend(q[start:end], keys[:end], part, values[:end], cursor, scale)
        assert torch.equal(found, whole[start:end]), (start, rows)


@pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++ compiler")
@pytest.mark.parametrize(("model", "order"), [("nano", "shuffled"), ("nano-draft", "reversed"), ("nano", "forward")])
def test_emulated(model: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert order in ORDERS
    monkeypatch.setitem(globals(), "DEVICE", "cpu")
    monkeypatch.setitem(globals(), "SPAN", 130)
    with emulated(Schedule(order)):
        for test in (test_norms_and_routing, test_appends, test_attention):
            test(model)
        if language_size(model).use_mla:
            test_codes_are_those_of_the_halves_and_the_same_by_a_decode_step(model)
