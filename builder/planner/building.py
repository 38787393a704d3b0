"""Memory on the host while `trtvlm build` works: an estimate of each stage, from what the stage keeps or was seen to take."""

from __future__ import annotations

import math

from trtvlm.builder.build import READ_AT_MOST
from trtvlm.builder.planner.parts import PROJECTOR, VISION, parts, total
from trtvlm.builder.seen import MAX_ROWS
from trtvlm.model.config import LanguageConfig, ModelConfig
from trtvlm.plugins.quantized_checkpoint import Kind, linears, plain_tensors

# Python, PyTorch and what a build imports.
PROCESS_BYTES = 1_500_000_000

_FLOAT = 4
# Copies of the largest stacked weight that are alive at once: itself, folded, and what the search for scales makes of it.
_SEARCHED, _ROUNDED = 7, 3
# Measured on graphs of the official sizes (benchmarks/engines-cpu.json), where a graph is checked in float32: the process's peak
# over the vision part's bytes in half, and over the embedding's and the head's in float32.
_VISION_COPIES, _VOCABULARY_COPIES = 9, 4.5


def building(config: ModelConfig, kind: Kind, lm_head: Kind) -> dict[str, int]:
    """Bytes by stage: "quantize", "compile" and "verify", which is nothing where no pages are read to compare.

    `--no-compile` leaves out the second and `--verify-samples 0` the third. The vision part is compiled in a process of its own
    while the language model is, a segment at a time.
    """
    found = parts(config, kind, lm_head)
    whole = total(found.values())
    vision = found[VISION].checkpoint_bytes + found[PROJECTOR].checkpoint_bytes
    language = config.language
    layers = [_layer_bytes(language, kind, layer) for layer in range(language.num_hidden_layers)]
    vocabulary = _FLOAT * language.vocab_size * language.hidden_size
    reading = whole.checkpoint_bytes - vision <= READ_AT_MOST
    return {
        "quantize": PROCESS_BYTES + max(*layers, _ROUNDED * vocabulary),
        "compile": PROCESS_BYTES + _VISION_COPIES * vision + round(_VOCABULARY_COPIES * vocabulary),
        "verify": PROCESS_BYTES + 2 * _FLOAT * whole.parameters if reading else 0,
    }


def _layer_bytes(config: LanguageConfig, kind: Kind, layer: int) -> int:
    """A decoder layer in float32, its largest stacked weight several times, and what INT4 is calibrated on."""
    found = linears(config, layer)
    stacked = [linear.outputs * linear.inputs * (linear.experts or 1) for linear in found]
    plain = sum(math.prod(shape) for _, _, shape in plain_tensors(config, layer).values())
    held = _FLOAT * (sum(stacked) + plain)
    if kind != "int4":
        return held + _ROUNDED * _FLOAT * max(stacked)
    rows = sum(linear.inputs * len(linear.sources) * (linear.experts or 1) for linear in found)
    return held + _SEARCHED * _FLOAT * max(stacked) + _FLOAT * MAX_ROWS * rows
