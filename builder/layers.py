"""Where a language model's parts come from: a whole model, or a quantized checkpoint, one decoder layer at a time."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from trtvlm.model.config import LanguageConfig
from trtvlm.model.language import DecoderLayer, LanguageModel
from trtvlm.model.norm import RMSNorm
from trtvlm.plugins.quantized_checkpoint import QuantizedWeights, float_layer, packed_layer


class Layers(Protocol):
    """A language model's parts; asking again may make them again."""

    config: LanguageConfig

    def embed_tokens(self) -> nn.Embedding:
        """The token embedding."""

    def layer(self, index: int) -> DecoderLayer:
        """Decoder layer `index`."""

    def norm(self) -> RMSNorm:
        """The final norm."""

    def lm_head(self) -> nn.Module:
        """The LM head."""


class WholeModel:
    """The parts of a model in memory."""

    def __init__(self, language: LanguageModel) -> None:
        self.config, self._language = language.config, language

    def embed_tokens(self) -> nn.Embedding:
        """The token embedding."""
        return self._language.model.embed_tokens

    def layer(self, index: int) -> DecoderLayer:
        """Decoder layer `index`."""
        layer = self._language.model.layers[index]
        assert isinstance(layer, DecoderLayer)
        return layer

    def norm(self) -> RMSNorm:
        """The final norm."""
        return self._language.model.norm

    def lm_head(self) -> nn.Module:
        """The LM head."""
        return self._language.lm_head


class _Stored:
    """Parts of a quantized checkpoint: the last `held` layers asked for are kept."""

    def __init__(
        self,
        weights: QuantizedWeights,
        make: Callable[[QuantizedWeights, int], DecoderLayer],
        dtype: torch.dtype,
        held: int,
    ) -> None:
        self.config, self._weights, self._make, self._dtype, self._held = weights.config, weights, make, dtype, held
        self._layers: dict[int, DecoderLayer] = {}

    def embed_tokens(self) -> nn.Embedding:
        weight = self._weights.get("transformer.vocab_embedding.weight").to(self._dtype)
        embedding: nn.Embedding = nn.Embedding.from_pretrained(weight)
        return embedding

    def layer(self, index: int) -> DecoderLayer:
        if index not in self._layers:
            while len(self._layers) >= self._held:
                del self._layers[min(self._layers)]
            self._layers[index] = self._make(self._weights, index)
        return self._layers[index]

    def norm(self) -> RMSNorm:
        with torch.device("meta"):
            norm = RMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
        weight = self._weights.get("transformer.ln_f.weight").to(self._dtype)
        norm.weight = nn.Parameter(weight, requires_grad=False)
        return norm


class PackedLayers(_Stored):
    """As `load_quantized_packed`: float16, and weights as they are stored. A segment needs two layers at most."""

    def __init__(self, weights: QuantizedWeights) -> None:
        super().__init__(weights, packed_layer, torch.float16, held=2)

    def lm_head(self) -> nn.Module:
        """The LM head as it is stored."""
        return self._weights.module("lm_head")


class FloatLayers(_Stored):
    """As `load_quantized`: float32, every weight dequantized."""

    def __init__(self, weights: QuantizedWeights) -> None:
        super().__init__(weights, float_layer, torch.float32, held=1)

    def lm_head(self) -> nn.Module:
        """The LM head in float32."""
        weight: Tensor = self._weights.float_weight("lm_head")
        with torch.device("meta"):
            head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        head.weight = nn.Parameter(weight, requires_grad=False)
        return head
