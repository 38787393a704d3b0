"""gqa_attention as a TensorRT plugin. Its cache outputs are its cache inputs, overwritten."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from trtvlm.plugins.cuda.memory import total_bytes
from trtvlm.plugins.gqa_attention.boundary import GQABoundary, workspace_pieces
from trtvlm.plugins.gqa_attention.decode import MOST_POSITIONS
from trtvlm.plugins.tensorrt.binding import trt
from trtvlm.plugins.tensorrt.plugin import OperatorPlugin

_HALF, _FLOAT, _INT = trt.DataType.HALF, trt.DataType.FLOAT, trt.DataType.INT32


class GQAAttentionPlugin(OperatorPlugin):
    """Inputs: q, k, v, cosines, sines, key cache, value cache, cursor."""

    OPERATOR = "gqa_attention"
    FIELDS = {"heads": int, "kv_heads": int, "width": int, "positions": int}  # noqa: RUF012
    ALIASED = {1: 5, 2: 6}  # noqa: RUF012

    def check(self) -> None:
        """ValueError: sizes that the kernels were not written for."""
        n = self.numbers
        if n["positions"] > MOST_POSITIONS:
            raise ValueError(f"the attention kernels merge at most {MOST_POSITIONS} positions, not {n['positions']}")
        if n["heads"] % n["kv_heads"] or n["heads"] // n["kv_heads"] > 2 or n["width"] > 128 or n["width"] % 16:
            raise ValueError(
                f"the kernel takes up to 2 heads a key head of 16 to 128, not {n['heads']} for {n['kv_heads']} of {n['width']}"
            )

    @property
    def input_types(self) -> tuple[trt.DataType, ...]:
        """Halves, but the tables and the cursor."""
        return _HALF, _HALF, _HALF, _FLOAT, _FLOAT, _HALF, _HALF, _INT

    @property
    def output_types(self) -> tuple[trt.DataType, ...]:
        """What was attended to, and the caches."""
        return _HALF, _HALF, _HALF

    @property
    def input_shapes(self) -> tuple[tuple[int, ...], ...]:
        """As `GQABoundary` takes them."""
        heads, kv_heads, width, positions = (int(number) for number in self.numbers.values())
        table, cache, new = (positions, width // 2), (kv_heads, positions, width), (-1, kv_heads * width)
        return (-1, heads * width), new, new, table, table, cache, cache, (1,)

    @property
    def output_shapes(self) -> tuple[tuple[int, ...], ...]:
        """[rows, heads * width], and the caches."""
        shapes = self.input_shapes
        return shapes[0], shapes[5], shapes[6]

    @property
    def workspace_bytes(self) -> int:
        """As `GQABoundary`'s."""
        heads, _, width, positions = (int(number) for number in self.numbers.values())
        return total_bytes(workspace_pieces(heads, width, positions))

    def launch(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], memory: Tensor) -> None:
        """As `OperatorPlugin.launch`. Blocks of positions that the cache has not reached leave at once."""
        heads, _, width, positions = (int(number) for number in self.numbers.values())
        q, k, v, cosines, sines, k_cache, v_cache, cursor = inputs
        run = GQABoundary(heads, width, (cosines, sines), positions)
        run(q, k, v, k_cache, v_cache, cursor, outputs[0], memory, positions)
