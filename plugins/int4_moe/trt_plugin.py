"""int4_moe as a TensorRT plugin: the experts' weights are its inputs, in tiles, and are never dequantized."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trtvlm.plugins.int4_moe.boundary import MoEBoundary
from trtvlm.plugins.int4_moe.layer import MoEWeights, Tiles
from trtvlm.plugins.int4_moe.reference import Routing
from trtvlm.plugins.tensorrt.binding import trt
from trtvlm.plugins.tensorrt.plugin import OperatorPlugin

_HALF, _FLOAT, _INT = trt.DataType.HALF, trt.DataType.FLOAT, trt.DataType.INT32


class Int4MoEPlugin(OperatorPlugin):
    """Inputs: x, router logits; codes, scales and pre-quant scale of fc and of proj; the same of the shared expert's two;
    the correction bias. `shared` is the shared expert's width, 0 without one; `sigmoid`, `normalise`, `biased` are 0 or 1.
    """  # fmt: skip

    OPERATOR = "int4_moe"
    FIELDS = {  # noqa: RUF012
        "experts": int,
        "hidden": int,
        "width": int,
        "shared": int,
        "top_k": int,
        "sigmoid": int,
        "normalise": int,
        "biased": int,
        "scaling": float,
    }

    def check(self) -> None:
        """ValueError: what the kernels do not take."""
        self._weights(self._sizes())
        if self.numbers["hidden"] % 64 or self.numbers["width"] % 64:
            raise ValueError(
                f"the experts' sizes must be multiples of 64, not {self._int('hidden')} and {self._int('width')}"
            )

    @property
    def input_types(self) -> tuple[trt.DataType, ...]:
        """Codes are int32 words of eight."""
        weight = (_INT, _HALF, _HALF)
        return (_HALF, _FLOAT, *(weight * (4 if self.numbers["shared"] else 2)), *((_FLOAT,) * self._int("biased")))

    @property
    def output_types(self) -> tuple[trt.DataType, ...]:
        """The experts' sum."""
        return (_HALF,)

    @property
    def input_shapes(self) -> tuple[tuple[int, ...], ...]:
        """As `MoEWeights` has them."""
        experts, hidden, width, shared = (self._int(name) for name in ("experts", "hidden", "width", "shared"))
        return (
            (-1, hidden),
            (-1, experts),
            *_weight((experts,), 2 * width, hidden),
            *_weight((experts,), hidden, width),
            *(_weight((), 2 * shared, hidden) if shared else ()),
            *(_weight((), hidden, shared) if shared else ()),
            *(((experts,),) if self.numbers["biased"] else ()),
        )

    @property
    def output_shapes(self) -> tuple[tuple[int, ...], ...]:
        """[rows, hidden]."""
        return ((-1, self._int("hidden")),)

    @property
    def workspace_bytes(self) -> int:
        """As `MoEBoundary`'s."""
        return MoEBoundary(self._weights(self._sizes())).workspace_bytes

    def launch(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], memory: Tensor) -> None:
        """As `OperatorPlugin.launch`."""
        MoEBoundary(self._weights(inputs))(inputs[0], inputs[1], outputs[0], memory)

    def _sizes(self) -> list[Tensor]:
        """Tensors of the inputs' shapes, for one row."""
        return [torch.empty([abs(size) for size in shape], device="meta") for shape in self.input_shapes]

    def _weights(self, inputs: Sequence[Tensor]) -> MoEWeights:
        routing = Routing(
            self._int("top_k"), "sigmoid" if self.numbers["sigmoid"] else "softmax", bool(self.numbers["normalise"]),
            float(self.numbers["scaling"]),
        )  # fmt: skip
        tiles = [Tiles(*inputs[at : at + 3]) for at in range(2, len(inputs) - self._int("biased"), 3)]
        router = torch.empty(self._int("hidden") // 16, self._int("experts"), 16, device="meta")
        return MoEWeights(router, inputs[-1] if self.numbers["biased"] else None, routing, *tiles)

    def _int(self, name: str) -> int:
        return int(self.numbers[name])


def _weight(lead: tuple[int, ...], outputs: int, inputs: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of a weight's codes, scales and pre-quant scale."""
    tiles = (*lead, outputs // 16, inputs // 64)
    return (*tiles, 32, 4), (*tiles, 8, 2), (inputs,)
