"""A quantized checkpoint of random weights, made tensor by tensor on the device: to measure speed with no checkpoint."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from trtvlm.model.config import LanguageConfig
from trtvlm.plugins.int4_linear.packing import GROUP_SIZE
from trtvlm.plugins.quantized_checkpoint import PREQUANT, SCALES, Kind, QuantizedWeights, layout


class RandomCheckpoint(QuantizedWeights):
    """What `QuantizedReader` is for an engine directory, with values drawn from a seed and each tensor's name.

    Products keep the size of their input (weights of variance 1 / in), norms are near one, and the router's logits
    spread so that tokens go evenly over the experts. Reading a tensor twice gives the same values.
    """

    def __init__(
        self,
        config: LanguageConfig,
        kind: Kind = "int4",
        lm_head: Kind = "int8",
        seed: int = 0,
        device: torch.device | str = "cuda",
    ) -> None:
        self.config, self.kind, self.lm_head = config, kind, lm_head
        self.layout = layout(config, kind, lm_head)
        self._seed, self._device = seed, torch.device(device)

    def get(self, name: str) -> Tensor:
        """One tensor, of the layout's dtype and shape, on the device. KeyError if the layout has no such name."""
        dtype, shape = self.layout[name]
        # The two first halves of an MLP are fed the same tensor, and so have the same scale.
        key = name.replace("mlp.gate.", "mlp.fc.").replace("shared_expert.gate.", "shared_expert.fc.")
        key = key if name.endswith(PREQUANT) else name
        generator = torch.Generator(self._device).manual_seed(self._seed * 2**32 + zlib.crc32(key.encode()))
        if dtype == torch.int8:
            codes = torch.randint(-128, 128, shape, dtype=torch.int8, device=self._device, generator=generator)
            return _centred(codes, f"{name.rpartition('.')[0]}.{SCALES['int4']}" in self.layout)
        if name.endswith(SCALES["int4"]):
            # Codes -7..7 with twice as many zeros have a standard deviation of 4.18.
            spread = 1 / (4.18 * (shape[-1] * GROUP_SIZE) ** 0.5)
            return self._uniform(shape, generator, 0.8 * spread, 1.2 * spread).half().float()
        if name.endswith(SCALES["int8"]):
            spread = 1 / (73.9 * self.config.hidden_size**0.5)
            return self._uniform(shape, generator, 0.8 * spread, 1.2 * spread).half().float()
        if name.endswith(PREQUANT):
            return self._uniform(shape[-1:], generator, 0.8, 1.2).expand(shape).to(dtype)
        if len(shape) == 1:
            bias = name.endswith("correction_bias")
            low, high = (-0.01, 0.01) if bias else (0.9, 1.1)
            return self._uniform(shape, generator, low, high).to(dtype)
        width = 1.0 if name.endswith("embedding.weight") else shape[-1] ** -0.5
        return (torch.randn(shape, device=self._device, generator=generator) * width).to(dtype)

    def _uniform(self, shape: tuple[int, ...], generator: torch.Generator, low: float, high: float) -> Tensor:
        return torch.rand(shape, device=self._device, generator=generator) * (high - low) + low


def _centred(codes: Tensor, packed: bool) -> Tensor:
    """The codes, in place, with zeros for -8 (in both halves of a byte), or -127 for -128: of mean zero.

    A mean would be a vector that every row has in common, and after a few layers all rows would choose the same experts.
    """
    if not packed:
        return codes.clamp_(min=-127)
    codes.bitwise_xor_(((codes & 15) == 8).to(torch.int8) * 8)
    return codes.bitwise_xor_((codes < -112).to(torch.int8) * -128)
