"""The launches between a prompt's products; capturable. Every row's bits are its own: rows beside it change nothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trtvlm.plugins.cuda.compiler import SHARED_LIMIT
from trtvlm.plugins.cuda.launch import Defines, defines, kernel
from trtvlm.plugins.int4_moe.reference import Routing

FOLDER = "prefill"
NORM_THREADS, ROUTE_THREADS, ROUTE_ROWS, APPEND_THREADS = 256, 256, 8, 128
ATTEND_THREADS, ATTEND_ROWS, ATTEND_POSITIONS = 128, 64, 64
MOST_EXPERTS, MOST_CHOSEN = 128, 15

Rope = tuple[Tensor, Tensor]


def add_norm(
    residual: Tensor,
    floats: Tensor | None,
    halves: Tensor | None,
    weight: Tensor,
    eps: float,
    scales: tuple[Tensor | None, ...],
) -> tuple[Tensor, ...]:
    """residual float32 [M, H] += floats + halves, in place; then its norm times each scale half [H] -> half [M, H] each.

    floats float32 and halves half [M, H] or none, weight half [H]. ValueError: other shapes, or not 1 or 2 scales.
    """
    rows, hidden = residual.shape
    if hidden % 4 or not 1 <= len(scales) <= 2:
        raise ValueError(f"add_norm makes 1 or 2 results of rows in fours, not {len(scales)} of {hidden}")
    check(residual, torch.float32, (rows, hidden), "the residual stream")
    check(floats, torch.float32, (rows, hidden), "what is added in float32")
    check(halves, torch.half, (rows, hidden), "what is added in half")
    for tensor in (weight, *scales):
        check(tensor, torch.half, (hidden,), "norms and scales")
    out = tuple(torch.empty(rows, hidden, dtype=torch.half, device=residual.device) for _ in scales)
    if rows:
        pairs = [part for pair in zip(scales, out, strict=True) for part in pair]
        launch = kernel(f"{FOLDER}/norm.cu", "add_norm", defines(HIDDEN=hidden))
        launch((rows,), NORM_THREADS, residual, floats, halves, weight, eps, *pairs, *[None] * (4 - len(pairs)))
    return out


def route(
    residual: Tensor, norm: Tensor, eps: float, router: Tensor, bias: Tensor | None, routing: Routing
) -> tuple[Tensor, Tensor]:
    """The experts of each row of a residual stream float32 [M, H] after its norm: int64 [M, k] and weights float32 [M, k].

    router float32 [E, H], bias float32 [E] or none. ValueError: what the kernel does not choose from.
    """
    (rows, hidden), (experts, k) = residual.shape, (router.shape[0], routing.top_k)
    if experts > MOST_EXPERTS or k > min(MOST_CHOSEN, experts) or routing.groups > 1 or hidden % 64:
        raise ValueError(
            f"up to {MOST_CHOSEN} of {MOST_EXPERTS} experts are chosen, in one group, for rows in 64s; not {k} of {experts} "
            f"in {routing.groups} groups for rows of {hidden}"
        )
    check(residual, torch.float32, (rows, hidden), "the residual stream")
    check(router, torch.float32, (experts, hidden), "the router")
    check(bias, torch.float32, (experts,), "the router's bias")
    check(norm, torch.half, (hidden,), "the norm")
    index = torch.empty(rows, k, dtype=torch.int64, device=residual.device)
    weight = torch.empty(rows, k, device=residual.device)
    if rows:
        launch = kernel(f"{FOLDER}/route.cu", "route", route_macros(routing, experts, hidden, biased=bias is not None))
        launch(
            (-(-rows // ROUTE_ROWS),), ROUTE_THREADS, residual, norm, eps, router, bias, index, weight, rows,
            shared=route_shared(hidden),
        )  # fmt: skip
    return index, weight


def route_macros(routing: Routing, experts: int, hidden: int, *, biased: bool) -> Defines:
    """What route.cu is compiled with."""
    return defines(
        HIDDEN=hidden, EXPERTS=experts, TOP_K=routing.top_k, SIGMOID=int(routing.scoring == "sigmoid"),
        NORMALISE=int(routing.normalise), SCALING=float(routing.scaling), BIASED=int(biased),
    )  # fmt: skip


def route_shared(hidden: int) -> int:
    """Dynamic shared memory of route.cu in bytes. ValueError: the rows are too wide."""
    size = 4 * ROUTE_ROWS * hidden
    if size > SHARED_LIMIT - 8 * 1024:
        raise ValueError(f"rows of {hidden} values are too wide for the router's shared memory")
    return size


def append_latent(
    q: Tensor,
    kv: Tensor,
    norm: Tensor,
    rope: Rope,
    cursor: Tensor,
    latent_cache: Tensor,
    rope_cache: Tensor,
    scales: Tensor | None = None,
) -> None:
    """Rotate q's rotary parts in place, and append normalised latents and rotated key parts at cursor int32 [1].

    q half [M, heads, nope + rope], kv half [M, rank + rope], norm half [rank], rope float32 tables [positions, rope / 2],
    latent_cache half [S, rank], or int8 codes with scales half [S]; rope_cache half [S, rope]. ValueError: tensors that do not
    fit.
    """
    (rows, heads, width), rank, turned = q.shape, latent_cache.shape[1], rope_cache.shape[1]
    if turned % 2 or rank % 2 or turned > width:
        raise ValueError(f"latents of {rank} with a rotary part of {turned} in heads of {width} are not appended")
    check(q, torch.half, (rows, heads, width), "the queries")
    check(kv, torch.half, (rows, rank + turned), "latents and key parts")
    check(latent_cache, torch.half if scales is None else torch.int8, tuple(latent_cache.shape), "the latents' cache")
    check(scales, torch.half, (len(latent_cache),), "the latents' scales")
    if rows:
        macros = append_macros(heads, width - turned, turned, rank, coded=scales is not None)
        launch = kernel(f"{FOLDER}/append_latent.cu", "append_latent", macros)
        launch((rows,), APPEND_THREADS, q, kv, norm, *rope, cursor, latent_cache, scales, rope_cache)


def append_macros(heads: int, nope: int, rope: int, rank: int, *, coded: bool) -> Defines:
    """What append_latent.cu is compiled with."""
    return defines(HEADS=heads, NOPE=nope, ROPE=rope, RANK=rank, INT8_LATENT=int(coded))


def append_heads(qkv: Tensor, heads: int, rope: Rope, cursor: Tensor, key_cache: Tensor, value_cache: Tensor) -> None:
    """Rotate the queries in place, and append rotated keys, and values, at cursor int32 [1].

    qkv half [M, heads + 2 * kv_heads, d], rope float32 tables [positions, d / 2], caches half [kv_heads, S, d]. ValueError:
    tensors that do not fit.
    """
    kv_heads, positions, width = key_cache.shape
    if width % 8:
        raise ValueError(f"heads are appended in eights of values, not {width} wide")
    rows = qkv.shape[0]
    check(qkv, torch.half, (rows, heads + 2 * kv_heads, width), "queries, keys and values")
    check(value_cache, torch.half, (kv_heads, positions, width), "the values' cache")
    if rows:
        launch = kernel(
            f"{FOLDER}/append_heads.cu", "append_heads", defines(HEADS=heads, KV_HEADS=kv_heads, WIDTH=width)
        )
        launch((rows,), APPEND_THREADS, qkv, *rope, cursor, key_cache, value_cache, positions)


def attend(
    q: Tensor,
    keys: Tensor,
    shared_keys: Tensor | None,
    values: Tensor,
    cursor: Tensor,
    next_scale: Tensor | None = None,
) -> Tensor:
    """Causal attention of M rows at cursor int32 [1] over cached positions -> half [M, heads * v], times next_scale.

    q half [M, heads, d]; keys half [S, kv_heads, d], or their first values where shared_keys half [S, the others] has those
    that are the same in all heads; values half [S, kv_heads, v]; next_scale half [heads * v] or none. S is at least
    cursor + M. Heads and positions may be any multiples of 8 halves apart. ValueError: tensors that do not fit.
    """
    (rows, heads, width), (span, kv_heads, first), value = q.shape, keys.shape, values.shape[2]
    second = 0 if shared_keys is None else shared_keys.shape[1]
    if first + second != width or heads % kv_heads or tuple(values.shape[:2]) != (span, kv_heads):
        raise ValueError(
            f"queries {list(q.shape)}, keys {list(keys.shape)} (and {second} shared) and values {list(values.shape)} do not fit"
        )
    if width % 32 or first % 8 or value % 16 or attend_shared(width, value) > SHARED_LIMIT or value > 128:
        raise ValueError(f"heads of {width} and values of {value} are not attended to")
    for tensor in (q, keys, values):
        strides = (tensor.stride(0) % 8, tensor.stride(1) % 8, tensor.stride(2))
        if tensor.dtype != torch.half or strides != (0, 0, 1):
            raise ValueError(f"attention takes halves in whole 16-byte words, not {tensor.dtype} {tensor.stride()}")
    if q.stride(1) != width:
        raise ValueError("the heads of a query must lie side by side")
    check(shared_keys, torch.half, (span, second), "the shared part of the keys")
    check(next_scale, torch.half, (heads * value,), "the next pre_quant_scale")
    out = torch.empty(rows, heads * value, dtype=torch.half, device=q.device)
    if rows:
        launch = kernel(f"{FOLDER}/attention.cu", "attend", attend_macros(heads, kv_heads, first, second, value))
        launch(
            (heads, -(-rows // ATTEND_ROWS)), ATTEND_THREADS, q, q.stride(0), keys, keys.stride(0), keys.stride(1),
            shared_keys, values, values.stride(0), values.stride(1), cursor, width**-0.5 * math.log2(math.e), next_scale, out,
            rows, shared=attend_shared(width, value),
        )  # fmt: skip
    return out


def attend_macros(heads: int, kv_heads: int, first: int, second: int, value: int) -> Defines:
    """What attention.cu is compiled with."""
    return defines(HEADS=heads, SHARE=heads // kv_heads, FIRST=first, SECOND=second, VALUE=value)


def attend_shared(width: int, value: int) -> int:
    """Dynamic shared memory of attention.cu in bytes: keys, values and queries."""
    return 2 * ((ATTEND_POSITIONS + ATTEND_ROWS) * (width + 8) + ATTEND_POSITIONS * (value + 8))


def check(tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...], name: str) -> None:
    """ValueError unless the tensor is none, or contiguous and of a type and shape."""
    if tensor is not None and (tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous()):
        raise ValueError(f"{name} must be contiguous {dtype} {list(shape)}, not {tensor.dtype} {list(tensor.shape)}")
