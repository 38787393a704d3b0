"""Attention of 1 to 16 new rows over cached keys and values on the device, in two launches; capturable."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trtvlm.plugins.cuda.ahead import NOTHING, Ahead
from trtvlm.plugins.cuda.launch import defines, kernel
from trtvlm.plugins.cuda.turns import Turns, launch_in_turn
from trtvlm.plugins.int4_linear.decode import check_rows

SOURCE = "gqa_attention/decode.cu"
CHUNK, ROWS = 64, 8
MOST_POSITIONS = 64 * CHUNK
_WARPS, _COMBINE_WARPS = 8, 4


@dataclass(frozen=True)
class GQAWorkspace:
    """Buffers of a step: each chunk's outputs (half) and shares for every row and head."""

    outputs: Tensor
    shares: Tensor
    chunks: int

    @classmethod
    def allocate(cls, rows: int, positions: int, heads: int, width: int, device: torch.device | str) -> GQAWorkspace:
        """Room for `rows` rows over `positions` cached positions. ValueError: more than the kernels merge."""
        if positions > MOST_POSITIONS:
            raise ValueError(f"the attention kernels merge at most {MOST_POSITIONS} positions, not {positions}")
        chunks = -(-positions // CHUNK)
        outputs = torch.empty(rows * chunks, heads, width, dtype=torch.half, device=device)
        return cls(outputs, torch.empty(rows * chunks, heads, 2, device=device), chunks)


def gqa_decode(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    heads: int,
    rope: tuple[Tensor, Tensor],
    key_cache: Tensor,
    value_cache: Tensor,
    cursor: Tensor,
    out: Tensor,
    workspace: GQAWorkspace,
    rows: int,
    span: int,
    coming: Ahead = NOTHING,
    turns: Turns | None = None,
) -> None:
    """Append rows at cursor int32 [1] to the caches half [kv_heads, S, d], and attend.

    qkv half [rows, (heads + 2 * kv_heads) * d] as projected, or its three parts apart, rope: float32 tables
    [positions, d / 2], out half [rows, heads * d]. span: positions that the cursor and the rows stay within. coming: weights
    that later launches read (`trtvlm.plugins.cuda.ahead`), for launches that do not overlap; turns: of the step, if they do.
    ValueError: more than 16 rows, more than 2 query heads a key head, or heads wider than 128.
    """
    check_rows(rows)
    kv_heads, positions, width = key_cache.shape
    if heads // kv_heads > 2 or width > 128 or width % 16:
        raise ValueError(f"the kernel takes up to 2 heads a key head of 16 to 128, not {heads // kv_heads} of {width}")
    if isinstance(qkv, tuple):
        q, k, v = qkv
    else:
        q, k, v = qkv.split([heads * width, kv_heads * width, kv_heads * width], dim=1)
    macros = defines(HEADS=heads, KV_HEADS=kv_heads, WIDTH=width)
    chunks = workspace.chunks
    scale = width**-0.5 * math.log2(math.e)
    room = min(chunks, -(-span // CHUNK))
    tiles = -(-rows // ROWS)
    extra = int(coming.count > 0 and turns is None)
    launch_in_turn(
        turns, kernel(SOURCE, "attend", macros), (room, kv_heads, tiles + extra), 32 * _WARPS, q, q.stride(0), k, v,
        k.stride(0), *rope, cursor, scale, key_cache, value_cache, positions, workspace.outputs, workspace.shares, chunks,
        rows, coming.pieces, coming.count,
    )  # fmt: skip
    units = rows * heads * -(-width // 64)
    launch_in_turn(
        turns,
        kernel(SOURCE, "combine", macros),
        (-(-units // _COMBINE_WARPS),),
        32 * _COMBINE_WARPS,
        workspace.outputs,
        workspace.shares,
        cursor,
        out,
        chunks,
        rows,
    )
