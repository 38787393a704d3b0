"""The executor that runs an engine directory's compiled graphs, with the project's operators between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trtvlm.model.artifacts import EngineDir
from trtvlm.model.cache import KVCache
from trtvlm.model.chain import Chain, cache_positions
from trtvlm.model.errors import UserError
from trtvlm.plugins.quantized_checkpoint import QuantizedReader
from trtvlm.runtime.cuda.speculation import SPAN, Speculation, run_steps
from trtvlm.runtime.executor import MAX_DECODE_WIDTH
from trtvlm.runtime.lane import PREFILL_CHUNK
from trtvlm.runtime.tensorrt.installed import ONE_ENGINE
from trtvlm.runtime.tensorrt.operators import Operators, ReferenceOperators
from trtvlm.runtime.tensorrt.program import ChainProgram
from trtvlm.runtime.tensorrt.step import CompiledStep
from trtvlm.runtime.tensorrt.vision import VisionProgram
from trtvlm.runtime.tensorrt.whole import WholeProgram

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from trtvlm.model.config import ModelConfig
    from trtvlm.model.inputs import ImageView
    from trtvlm.plugins.speculative_accept.state import Start
    from trtvlm.runtime.speculate import Step
    from trtvlm.runtime.tensorrt.segment import Backend

# Positions past an answer's end that replays of a finished graph still write.
SPARE = 16


class ChainExecutor:
    """`trtvlm.runtime.executor.Executor` over an engine directory's chain of graphs, in float16.

    UserError: a directory without engines, or one that does not fit together. Logits come back as float32 on the CPU.
    """

    def __init__(self, engine: EngineDir, backend: Backend, max_length: int) -> None:
        self.config: ModelConfig = engine.model_config()
        self.device = backend.device
        language = self.config.language
        chain = read_chain(engine)
        whole = engine.config()["build_config"].get("flavour") == ONE_ENGINE
        # Kernels read the cache in whole chunks of positions.
        # One engine appends every row of its widest step, wanted or not; replays of a finished graph go on for a while.
        spare = (chain.profiles["decode"][2] if whole else 0) + (SPARE if self.device.type == "cuda" else 0)
        positions = cache_positions(max_length)
        if not whole:
            positions = min(cache_positions(max_length + spare), language.max_position_embeddings)
        self.max_length = min(max_length, positions - spare)
        dtype = getattr(torch, next(iter(chain.cache.values())).dtype)
        self.cache = KVCache(language, 1, positions, dtype, self.device)
        self._cursor = torch.zeros(1, dtype=torch.int32, device=self.device)
        reader = QuantizedReader(engine)

        def operators() -> Operators:
            if self.device.type == "cpu":
                return ReferenceOperators(reader, self.cache, self._cursor)
            from trtvlm.runtime.tensorrt.kernels import KernelOperators

            return KernelOperators(reader, self.cache, self._cursor, language)

        self.program: ChainProgram | WholeProgram
        if whole:
            self.program = WholeProgram(chain, engine, backend, reader, self.cache, self._cursor, PREFILL_CHUNK)
        else:
            self.program = ChainProgram(chain, engine.language, backend, operators, PREFILL_CHUNK)
        self._vision = VisionProgram(engine, backend, self.program.hidden.dtype)
        self._step = CompiledStep(self.program, self._cursor)
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._loops: dict[int, Speculation] = {}

    @property
    def length(self) -> int:
        """Positions in the cache now."""
        return self.cache.length

    def rollback(self, length: int) -> None:
        """Forget everything from position `length` on."""
        self.cache.rollback(length)

    def filled(self, length: int) -> None:
        """Say that graphs run elsewhere have filled the cache up to `length`."""
        self.cache.length = length

    def steps(self, draft: ChainExecutor | None, start: Start, drafted: int) -> Iterator[Step] | None:
        """The speculative loop from `start`, whole steps in CUDA graphs, with a draft that holds the same prompt or none.

        None without a GPU.
        """
        if self.device.type == "cpu":
            return None
        key = id(draft)
        if key not in self._loops:
            self._loops[key] = Speculation(self._step, None if draft is None else draft._step)
        return run_steps(self._loops[key], self, draft, start, drafted)

    @torch.inference_mode()
    def encode_image(self, image: ImageView) -> Tensor:
        """[image tokens, hidden] of one image; alone, so that its bits do not depend on the images beside it."""
        return self._vision.encode(image)

    @torch.inference_mode()
    def embed(self, tokens: Tensor) -> Tensor:
        """Input embeddings [T, hidden] of int64 token ids [T]."""
        program, out = self.program, []
        for part in torch.split(tokens, program.most_rows):
            program.tokens[: len(part)] = part.to(self.device)
            program.embed(len(part))
            out.append(program.hidden[: len(part)].clone())
        return torch.cat(out)

    @torch.inference_mode()
    def prefill(self, embeds: Tensor) -> Tensor:
        """Append embeddings [T, hidden]. Returns float32 [vocab]: logits after the last one."""
        program = self.program
        for part in torch.split(embeds, program.most_rows):
            start = self._advance(len(part))
            program.hidden[: len(part)] = part
            program.prefill(len(part), self._span(start + len(part)))
        return program.logits[0].to("cpu", torch.float32, copy=True)

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Append 1 to MAX_DECODE_WIDTH tokens. Returns float32 [tokens, vocab]; no row depends on the later ones."""
        if not 1 <= len(tokens) <= MAX_DECODE_WIDTH:
            raise ValueError(f"{len(tokens)} tokens in one decode call; 1 to {MAX_DECODE_WIDTH} are supported")
        width = self.program.width
        return torch.cat([self._decode(tokens[at : at + width]) for at in range(0, len(tokens), width)])

    def _decode(self, tokens: Sequence[int]) -> Tensor:
        rows = len(tokens)
        start = self._advance(rows)
        self.program.tokens[:rows] = torch.tensor(list(tokens))
        span = self._span(start + rows)
        if self.device.type == "cpu":
            self.program.decode(rows, span)
        else:
            self._graph(rows, span).replay()
        return self.program.logits[:rows].to("cpu", torch.float32, copy=True)

    def _advance(self, rows: int) -> int:
        """Make room for `rows` positions -> where they start, which the cursor says to the operators too."""
        start = self.cache.length
        self.cache.advance(rows)
        self._cursor.fill_(start)
        return start

    def _span(self, length: int) -> int:
        return min(-(-length // SPAN) * SPAN, self.cache.max_len)

    def _graph(self, rows: int, span: int) -> torch.cuda.CUDAGraph:
        """The whole step of `rows` rows, captured: segments and operators on one stream."""
        if (rows, span) not in self._graphs:
            self.program.decode(rows, span)  # compiles and sets shapes; writes what the replay writes again
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.program.decode(rows, span)
            self._graphs[rows, span] = graph
        return self._graphs[rows, span]


def read_chain(engine: EngineDir) -> Chain:
    """The directory's chain.json. UserError: it has none, or one of another version."""
    path = engine.language / "chain.json"
    if not path.is_file():
        raise UserError(f"{engine.path} has no compiled engines: build it again without --no-compile.")
    try:
        return Chain.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): build the engine directory again.") from None
