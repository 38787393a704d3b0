"""Time: the floor that bytes and bandwidth set, and a projection from steps that were measured on another GPU.

Nothing here is a measurement of the planned GPU. The floor is bytes / data-sheet bandwidth. The projection begins with the
measured step and moves its bytes to the other GPU's bandwidth:

    ms = measured ms + (bytes / bandwidth - measured bytes / measured GPU's bandwidth) / share

so what a step takes besides (launches, gaps, latencies) stays as it was. `share` is how much of the bandwidth more bytes
get. At the projection's low end it is as much as a plain copy gets (all of it, where that was not measured); at its high end
what measured steps of more rows, which read more experts, got. On the measured GPU itself both ends are the measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trtvlm.builder.planner.gpus import GPU
from trtvlm.builder.planner.parts import EMBEDDINGS, HEAD, language_parts
from trtvlm.model.config import LanguageConfig, ModelConfig, VisionConfig


@dataclass(frozen=True)
class Range:
    """Milliseconds (or a ratio), from `low` to `high`."""

    low: float
    high: float

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.high + other.high)

    def __mul__(self, factor: float) -> Range:
        return Range(self.low * factor, self.high * factor)


def floor_ms(step_bytes: float, gpu: GPU) -> float:
    """Milliseconds that these bytes take at the data sheet's bandwidth."""
    return step_bytes / (gpu.bandwidth_gbps * 1e6)


@dataclass(frozen=True)
class Measured:
    """A measured step: the bytes it moves by our count, milliseconds, and launches."""

    bytes: float
    ms: float
    launches: int


@dataclass(frozen=True)
class Basis:
    """Measured steps of one model on `gpu`, the fewest bytes first, and what they say.

    share: of the data sheet's bandwidth, at which further bytes were moved. best: what a copy gets of it. fixed_ms: of the
    first step, what its bytes at `share` do not explain.
    """

    gpu: GPU
    steps: tuple[Measured, ...]
    share: float
    best: float
    fixed_ms: float

    @classmethod
    def of(cls, gpu: GPU, steps: Sequence[Measured], copy_gbps: float | None = None) -> Basis:
        """From one step or more. With one, or when more bytes took no longer, the share is that of the whole step."""
        ordered = sorted(steps, key=lambda step: step.bytes)
        first, last = ordered[0], ordered[-1]
        share = floor_ms(first.bytes, gpu) / first.ms
        if last.ms > first.ms:
            share = max(share, floor_ms(last.bytes - first.bytes, gpu) / (last.ms - first.ms))
        best = min(1.0, (copy_gbps or gpu.bandwidth_gbps) / gpu.bandwidth_gbps)
        share = min(best, share)
        return cls(gpu, tuple(ordered), share, best, first.ms - floor_ms(first.bytes, gpu) / share)

    @property
    def fixed_us_a_launch(self) -> float:
        """Microseconds of the first step's `fixed_ms` for each of its launches."""
        return 1e3 * self.fixed_ms / max(1, self.steps[0].launches)

    def ms(self, step_bytes: float) -> float:
        """A step of so many bytes on the measured GPU: between the measured ones linearly, beyond them by `share`."""
        for below, above in zip(self.steps, self.steps[1:], strict=False):
            if below.bytes <= step_bytes <= above.bytes and below.bytes < above.bytes:
                weight = (step_bytes - below.bytes) / (above.bytes - below.bytes)
                return below.ms + weight * (above.ms - below.ms)
        nearest = min(self.steps, key=lambda step: abs(step.bytes - step_bytes))
        return nearest.ms + floor_ms(step_bytes - nearest.bytes, self.gpu) / self.share

    def on(self, gpu: GPU, step_bytes: float) -> Range:
        """The projection of a step of so many bytes on `gpu`."""
        here = self.ms(step_bytes)
        slower = floor_ms(step_bytes, gpu) - floor_ms(step_bytes, self.gpu)
        ends = sorted((here + slower / self.best, here + slower / self.share))
        return Range(*(max(end, floor_ms(step_bytes, gpu)) for end in ends))


@dataclass(frozen=True)
class Decoding:
    """Milliseconds a token: the floor, and the projection where there is a measurement."""

    floor_ms: float
    projected_ms: Range | None


@dataclass(frozen=True)
class Speculation:
    """Speculative decoding with `drafted` tokens a step, of which `accepted` are kept on average.

    step and step_floor_ms are of a whole step. break_even: tokens a step from which on it is faster than plain decoding,
    by the floor and by the projection.
    """

    drafted: int
    accepted: float
    decoding: Decoding
    break_even_floor: float
    break_even: Range | None

    @property
    def tokens_a_step(self) -> float:
        """The accepted tokens and the target's own."""
        return 1 + self.accepted


StepMs = Callable[[int], Decoding]
"""A model's step of so many rows."""


def speculation(target: StepMs, draft: StepMs, drafted: int, accepted: float) -> Speculation:
    """The draft reads two rows and then one at a time; the target verifies drafted + 1 rows in one step."""
    plain, verify = target(1), target(drafted + 1)
    proposing = [draft(2), *[draft(1)] * (drafted - 1)]
    steps = [verify, *proposing]
    floor = sum(step.floor_ms for step in steps)
    ranges = [step.projected_ms for step in steps]
    known = [each for each in ranges if each is not None]
    projected = sum(known, Range(0.0, 0.0)) if len(known) == len(ranges) else None
    break_even = None
    if projected is not None and plain.projected_ms is not None:
        ratios = sorted((projected.low / plain.projected_ms.low, projected.high / plain.projected_ms.high))
        break_even = Range(*ratios)
    share = 1 / (1 + accepted)
    decoding = Decoding(floor * share, None if projected is None else projected * share)
    return Speculation(drafted, accepted, decoding, floor / plain.floor_ms, break_even)


@dataclass(frozen=True)
class FirstToken:
    """What must be computed before the first token, and its floor at the tensor cores' peak."""

    prompt_tokens: int
    vision_flops: float
    prefill_flops: float
    floor_ms: float


def first_token(config: ModelConfig, gpu: GPU, views: int) -> FirstToken:
    """Of one image of so many views (the overview counts) and no other prompt."""
    tokens = image_tokens(config, views)
    seen = views * view_flops(config)
    read = tokens * 2.0 * _body(config.language)
    return FirstToken(tokens, seen, read, (seen + read) / (gpu.tensor_tflops * 1e9))


def image_tokens(config: ModelConfig, views: int) -> int:
    """The most tokens that an image of so many views has, over the grids it can be cut into."""
    side = config.tile_size
    grids = [(width // side, height // side) for width, height in config.candidate_resolutions]
    tiles = max(1, views - 1)
    fitting = [grid for grid in grids if grid[0] * grid[1] == tiles] or [(tiles, 1)]
    return max(config.image_tokens(*grid) for grid in fitting)


def view_flops(config: ModelConfig) -> float:
    """Multiplications and additions of the tower and the projector, for one view."""
    vision, projector = config.vision, config.projector
    patches, width = vision.grid**2, vision.width
    embedding = 2.0 * patches * width * 3 * vision.patch_size**2
    projected, inner = config.view_tokens_side**2, projector.n_embed * projector.mlp_ratio
    merged = projector.input_dim * projector.downsample_ratio**2
    return embedding + _tower_flops(vision, patches) + 2.0 * projected * (merged * inner + inner * projector.n_embed)


def _tower_flops(vision: VisionConfig, patches: int) -> float:
    linear = 2.0 * patches * (4 * vision.width**2 + 2 * vision.width * vision.mlp_width)
    attention = 4.0 * patches**2 * vision.width
    return vision.layers * (linear + attention)


def _body(config: LanguageConfig) -> int:
    """Parameters that every prompt token is multiplied by: no embeddings, no LM head."""
    found = language_parts(config, "fp16", "fp16")
    return sum(part.active for name, part in found.items() if name not in (EMBEDDINGS, HEAD))
