"""Memory on the host while `trtvlm build` works: an estimate of each stage, from what the stage keeps."""

from __future__ import annotations

import math

from trtvlm.builder.planner.parts import parts, total
from trtvlm.builder.seen import MAX_ROWS
from trtvlm.model.config import LanguageConfig, ModelConfig
from trtvlm.plugins.quantized_checkpoint import Kind, linears, plain_tensors

# Python, PyTorch and what a build imports.
PROCESS_BYTES = 1_500_000_000

_FLOAT = 4
# Copies of the largest stacked weight that are alive at once: itself, folded, and what the search for scales makes of it.
_SEARCHED, _ROUNDED = 7, 3


def building(config: ModelConfig, kind: Kind, lm_head: Kind) -> dict[str, int]:
    """Bytes by stage: "quantize", "compile" and "verify". The last two hold the whole model in float32.

    `--no-compile` leaves out the second and `--verify-samples 0` the third.
    """
    whole = total(parts(config, kind, lm_head).values())
    language = config.language
    layers = [_layer_bytes(language, kind, layer) for layer in range(language.num_hidden_layers)]
    head = _ROUNDED * _FLOAT * language.vocab_size * language.hidden_size
    return {
        "quantize": PROCESS_BYTES + max(*layers, head),
        "compile": PROCESS_BYTES + whole.checkpoint_bytes + _FLOAT * whole.parameters,
        "verify": PROCESS_BYTES + 2 * _FLOAT * whole.parameters,
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
