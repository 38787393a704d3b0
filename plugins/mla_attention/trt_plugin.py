"""mla_attention as a TensorRT plugin. Its cache outputs are its cache inputs, overwritten."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from trtvlm.plugins.cuda.memory import total_bytes
from trtvlm.plugins.mla_attention.boundary import MLABoundary, workspace_pieces
from trtvlm.plugins.mla_attention.decode import MOST_POSITIONS, MLAWeights
from trtvlm.plugins.tensorrt.binding import trt
from trtvlm.plugins.tensorrt.plugin import OperatorPlugin

_HALF, _FLOAT, _INT = trt.DataType.HALF, trt.DataType.FLOAT, trt.DataType.INT32


class MLAAttentionPlugin(OperatorPlugin):
    """Inputs: q, latent, k_pe, keys, values (`MLAWeights`), cosines, sines, latent cache, k_pe cache, cursor."""

    OPERATOR = "mla_attention"
    FIELDS = {"heads": int, "nope": int, "rope": int, "value": int, "rank": int, "positions": int}  # noqa: RUF012
    ALIASED = {1: 7, 2: 8}  # noqa: RUF012

    def check(self) -> None:
        """ValueError: sizes that the kernels were not written for."""
        n = self.numbers
        if n["positions"] > MOST_POSITIONS:
            raise ValueError(f"the attention kernels merge at most {MOST_POSITIONS} positions, not {n['positions']}")
        if n["rank"] % 64 or n["rope"] % 16 or n["value"] % 16:
            raise ValueError(
                f"the attention kernels do not take a rank, rope and value of {n['rank'], n['rope'], n['value']}"
            )

    @property
    def input_types(self) -> tuple[trt.DataType, ...]:
        """Halves, but the tables and the cursor."""
        return _HALF, _HALF, _HALF, _HALF, _HALF, _FLOAT, _FLOAT, _HALF, _HALF, _INT

    @property
    def output_types(self) -> tuple[trt.DataType, ...]:
        """What was attended to, and the caches."""
        return _HALF, _HALF, _HALF

    @property
    def input_shapes(self) -> tuple[tuple[int, ...], ...]:
        """As `MLABoundary` takes them."""
        heads, nope, rope, value, rank, positions = (int(number) for number in self.numbers.values())
        tile = (4, 32, 8)
        return (
            (-1, heads * (nope + rope)),
            (-1, rank),
            (-1, rope),
            (heads, rank // 16, -(-nope // 64), *tile),
            (heads, value // 16, rank // 64, *tile),
            (positions, rope // 2),
            (positions, rope // 2),
            (positions, rank),
            (positions, rope),
            (1,),
        )

    @property
    def output_shapes(self) -> tuple[tuple[int, ...], ...]:
        """[rows, heads * value], and the caches."""
        shapes = self.input_shapes
        return (-1, int(self.numbers["heads"] * self.numbers["value"])), shapes[7], shapes[8]

    @property
    def workspace_bytes(self) -> int:
        """As `MLABoundary`'s."""
        heads, _, rope, _, rank, positions = (int(number) for number in self.numbers.values())
        return total_bytes(workspace_pieces(heads, rank, rope, positions))

    def launch(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], memory: Tensor) -> None:
        """As `OperatorPlugin.launch`. Blocks of positions that the cache has not reached leave at once."""
        heads, nope, rope, value, rank, positions = (int(number) for number in self.numbers.values())
        q, latent, k_pe, keys, values, cosines, sines, latent_cache, k_pe_cache, cursor = inputs
        weights = MLAWeights(keys, values, None, heads, nope, rope, value, rank)
        run = MLABoundary(weights, (cosines, sines), positions)
        run(q, latent, k_pe, latent_cache, k_pe_cache, cursor, outputs[0], memory, positions)
