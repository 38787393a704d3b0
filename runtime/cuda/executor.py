"""The executor that runs an INT4 engine directory on a GPU with the project's kernels, under CUDA graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trtvlm.model.artifacts import EngineDir
from trtvlm.model.cache import KVCache
from trtvlm.plugins.quantized_checkpoint import QuantizedReader, load_vision
from trtvlm.runtime.cuda.decode import DecodeProgram
from trtvlm.runtime.cuda.prefill import CHUNK, Prefill, head_of
from trtvlm.runtime.cuda.speculation import SPAN, Speculation, run_steps
from trtvlm.runtime.cuda.vision import VisionProgram
from trtvlm.runtime.cuda.weights import load_weights
from trtvlm.runtime.executor import MAX_DECODE_WIDTH

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from trtvlm.model.cache_kind import CacheKind
    from trtvlm.model.config import ModelConfig
    from trtvlm.model.inputs import ImageView
    from trtvlm.plugins.speculative_accept.state import Start
    from trtvlm.runtime.speculate import Step

# Positions past an answer's end that replays of a finished graph still write.
SPARE = 16


class CudaExecutor:
    """`trtvlm.runtime.executor.Executor` over an engine directory's INT4 checkpoint, in float16 on one GPU.

    UserError: a checkpoint that the kernels do not run. Logits come back as float32 on the CPU.
    """

    def __init__(self, folder: Path, device: str, max_length: int, kv_cache: CacheKind = "fp16") -> None:
        engine = EngineDir(folder)
        self.config: ModelConfig = engine.model_config()
        language = self.config.language
        self.device = torch.device(device)
        torch.cuda.set_device(self.device.index or 0)
        positions = min(-(-max_length // 64) * 64, language.max_position_embeddings)
        self.max_length = min(max_length, positions - SPARE)
        self.cache = KVCache(language, 1, positions, torch.half, self.device, kv_cache)
        self.weights = load_weights(QuantizedReader(engine), self.device)
        self.program = DecodeProgram(self.weights, self.cache, MAX_DECODE_WIDTH)
        self._prefill = Prefill(self.weights, self.cache)
        self._vision = load_vision(engine).to(self.device, torch.half)
        self._views = VisionProgram(self._vision.vision, self._vision.projector, self.device)
        self._tokens = torch.zeros(MAX_DECODE_WIDTH, dtype=torch.int32, device=self.device)
        self._cursor = torch.zeros(1, dtype=torch.int32, device=self.device)
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._loops: dict[int, GraphedSteps] = {}

    @property
    def prefill_chunk(self) -> int:
        """Positions that a prompt should come in at a time."""
        return CHUNK

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

    def steps(self, draft: CudaExecutor | None, start: Start, drafted: int) -> Iterator[Step]:
        """The speculative loop from `start`, whole steps in graphs, with a draft that holds the same prompt or none."""
        key = id(draft)
        if key not in self._loops:
            self._loops[key] = GraphedSteps(self, draft)
        return self._loops[key].run(start, drafted)

    @torch.inference_mode()
    def encode_image(self, image: ImageView) -> Tensor:
        """[image tokens, hidden] of one image; alone, so that its bits do not depend on the images beside it."""
        return self._vision.image_embeds(self._views.encode(image.pixels), image.tiles)

    @torch.inference_mode()
    def embed(self, tokens: Tensor) -> Tensor:
        """Input embeddings half [T, hidden] of int64 token ids [T]."""
        out: Tensor = self.weights.embedding[tokens.to(self.device)]
        return out

    @torch.inference_mode()
    def prefill(self, embeds: Tensor) -> Tensor:
        """Append embeddings [T, hidden]. Returns float32 [vocab]: logits after the last one."""
        head_of(self.program, self._prefill.run(embeds))
        return self.program.logits[0].cpu()

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Append 1 to MAX_DECODE_WIDTH tokens. Returns float32 [tokens, vocab]; no row depends on the others."""
        rows = len(tokens)
        if not 1 <= rows <= MAX_DECODE_WIDTH:
            raise ValueError(f"{rows} tokens in one decode call; 1 to {MAX_DECODE_WIDTH} are supported")
        start = self.cache.length
        self.cache.advance(rows)
        self._tokens[:rows] = torch.tensor(list(tokens), dtype=torch.int32)
        self._cursor.fill_(start)
        self._graph(rows, self._span(start + rows)).replay()
        return self.program.logits[:rows].cpu()

    def _span(self, length: int) -> int:
        return min(-(-length // SPAN) * SPAN, self.cache.max_len)

    def _graph(self, rows: int, span: int) -> torch.cuda.CUDAGraph:
        if (rows, span) not in self._graphs:
            step = (self._tokens[:rows], self._cursor, rows, span)
            self.program.launch(*step, logits=True)  # compiles; writes what the replay writes again
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.program.launch(*step, logits=True)
            self._graphs[rows, span] = graph
        return self._graphs[rows, span]


class GraphedSteps:
    """The speculative loop of two CUDA executors, whole steps in graphs: what `trtvlm.runtime.speculate` is elsewhere.

    draft: a CudaExecutor that holds the same prompt, or None.
    """

    def __init__(self, target: CudaExecutor, draft: CudaExecutor | None) -> None:
        self.target, self.draft = target, draft
        self._speculation = Speculation(target.program, None if draft is None else draft.program)

    def run(self, start: Start, drafted: int) -> Iterator[Step]:
        """Steps from `start`; afterwards both caches hold the prompt and what was emitted."""
        return run_steps(self._speculation, self.target, self.draft, start, drafted)
