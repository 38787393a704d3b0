"""A model's parameters and weights, by part, from its configuration alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from trtvlm.builder.stream import nbytes
from trtvlm.model.config import LanguageConfig, ModelConfig
from trtvlm.model.errors import UserError
from trtvlm.model.vision import Projector, VisionTower
from trtvlm.plugins.int4_linear.packing import GROUP_SIZE
from trtvlm.plugins.quantized_checkpoint import Kind, layout, linears
from trtvlm.plugins.step_bytes import device_bytes

VISION, PROJECTOR, EMBEDDINGS, ATTENTION, DENSE = "vision", "projector", "embeddings", "attention", "dense MLP"
ROUTED, SHARED, ROUTER, NORMS, HEAD = "routed experts", "shared experts", "router", "norms", "LM head"
PARTS = (VISION, PROJECTOR, EMBEDDINGS, ATTENTION, DENSE, ROUTED, SHARED, ROUTER, NORMS, HEAD)
LANGUAGE = PARTS[2:]

_HALF = 2


@dataclass(frozen=True)
class Part:
    """Parameters, those of them that one decoded token is multiplied by, and bytes on disk and on the device."""

    name: str
    parameters: int
    active: int
    checkpoint_bytes: int
    device_bytes: int


def parts(config: ModelConfig, kind: Kind, lm_head: Kind) -> dict[str, Part]:
    """Every part by name, in the order of PARTS; a model without one has zeros there.

    UserError: a layer that INT4's groups do not divide.
    """
    check_groups(config.language, kind, lm_head)
    return _vision_parts(config) | language_parts(config.language, kind, lm_head)


def language_parts(config: LanguageConfig, kind: Kind, lm_head: Kind) -> dict[str, Part]:
    """The parts of the language model, as `layout` stores them."""
    numbers = dict.fromkeys(LANGUAGE, 0)
    for name, (_, shape) in layout(config, "fp16", "fp16").items():
        numbers[part_of(config, name)] += math.prod(shape)
    stored, resident = dict.fromkeys(LANGUAGE, 0), dict.fromkeys(LANGUAGE, 0)
    for name, spec in layout(config, kind, lm_head).items():
        part = part_of(config, name)
        stored[part] += nbytes(spec)
        resident[part] += device_bytes(name, spec)
    chosen = (config.num_experts_per_tok or 0) / (config.n_routed_experts or 1)
    active = numbers | {EMBEDDINGS: 0, ROUTED: round(numbers[ROUTED] * chosen)}
    return {name: Part(name, numbers[name], active[name], stored[name], resident[name]) for name in LANGUAGE}


def part_of(config: LanguageConfig, name: str) -> str:
    """Which part a tensor of the quantized checkpoint belongs to."""
    if name.startswith("transformer.vocab_embedding"):
        return EMBEDDINGS
    if name.startswith("lm_head"):
        return HEAD
    found = re.match(r"transformer\.layers\.(\d+)\.(\w+)\.(\w+)", name)
    if found is None or "layernorm" in found[2]:
        return NORMS
    if found[2] == "attention":
        return ATTENTION
    if found[3] == "shared_expert":
        return SHARED
    if found[3] in ("router", "e_score_correction_bias"):
        return ROUTER
    return ROUTED if config.is_moe(int(found[1])) else DENSE


def check_groups(config: LanguageConfig, kind: Kind, lm_head: Kind) -> None:
    """UserError naming the layer that INT4 cannot store."""
    sizes = []
    if kind == "int4":
        sizes = [
            (f"layer {layer} {linear.name}", linear.outputs, linear.inputs, "--quant int8_wo or none")
            for layer in range(config.num_hidden_layers)
            for linear in linears(config, layer)
        ]
    if lm_head == "int4":
        sizes.append(("lm_head", config.vocab_size, config.hidden_size, "--lm-head int8 or fp16"))
    for name, outputs, inputs, instead in sizes:
        if inputs % GROUP_SIZE or outputs % 2:
            raise UserError(
                f"INT4 needs inputs in groups of {GROUP_SIZE} and an even number of outputs, but {name} is {outputs} x "
                f"{inputs}; use {instead}."
            )


def _vision_parts(config: ModelConfig) -> dict[str, Part]:
    with torch.device("meta"):
        tower: nn.Module = VisionTower(config.vision)
        projector: nn.Module = Projector(config.projector)
    # With the projector: image_newline and view_seperator.
    counts = {VISION: _numel(tower), PROJECTOR: _numel(projector) + 2 * config.projector.n_embed}
    return {name: Part(name, count, 0, _HALF * count, _HALF * count) for name, count in counts.items()}


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def unused_parameters(config: ModelConfig) -> int:
    """The vision tower's attention pool: in the official checkpoints, but never run (timm's AttentionPoolLatent).

    latent, q, kv, proj, norm and an MLP, of the tower's width.
    """
    width, inner = config.vision.width, config.vision.mlp_width
    linear = (width + 1) * width + (width + 1) * 2 * width + (width + 1) * width
    return width + linear + 2 * width + (width + 1) * inner + (inner + 1) * width


def total(found: Iterable[Part]) -> Part:
    """The sum of parts."""
    every = list(found)
    return Part(
        "total",
        sum(part.parameters for part in every),
        sum(part.active for part in every),
        sum(part.checkpoint_bytes for part in every),
        sum(part.device_bytes for part in every),
    )
