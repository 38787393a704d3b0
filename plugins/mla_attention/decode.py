"""Absorbed latent attention of 1 to 16 new rows on the device, in three launches; capturable."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trtvlm.plugins.cuda.ahead import NOTHING, Ahead
from trtvlm.plugins.cuda.launch import defines, kernel
from trtvlm.plugins.cuda.tiles import half_tiles
from trtvlm.plugins.cuda.turns import Turns, launch_in_turn
from trtvlm.plugins.int4_linear.decode import COLUMNS, check_rows

SOURCE = "mla_attention/decode.cu"
CHUNK = 32
MOST_POSITIONS = 128 * CHUNK
_ABSORB_WARPS, _ATTEND_WARPS, _COMBINE_WARPS = 4, 16, 8
_SCORE_PARTS = 4
_APART = 165  # five quarters of an H200's multiprocessors
_PAIRS = 2 * 32 * _ABSORB_WARPS


@dataclass(frozen=True)
class MLAWeights:
    """kv_b_proj in two halves, and the latent's norm (none: it comes normalised).

    Sizes: heads, and the widths of a head's parts and the latent.

    keys half tiles [heads, rank / 16, nope / 64 rounded up, 4, 32, 8], values half tiles [heads, v / 16, rank / 64, ...].
    """

    keys: Tensor
    values: Tensor
    norm: Tensor | None
    heads: int
    nope: int
    rope: int
    value: int
    rank: int

    @classmethod
    def pack(cls, kv_b: Tensor, norm: Tensor | None, heads: int, nope: int, rope: int) -> MLAWeights:
        """From kv_b_proj half [heads * (nope + v), rank] and kv_a_layernorm half [rank]."""
        rank = kv_b.shape[1]
        per_head = kv_b.view(heads, -1, rank)
        key, value = per_head[:, :nope], per_head[:, nope:]
        keys = half_tiles(F.pad(key.transpose(1, 2), (0, -nope % 64)))
        return cls(keys, half_tiles(value), norm, heads, nope, rope, value.shape[1], rank)


@dataclass(frozen=True)
class MLAWorkspace:
    """Buffers of a step: queries half [rows, heads, rank + rope], a chunk's outputs and shares for every row and head."""

    queries: Tensor
    outputs: Tensor
    shares: Tensor
    chunks: int

    @classmethod
    def allocate(
        cls, rows: int, positions: int, heads: int, rank: int, rope: int, device: torch.device | str
    ) -> MLAWorkspace:
        """Room for `rows` rows over `positions` cached positions. ValueError: more than the kernels merge."""
        if positions > MOST_POSITIONS:
            raise ValueError(f"the attention kernels merge at most {MOST_POSITIONS} positions, not {positions}")
        chunks = -(-positions // CHUNK)
        return cls(
            torch.zeros(rows, heads, rank + rope, dtype=torch.half, device=device),
            torch.empty(rows * chunks, heads, rank, dtype=torch.half, device=device),
            torch.empty(rows * chunks, heads, 2, device=device),
            chunks,
        )


def mla_decode(
    q: Tensor,
    kv: Tensor | tuple[Tensor, Tensor],
    weights: MLAWeights,
    rope: tuple[Tensor, Tensor],
    latent_cache: Tensor,
    rope_cache: Tensor,
    cursor: Tensor,
    out: Tensor,
    workspace: MLAWorkspace,
    rows: int,
    span: int,
    coming: Ahead = NOTHING,
    turns: Turns | None = None,
    scales: Tensor | None = None,
) -> None:
    """Append rows at cursor int32 [1] to latent_cache half [S, rank] and rope_cache half [S, rope], and attend.

    With scales half [S], latent_cache is int8 codes (`trtvlm.model.latent_codes`).
    q half [rows, heads * (nope + rope)], kv half [rows, rank + rope] as projected, or its two parts apart, rope: float32
    tables [positions, rope / 2], out half [rows, heads * v]. span: positions that the cursor and the rows stay within.
    coming: weights that later launches read (`trtvlm.plugins.cuda.ahead`), for launches that do not overlap; turns: of the
    step, if they do.
    ValueError: more than 16 rows.
    """
    check_rows(rows)
    w = weights
    latent, k_pe = kv if isinstance(kv, tuple) else (kv, kv[:, w.rank :])
    combine_tiles = tiles_of_values(w.value, w.heads, rows)
    chunks, heads16 = workspace.chunks, -(-w.heads // 16)
    room = min(chunks, -(-span // CHUNK))
    together = rows_of_a_block(rows, rows * heads16 * room)
    macros = defines(
        HEADS=w.heads, NOPE=w.nope, ROPE=w.rope, VALUE=w.value, RANK=w.rank, COMBINE_TILES=combine_tiles,
        ATTEND_ROWS=together, INT8_LATENT=int(scales is not None),
    )  # fmt: skip
    tiles = -(-rows // COLUMNS)
    append_blocks = 1 + -(-(w.heads + 1) * (w.rope // 2) // _PAIRS)
    absorb_blocks = -(-w.heads * (w.rank // 16) // _ABSORB_WARPS) + COLUMNS * append_blocks
    queries, outputs, shares = workspace.queries, workspace.outputs, workspace.shares
    launch_in_turn(
        turns,
        kernel(SOURCE, "absorb", macros),
        (absorb_blocks, tiles),
        32 * _ABSORB_WARPS,
        q,
        latent,
        latent.stride(0),
        k_pe,
        k_pe.stride(0),
        w.keys,
        w.norm,
        *rope,
        cursor,
        queries,
        latent_cache,
        scales,
        rope_cache,
        rows,
    )
    scale = (w.nope + w.rope) ** -0.5 * math.log2(math.e)
    groups = -(-rows // together)
    extra = -(-room // groups) if coming.count and turns is None else 0
    launch_in_turn(
        turns, kernel(SOURCE, "attend", macros), (heads16, groups, room + extra), 32 * _ATTEND_WARPS,
        queries, latent_cache, scales, rope_cache, cursor, scale, outputs, shares, chunks, rows, room,
        coming.pieces, coming.count, shared=attend_bytes(w.rank + w.rope, together),
    )  # fmt: skip
    launch_in_turn(
        turns, kernel(SOURCE, "combine", macros), (w.heads * (w.value // 16 // combine_tiles), rows),
        32 * _COMBINE_WARPS, outputs, shares, w.values, cursor, out,
        chunks,
    )  # fmt: skip


def rows_of_a_block(rows: int, blocks: int) -> int:
    """Rows that a block of `attend` loads keys for; no result depends on it.

    blocks: with a row each. They are faster apart while they have a multiprocessor each, but for those past the cursor.
    """
    return 2 if rows > 2 and blocks > _APART else 1


def attend_bytes(key: int, rows: int) -> int:
    """Dynamic shared memory of a block of `attend`: `Chunk` of decode.cu, for keys of `key` values."""
    return 2 * ((CHUNK + 16 * rows) * (key + 8) + 16 * rows * (CHUNK + 8)) + 4 * rows * _SCORE_PARTS * 16 * (CHUNK + 4)


def tiles_of_values(value: int, heads: int, rows: int) -> int:
    """Tiles of 16 values that a block of `combine` takes; no result depends on it."""
    tiles = value // 16
    # Merging is most of the work, and every block of a head does it; for few rows, as many blocks as there are multiprocessors.
    wanted = 4 if rows > 2 else -(-heads * tiles // 132)
    return next(count for count in (4, 2, 1) if count <= wanted and tiles % count == 0)
