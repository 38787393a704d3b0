"""A chain of segments and operators over fixed buffers: a decode pass or a prefill pass is a loop over its steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from trtvlm.model.chain import Chain, EngineStep
from trtvlm.runtime.tensorrt.buffers import plan_buffers
from trtvlm.runtime.tensorrt.operators import Launch, Operators
from trtvlm.runtime.tensorrt.segment import Backend, Graph, Segment


@dataclass(frozen=True)
class _Opened:
    """A segment, and whether a prefill runs it on its last row only."""

    segment: Segment
    last: bool


class ChainProgram:
    """A whole language model. Launches only; on a GPU a decode pass can be captured in a CUDA graph.

    Every decode pass runs its segments on `width` rows, however few are asked for: TensorRT may take another kernel for
    another number of rows, whose sums are in another order, and then a row's bits would depend on how many are decoded
    with it. Weights are read once either way. Operators run the rows that are asked for; theirs do not depend on it.

    tokens int64 [rows], hidden [rows, hidden] and logits float32 [width, vocab] are the buffers to write and read.
    """

    def __init__(
        self, chain: Chain, folder: Path, backend: Backend, operators: Callable[[], Operators], most_rows: int
    ) -> None:
        """Open all of `folder`'s graphs. `most_rows`: the longest prefill pass, at most what the engines take."""
        self.chain = chain
        self.width = chain.profiles["decode"][2]
        self.most_rows = min(most_rows, chain.profiles["prefill"][2])
        self.buffers = plan_buffers(chain, self.most_rows, self.width).allocate(backend.device)
        self.tokens, self.hidden = self.buffers[chain.input], self.buffers[chain.hidden]
        self.logits = self.buffers[chain.output]
        steps = list(chain.engines())
        opened = iter(backend.open([self._graph(step, folder) for step in steps]))
        bound = operators()
        self._steps: list[_Opened | Launch] = [
            _Opened(next(opened), step.rows == "last")
            if isinstance(step, EngineStep)
            else bound.bind(step, self._of(step.inputs), self._of(step.outputs))
            for step in chain.steps
        ]
        # Steps up to the one that makes `hidden` are the embedding.
        self._first = 1 + next(n for n, step in enumerate(chain.steps) if chain.hidden in step.outputs.values())

    def embed(self, rows: int) -> None:
        """The first `rows` tokens -> their rows of `hidden`."""
        for step in self._steps[: self._first]:
            assert isinstance(step, _Opened)
            step.segment.run(rows)

    def prefill(self, rows: int, span: int) -> None:
        """The first `rows` rows of `hidden` -> the cache, and logits [0] after the last of them."""
        for step in self._steps[self._first :]:
            if not isinstance(step, _Opened):
                step(rows, span)
            elif step.last:
                step.segment.run(1, rows - 1)
            else:
                step.segment.run(rows)

    def decode(self, rows: int, span: int) -> None:
        """The first `rows` tokens -> the cache, and that many rows of logits."""
        for step in self._steps:
            if isinstance(step, _Opened):
                step.segment.run(self.width, decode=True)
            else:
                step(rows, span)

    def _graph(self, step: EngineStep, folder: Path) -> Graph:
        return Graph(step.name, folder, self._of(step.inputs), self._of(step.outputs), self.width)

    def _of(self, names: dict[str, str]) -> dict[str, Tensor]:
        return {own: self.buffers[name] for own, name in names.items()}
