"""Image and prompt in, a stream of text out: what the command line and the server use."""

from __future__ import annotations

import secrets
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trtvlm.model.errors import UserError
from trtvlm.plugins.speculative_accept.state import Start
from trtvlm.runtime.lane import Lane
from trtvlm.runtime.result import FinishReason, Result
from trtvlm.runtime.sampling import Sampler
from trtvlm.runtime.speculate import Step, speculate
from trtvlm.runtime.stop import TextStream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from trtvlm.model.inputs import ModelInputs
    from trtvlm.model.processor import Processor
    from trtvlm.runtime.engine import Engine
    from trtvlm.runtime.executor import Executor
    from trtvlm.runtime.request import Request


class Cancelled(Exception):  # noqa: N818 - no error: the caller wanted it
    """The caller asked to stop; the session is ready for the next request."""


@dataclass
class _Tally:
    """What a request has cost so far."""

    drafted: int = 0
    accepted: int = 0
    steps: int = 0
    reused: int = 0
    image_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    first_token_ms: float = 0.0
    tokens: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)


class Session:
    """Answers requests on one engine, one at a time; later requests wait for the lock.

    Encoded images are kept, and of a conversation that goes on, the part of the prompt that is the same as before.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._target = Lane(engine.target)
        self._draft = Lane(engine.draft) if engine.draft is not None else None
        self._lock = threading.Lock()

    @property
    def processor(self) -> Processor:
        """The engine's processor."""
        return self.engine.processor

    def prepare(self, request: Request) -> ModelInputs:
        """Read the images and tokenize the prompt. UserError: anything wrong with them, or no room for an answer."""
        inputs = self.processor(request.conversation)
        length, limit = len(inputs.input_ids), self.engine.target.max_length
        if length >= limit:
            images = sum(inputs.num_image_tokens)
            raise UserError(
                f"The prompt has {length} tokens ({images} for {len(inputs.images)} images), which leaves no room for "
                f"an answer in the engine's context of {limit}: send fewer or smaller images, or build a longer engine."
            )
        return inputs

    def generate(
        self, request: Request, cancel: threading.Event | None = None, inputs: ModelInputs | None = None
    ) -> Iterator[str | Result]:
        """Pieces of text as they become certain, then, last, the Result.

        inputs: `prepare(request)`, if the caller has done that already. Raises what `prepare` raises, and Cancelled
        soon after `cancel` is set (it is looked at before every image, prefill chunk and step). Closing the iterator
        ends the work too.
        """
        started = time.perf_counter()
        inputs = inputs if inputs is not None else self.prepare(request)

        def checkpoint() -> None:
            if cancel is not None and cancel.is_set():
                raise Cancelled

        with self._lock:
            tally = _Tally()
            stream = TextStream(self.processor.decode, request.stop)
            finish: FinishReason = "length"
            for step in self._steps(request, inputs, tally, started, checkpoint):
                piece = ""
                for token in step.tokens:
                    tally.tokens.append(token)
                    piece += stream.push(token)
                    if stream.stopped or token == self.processor.eos_id:
                        finish = "stop"
                        break
                if piece:
                    tally.text.append(piece)
                    yield piece
                if finish == "stop":
                    break
            if piece := stream.finish():
                tally.text.append(piece)
                yield piece
            if stream.stopped:  # by the bytes of an unfinished character, which show only now
                finish = "stop"
        yield self._result(tally, inputs, finish, started)

    def answer(self, request: Request, cancel: threading.Event | None = None) -> Result:
        """`generate`, all at once."""
        *_, result = self.generate(request, cancel)
        assert isinstance(result, Result)
        return result

    def _steps(
        self, request: Request, inputs: ModelInputs, tally: _Tally, started: float, checkpoint: Callable[[], None]
    ) -> Iterator[Step]:
        """The first token, from the prefill, as a step that drafted nothing; then speculation. Counts into `tally`."""
        sampler = Sampler(request.temperature, request.top_p, request.seed)
        filled = self._target.fill(inputs, checkpoint)
        tally.image_ms, tally.prefill_ms, tally.reused = filled.image_ms, filled.prefill_ms, filled.reused
        first, _ = sampler.choose(filled.logits)
        tally.first_token_ms = 1e3 * (time.perf_counter() - started)
        yield Step([first], 0, 0)

        room = self.engine.target.max_length - len(inputs.input_ids)
        left = min(request.max_new_tokens, room) - 1
        draft = self._fill_draft(request, inputs, tally, checkpoint) if left > 1 else None
        steps = self._graphed(request, inputs, draft, first, left) or speculate(
            self.engine.target,
            draft,
            first,
            sampler,
            max_tokens=left,
            draft_tokens=request.draft_tokens,
            eos=self.processor.eos_id,
        )
        while True:
            checkpoint()
            began = time.perf_counter()
            step = next(steps, None)
            tally.decode_ms += 1e3 * (time.perf_counter() - began)
            if step is None:
                return
            tally.steps += 1
            tally.drafted += step.drafted
            tally.accepted += step.accepted
            yield step

    def _graphed(
        self, request: Request, inputs: ModelInputs, draft: Executor | None, first: int, left: int
    ) -> Iterator[Step] | None:
        """The steps of executors that run them whole on the device; None for the others."""
        begin = getattr(self.engine.target, "steps", None)
        if begin is None or left < 1:
            return None
        # On the device a request without a seed needs one, too.
        seed = request.seed if request.seed is not None else secrets.randbits(63)
        start = Start(
            int(inputs.input_ids[-1]), first, len(inputs.input_ids), left, self.processor.eos_id, seed,
            request.temperature, request.top_p,
        )  # fmt: skip
        steps: Iterator[Step] | None = begin(draft, start, request.draft_tokens)
        return steps

    def _fill_draft(
        self, request: Request, inputs: ModelInputs, tally: _Tally, checkpoint: Callable[[], None]
    ) -> Executor | None:
        lane = self._draft
        if lane is None or not request.draft_tokens or len(inputs.input_ids) >= lane.executor.max_length:
            return None
        filled = lane.fill(inputs, checkpoint)
        tally.image_ms += filled.image_ms
        tally.prefill_ms += filled.prefill_ms
        return lane.executor

    def _result(self, tally: _Tally, inputs: ModelInputs, finish: FinishReason, started: float) -> Result:
        return Result(
            text="".join(tally.text),
            token_ids=tuple(tally.tokens),
            finish_reason=finish,
            prompt_tokens=len(inputs.input_ids),
            image_tokens=sum(inputs.num_image_tokens),
            reused_tokens=tally.reused,
            drafted=tally.drafted,
            accepted=tally.accepted,
            steps=tally.steps,
            timings={
                "load": self.engine.load_ms,
                "image": tally.image_ms,
                "prefill": tally.prefill_ms,
                "decode": tally.decode_ms,
                "first_token": tally.first_token_ms,
                "total": 1e3 * (time.perf_counter() - started),
            },
        )
