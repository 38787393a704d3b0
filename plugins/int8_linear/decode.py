"""The LM head of 1 to 16 rows on the device: norm, product and each block's most likely token in one launch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from trtvlm.plugins.cuda.launch import defines, kernel
from trtvlm.plugins.cuda.tiles import ROWS, half_tiles, int4_tiles
from trtvlm.plugins.cuda.turns import Turns, launch_in_turn
from trtvlm.plugins.int4_linear.decode import COLUMNS, Norm, check_rows
from trtvlm.plugins.int8_linear.tiles import int8_tiles

SOURCE = "int8_linear/decode.cu"
KINDS = {"int8": 0, "fp16": 1, "int4": 2}
_BLOCKS = 132
# Of the vocabulary, repacked together: it takes several times their size.
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class HeadWeight:
    """An LM head in the kernel's order. scales: float32 [V] of INT8, half tiles of INT4's, None of halves."""

    kind: str
    tiles: Tensor
    scales: Tensor | None
    vocab: int
    hidden: int

    @classmethod
    def pack(cls, kind: str, weight: Tensor, scales: Tensor | None) -> HeadWeight:
        """From the checkpoint's tensors: "int8" codes [V, H] and scales [V], "fp16" [V, H], "int4" [V / 2, H] and [V, H / 64]."""
        if kind == "int8":
            assert scales is not None
            tiles = torch.cat([int8_tiles(part) for part in weight.split(ROWS_AT_ONCE)])
            return cls(kind, tiles, scales.float(), *weight.shape)
        if kind == "int4":
            assert scales is not None
            pairs = zip(weight.split(ROWS_AT_ONCE // 2), scales.split(ROWS_AT_ONCE), strict=True)
            tiles, group_scales = (torch.cat(part) for part in zip(*(int4_tiles(*pair) for pair in pairs), strict=True))
            return cls(kind, tiles, group_scales, 2 * weight.shape[0], weight.shape[1])
        return cls(kind, half_tiles(weight), None, *weight.shape)


@lru_cache
def blocks_and_warps(vocab: int) -> tuple[int, int]:
    """How the tokens are shared: blocks of so many warps, each taking a tile at a time, with little left over."""
    tiles = vocab // ROWS
    if tiles <= _BLOCKS * 8:
        return max(1, -(-tiles // 8)), 8

    def cost(warps: int) -> tuple[int, int]:
        rounds = -(-tiles // (_BLOCKS * warps))
        return rounds * warps, warps

    warps = min(range(8, 13), key=cost)
    rounds = -(-tiles // (_BLOCKS * warps))
    return -(-tiles // (rounds * warps)), warps


def candidates(vocab: int, rows: int, device: torch.device | str = "cuda") -> tuple[Tensor, Tensor]:
    """Buffers for what `head` finds: values float32 and tokens int32, each [rows, blocks]."""
    blocks, _ = blocks_and_warps(vocab)
    return torch.empty(rows, blocks, device=device), torch.empty(rows, blocks, dtype=torch.int32, device=device)


def head(
    residual: Tensor,
    norm: Norm,
    weight: HeadWeight,
    found: tuple[Tensor, Tensor],
    rows: int,
    logits: Tensor | None = None,
    turns: Turns | None = None,
) -> None:
    """found = each block's best logit and its token (the lower of equals); logits float32 [rows, V] too, if given.

    residual float32 [rows, hidden]. The weight has no pre_quant_scale: a checkpoint's head never has one. turns: of the step,
    if its launches overlap, and this the last of them. ValueError: too many rows.
    """
    check_rows(rows)
    blocks, warps = blocks_and_warps(weight.vocab)
    macros = defines(HIDDEN=weight.hidden, VOCAB=weight.vocab, HEAD_WARPS=warps, HEAD_KIND=KINDS[weight.kind])
    shared = min(rows, COLUMNS) * (weight.hidden + 8) * 2
    row_scales = weight.scales if weight.kind == "int8" else None
    group_scales = weight.scales if weight.kind == "int4" else None
    launch_in_turn(
        turns, kernel(SOURCE, "head", macros), (blocks, -(-rows // COLUMNS)), 32 * warps,
        residual, norm.square_sums, norm.weight, norm.eps, weight.tiles, group_scales, row_scales, logits, *found, rows,
        shared=shared,
    )  # fmt: skip
