"""Bytes of an engine directory on disk, from the configuration alone: weights, graphs and engines."""

from __future__ import annotations

import math
import re

from trtvlm.builder.planner.parts import PROJECTOR, VISION, parts
from trtvlm.builder.stream import nbytes
from trtvlm.model.config import LanguageConfig, ModelConfig
from trtvlm.plugins.quantized_checkpoint import PREQUANT, SCALES, Kind, layer_prefix, layout, linears

# Intermediate code beside an engine's weights: 0.3 to 1.6 MB in segments of the official sizes, 10 MB in the vision part.
_SEGMENT_CODE, _VISION_CODE = 650_000, 10_000_000

# What operators read from rank0.safetensors: no graph has it.
_OPERATORS = re.compile(r"attention\.kv_b_proj\.|mlp\.shared_expert\.|mlp\.e_score_correction_bias")


def file_bytes(config: ModelConfig, kind: Kind, lm_head: Kind) -> dict[str, int]:
    """Bytes: "checkpoint" is rank0.safetensors, "vision" vision.safetensors; all "graphs" (.onnx), all "engines".

    The names in the files' headers are left out. UserError: a layer that INT4's groups do not divide.
    """
    language, found = config.language, parts(config, kind, lm_head)
    vision = found[VISION].checkpoint_bytes + found[PROJECTOR].checkpoint_bytes
    graphs = vision + graph_bytes(language, kind, lm_head)
    # Embedding and head, one before and one after every attention, and one more where there are experts.
    moe = sum(language.is_moe(layer) for layer in range(language.num_hidden_layers))
    segments = 2 + language.num_hidden_layers + moe
    return {
        "checkpoint": sum(nbytes(spec) for spec in layout(language, kind, lm_head).values()),
        "vision": vision,
        "graphs": graphs,
        "engines": graphs + segments * _SEGMENT_CODE + _VISION_CODE,
    }


def graph_bytes(config: LanguageConfig, kind: Kind, lm_head: Kind) -> int:
    """Weights in the language model's graphs: scales in half, AWQ's scale once for every product that is fed it."""
    linear = {
        layer_prefix(layer) + fused.name: fused
        for layer in range(config.num_hidden_layers)
        for fused in linears(config, layer)
    }
    experts = tuple(f"{name}." for name, fused in linear.items() if fused.experts is not None)
    total = 0
    for name, (dtype, shape) in layout(config, kind, lm_head).items():
        if _OPERATORS.search(name) or name.startswith(experts):
            continue
        if name.endswith(tuple(SCALES.values())):
            total += 2 * math.prod(shape)
        elif name.endswith(PREQUANT):
            total += nbytes((dtype, shape)) * len(linear[name.removesuffix(f".{PREQUANT}")].sources)
        else:
            total += nbytes((dtype, shape))
    return total
