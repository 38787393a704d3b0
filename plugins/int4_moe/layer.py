"""A MoE layer's weights and buffers, as its kernels take them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trtvlm.plugins.cuda.launch import Defines, defines
from trtvlm.plugins.int4_linear.decode import COLUMNS
from trtvlm.plugins.int4_moe.reference import Routing

ROUTE_WARPS = 8
_ROUTER_EXPERTS, INPUT_VALUES = 2, 256  # of a block


@dataclass(frozen=True)
class Tiles:
    """An INT4 weight in tiles (`trtvlm.plugins.cuda.tiles.int4_tiles`), of one layer or stacked over experts."""

    codes: Tensor
    scales: Tensor
    pre_quant_scale: Tensor | None = None


@dataclass(frozen=True)
class MoEWeights:
    """Router float32 [hidden / 16, E, 16] (`router_tiles`), experts and shared expert; fc is [up; gate].

    ValueError: what the kernels do not take.
    """

    router: Tensor
    correction_bias: Tensor | None
    routing: Routing
    fc: Tiles
    proj: Tiles
    shared_fc: Tiles | None = None
    shared_proj: Tiles | None = None

    def __post_init__(self) -> None:
        experts, width = self.experts, self.width
        if experts > 128 or self.routing.top_k > 15:
            raise ValueError(f"the kernels route to at most 15 of 128 experts, not {self.routing.top_k} of {experts}")
        if self.correction_bias is not None and self.routing.scoring != "sigmoid":
            raise ValueError("the kernels correct sigmoid scores only")
        if self.routing.groups > 1:
            raise ValueError("the kernels do not route in groups")
        if self.shared_width % width:
            raise ValueError(
                f"the shared expert's width {self.shared_width} must be a multiple of the experts' {width}"
            )

    @property
    def experts(self) -> int:
        """How many there are to choose from."""
        return self.router.shape[1]

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return 16 * self.router.shape[0]

    @property
    def width(self) -> int:
        """Inner width of a routed expert."""
        return 64 * self.proj.codes.shape[2]

    @property
    def shared_width(self) -> int:
        """Inner width of the shared expert; 0 if there is none."""
        return 0 if self.shared_proj is None else 64 * self.shared_proj.codes.shape[1]

    @property
    def shared_pairs(self) -> int:
        """Tiles of the shared expert's up weights, with those of its gate, that a block of `route` has.

        Two for inputs of up to 2,048, as its registers allow: every block normalises all rows for itself.
        """
        return 2 if self.hidden <= 2048 and self.shared_width % 32 == 0 else 1

    @property
    def units(self) -> int:
        """What a row goes through: the chosen experts, and the shared one as parts of their width."""
        return self.routing.top_k + self.shared_width // self.width

    @property
    def shared_expert(self) -> list[Tensor]:
        """The shared expert's codes and scales, in the order they are read."""
        return [tensor for part in (self.shared_fc, self.shared_proj) if part for tensor in (part.codes, part.scales)]

    @property
    def macros(self) -> Defines:
        """What the kernels are compiled for."""
        shared_scale = None if self.shared_fc is None else self.shared_fc.pre_quant_scale
        return defines(
            HIDDEN=self.hidden, WIDTH=self.width, EXPERTS=self.experts, TOP_K=self.routing.top_k,
            SHARED=self.shared_width, SIGMOID=int(self.routing.scoring == "sigmoid"), NORMALISE=int(self.routing.normalise),
            SCALING=float(self.routing.scaling), BIASED=int(self.correction_bias is not None),
            EXPERT_SCALED=int(self.fc.pre_quant_scale is not None), SHARED_SCALED=int(shared_scale is not None),
            SHARED_PAIRS=self.shared_pairs, DOWN_BLOCK_WARPS=down_warps(self.hidden),
        )  # fmt: skip


@dataclass(frozen=True)
class MoEWorkspace:
    """Buffers of a layer, for up to `rows` rows; layers can share them.

    inputs, hidden and shared have a word of 16 bits for each value: halves or fixed point (include/fixed.cuh), whichever the next
    kernel takes; their scales are those of fixed point.
    """

    logits: Tensor
    weights: Tensor
    work: Tensor
    inputs: Tensor
    input_scales: Tensor
    hidden: Tensor
    hidden_scales: Tensor
    shared: Tensor
    shared_scales: Tensor

    @classmethod
    def allocate(cls, weights: MoEWeights, rows: int, device: torch.device | str) -> MoEWorkspace:
        """Room for `rows` rows of layers like `weights`."""
        experts, hidden = weights.experts, weights.hidden
        k, tiles = weights.routing.top_k, -(-rows // COLUMNS)
        return cls(
            torch.empty(rows, experts, device=device),
            torch.empty(rows, k, device=device),
            torch.zeros(tiles, 1 + 3 * min(COLUMNS * k, experts), dtype=torch.int32, device=device),
            torch.empty(tiles * COLUMNS, hidden, dtype=torch.half, device=device),
            torch.empty(tiles, hidden // 64, COLUMNS, device=device),
            torch.empty(rows, k, weights.width, dtype=torch.half, device=device),
            torch.empty(rows, k, weights.width // 64, device=device),
            torch.empty(rows, max(1, weights.shared_width), dtype=torch.half, device=device),
            torch.empty(rows, max(1, weights.shared_width // 64), device=device),
        )


@dataclass(frozen=True)
class DecodeWorkspace(MoEWorkspace):
    """The same for `moe_decode`, which has kernels of its own for up to 8 rows.

    given float32 [rows, top_k, width / 64, hidden]: what each group of hidden values gives. logit_sums int64 [E]: what a lone
    row's logits are made of. done: counters. Both are 0 between layers.
    """

    given: Tensor
    logit_sums: Tensor
    done: Tensor

    @classmethod
    def allocate(cls, weights: MoEWeights, rows: int, device: torch.device | str) -> DecodeWorkspace:
        """As in `MoEWorkspace`."""
        return cls(
            **vars(MoEWorkspace.allocate(weights, rows, device)),
            given=torch.empty(
                min(rows, COLUMNS), weights.routing.top_k, weights.width // 64, weights.hidden, device=device
            ),
            logit_sums=torch.zeros(weights.experts, dtype=torch.int64, device=device),
            done=torch.zeros(4, dtype=torch.int32, device=device),
        )


def parts(tiles: Tiles | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """pre_quant_scale, codes and scales of a weight that may not be there."""
    return (None, None, None) if tiles is None else (tiles.pre_quant_scale, tiles.codes, tiles.scales)


def router_tiles(router: Tensor) -> Tensor:
    """float32 [E, hidden] -> [hidden / 16, E, 16], so that a block that has 16 values of the residual stream reads on."""
    experts, hidden = router.shape
    return router.view(experts, hidden // 16, 16).transpose(0, 1).contiguous()


def router_blocks(experts: int, hidden: int) -> int:
    """Blocks that multiply with the router, and those that write what the experts read (router.cuh)."""
    return -(-experts // _ROUTER_EXPERTS) + -(-hidden // INPUT_VALUES)


def down_warps(hidden: int) -> int:
    """Warps of a block of `experts_down`: where an H200 has a multiprocessor for each block, as many as two blocks would have."""
    return 8 if hidden // 16 > 132 else 16
