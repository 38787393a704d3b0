"""Random weights of any configuration, each tensor made when it is asked for: checkpoints of sizes that are not at hand.

A tensor is made in blocks of BLOCK values, each with a generator of its own that is seeded by the checkpoint's seed, the
tensor's name and the block's number, so that a part of a tensor costs a part of the time, and what is read does not depend
on the order of reading. Values are quantiles of a normal distribution, picked at random.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trtvlm.model.config import ModelConfig
from trtvlm.model.errors import UserError
from trtvlm.model.vlm import DeepseekVL2

RANDOM = "random_weights.json"
"""Stands in a checkpoint's folder instead of its shards: {"seed": int}."""
BLOCK = 1 << 20
_CHOICES = 1 << 16


class RandomWeights:
    """Reads the bfloat16 tensors of a configuration, which exist nowhere."""

    def __init__(self, config: ModelConfig, seed: int = 0, threads: int | None = None) -> None:
        self.seed = seed
        with torch.device("meta"):
            model = DeepseekVL2(config)
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self.shapes |= _unused(config.vision.width, config.vision.mlp_width)
        self._threads = threads or os.cpu_count() or 1
        self._blocks, self._tensors = (ThreadPoolExecutor(self._threads) for _ in range(2))

    @classmethod
    def open(cls, folder: Path) -> RandomWeights:
        """Those of a folder with config.json and RANDOM. UserError: either is damaged."""
        try:
            seed = json.loads((folder / RANDOM).read_text(encoding="utf-8"))["seed"]
        except (OSError, ValueError, KeyError, TypeError):
            seed = None
        if not isinstance(seed, int) or seed < 0:
            raise UserError(f"{folder / RANDOM} does not say {{'seed': a number}}; make the checkpoint again.")
        return cls(ModelConfig.from_pretrained(folder), seed)

    def get(self, name: str) -> Tensor:
        """The whole tensor. KeyError: the configuration has none of that name."""
        return self._make(name, 0, math.prod(self.shapes[name])).view(self.shapes[name])

    def many(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors in order, some of them made ahead."""
        coming: deque[tuple[str, Future[Tensor]]] = deque()
        for name in names:
            coming.append((name, self._tensors.submit(self.get, name)))
            if len(coming) > self._threads:
                first, future = coming.popleft()
                yield first, future.result()
        for first, future in coming:
            yield first, future.result()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the first dimension, as `get` would give them."""
        width = math.prod(self.shapes[name][1:])
        return self._make(name, start * width, stop * width).view(stop - start, *self.shapes[name][1:])

    def _make(self, name: str, start: int, stop: int) -> Tensor:
        """Values `start` to `stop` of the flat tensor."""
        table = _table(name, self.shapes[name])
        out = np.empty(stop - start, dtype=np.uint16)

        def fill(block: int) -> None:
            first, last = max(start, block * BLOCK), min(stop, (block + 1) * BLOCK)
            picked = _picks(self.seed, name, block)[first - block * BLOCK : last - block * BLOCK]
            out[first - start : last - start] = table[picked]

        blocks = range(start // BLOCK, -(-stop // BLOCK))
        if len(blocks) == 1:
            fill(blocks[0])
        else:
            list(self._blocks.map(fill, blocks))
        return torch.from_numpy(out.view(np.int16)).view(torch.bfloat16)


def _unused(width: int, inner: int) -> dict[str, tuple[int, ...]]:
    """The attention pool that official checkpoints have and nobody runs."""
    linears = {"q": (width, width), "kv": (2 * width, width), "proj": (width, width)}
    linears |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    shapes: dict[str, tuple[int, ...]] = {"latent": (1, 1, width), "norm.weight": (width,), "norm.bias": (width,)}
    for name, (outputs, inputs) in linears.items():
        shapes |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    return {f"vision.attn_pool.{name}": shape for name, shape in shapes.items()}


def _picks(seed: int, name: str, block: int) -> Any:
    """Which choice each value of a block is: uint16 [BLOCK]."""
    entropy = int.from_bytes(hashlib.sha256(f"{seed} {name} {block}".encode()).digest(), "little")
    generator = np.random.Generator(np.random.SFC64(entropy))
    return generator.integers(0, 2**64 - 1, size=BLOCK // 4, dtype=np.uint64, endpoint=True).view(np.uint16)


def _table(name: str, shape: tuple[int, ...]) -> Any:
    """The bits of the bfloat16 values that a tensor is made of, all equally likely.

    Linear layers keep the scale of what they are given, and norms vary it, so that activations and logits have the size
    they have in a trained model.
    """
    if "norm" in name and name.endswith("weight"):
        return _bits(_uniform, 0.5, 1.5)
    if name.endswith("e_score_correction_bias"):
        return _bits(_uniform, -0.1, 0.1)
    if name.endswith("bias"):
        return _bits(_normal, 0.0, 0.02)
    fan_in = math.prod(shape[1:]) if len(shape) != 3 else shape[-1]
    return _bits(_normal, 0.0, 1.0 if len(shape) == 1 or "embed_tokens" in name else fan_in**-0.5)


@functools.lru_cache(maxsize=64)
def _bits(distribution: Callable[[float, float], Tensor], low: float, high: float) -> Any:
    return distribution(low, high).bfloat16().view(torch.int16).numpy().view(np.uint16)


def _shares() -> Tensor:
    return (torch.arange(_CHOICES, dtype=torch.float64) + 0.5) / _CHOICES


def _uniform(low: float, high: float) -> Tensor:
    return low + (high - low) * _shares()


def _normal(mean: float, deviation: float) -> Tensor:
    quantiles: Tensor = torch.special.ndtri(_shares())
    return mean + deviation * quantiles
