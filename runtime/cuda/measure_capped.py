"""All of an answer at once within a given device memory: whether a pair fits on a smaller card than the one at hand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trtvlm.model.artifacts import EngineDir
from trtvlm.model.vlm import DeepseekVL2
from trtvlm.plugins.quantized_checkpoint import load_vision
from trtvlm.runtime.cuda.device import bytes_in_use
from trtvlm.runtime.cuda.measure import copy_gbps
from trtvlm.runtime.cuda.measure_decode import Bench, measure_speculation
from trtvlm.runtime.cuda.measure_memory import Ledger, check_cap, limit_allocator
from trtvlm.runtime.cuda.measured_model import MeasuredModel
from trtvlm.runtime.cuda.prefill import Prefill
from trtvlm.runtime.cuda.speculation import Speculation
from trtvlm.runtime.cuda.vision import VisionProgram
from trtvlm.runtime.cuda.weights import load_weights
from trtvlm.runtime.executor import MAX_DECODE_WIDTH

if TYPE_CHECKING:
    from collections.abc import Callable

    from trtvlm.model.cache_kind import CacheKind
    from trtvlm.model.config import ModelConfig
    from trtvlm.runtime.cuda.measure_model import Subject

SIDE = 3
VIEWS = 1 + SIDE * SIDE
STEPS = 50
SPARE = 64


@torch.inference_mode()
def measure_capped(
    target: Subject,
    draft: Subject,
    cap: int,
    drafted: int,
    lm_head: str,
    say: Callable[[str], None],
    kv_cache: CacheKind = "fp16",
) -> tuple[dict[str, Any], str, float]:
    """The memory section, the sentence that says it fits, and the bandwidth of a copy, measured afterwards.

    The most that the process holds counts, from loading on, with CUDA's context, kernels and graphs. UserError: more than
    `cap` bytes were needed, with what there was room for.
    """
    before = bytes_in_use()
    torch.zeros(1, device="cuda")  # makes CUDA's context
    ledger = Ledger(before)
    limit_allocator(cap, ledger.parts["CUDA"])
    torch.cuda.reset_peak_memory_stats()
    models, visions = [], []
    for subject, whose in ((target, ""), (draft, " of the draft")):
        say(f"weights of {subject.name}")
        with ledger.part(f"weights{whose}"):
            weights = load_weights(subject.checkpoint(lm_head))
        with ledger.part(f"cache and step buffers{whose}"):
            models.append(MeasuredModel.over(weights, MAX_DECODE_WIDTH, kv_cache=kv_cache))
        with ledger.part(f"vision{whose}"):
            part = vision_part(subject)
            visions.append((part, VisionProgram(part.vision, part.projector, "cuda")))
    for subject, vision in zip((target, draft), visions, strict=True):
        say(f"an image of {VIEWS} views for {subject.name}")
        with ledger.part("kept after an image"):
            read_image(*vision, subject.config())
    for subject, model in zip((target, draft), models, strict=True):
        say(f"a prompt of {model.cache.max_len} tokens for {subject.name}")
        with ledger.part("kept after a prompt"):
            read_prompt(model, model.cache.max_len)
    say(f"speculative steps of {drafted} drafted tokens")
    with ledger.part("graphs and kernels"):
        speculation = Speculation(models[0].program, models[1].program)
        positions = min(model.cache.max_len for model in models)
        found, replay = measure_speculation(speculation, drafted, Bench(positions - SPARE, STEPS))
    sentence = check_cap(ledger, cap)
    entry = ledger.to_dict() | {"cap": cap, "draft": draft.name, "positions": positions, "views": VIEWS, "step": found}
    del replay, speculation, models, visions, model, weights, vision, part
    ledger.device.release()
    torch.cuda.set_per_process_memory_fraction(1.0)
    return entry, sentence, copy_gbps()


def vision_part(subject: Subject) -> DeepseekVL2:
    """Tower, projector and layout vectors in half on the GPU: the engine's, or random ones."""
    if subject.kind == "engine":
        return load_vision(EngineDir(Path(subject.source))).to("cuda", torch.half)
    with torch.device("meta"):
        model = DeepseekVL2(subject.config())
    model.language = nn.Identity()  # type: ignore[assignment]
    model = model.half().to_empty(device="cuda").eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    return model


def read_image(part: DeepseekVL2, views: VisionProgram, config: ModelConfig) -> None:
    """An overview and SIDE x SIDE tiles of noise, as the executor reads an image."""
    size = config.tile_size
    pixels = torch.randn(VIEWS, 3, size, size)
    part.image_embeds(views.encode(pixels), (SIDE, SIDE))


def read_prompt(model: MeasuredModel, length: int) -> None:
    """A prompt of random embeddings from the cache's beginning."""
    hidden = model.weights.config.hidden_size
    model.cache.rollback(0)
    Prefill(model.weights, model.cache).run(torch.randn(length, hidden, dtype=torch.half, device="cuda"))
