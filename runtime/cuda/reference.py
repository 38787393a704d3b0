"""The language model in float32 over the very same quantized weights: what the kernels are compared with."""

from __future__ import annotations

import torch

from trtvlm.model.language import LanguageModel
from trtvlm.plugins.quantized_checkpoint import QuantizedWeights, fill_language


def reference_model(checkpoint: QuantizedWeights, device: torch.device | str = "cuda") -> LanguageModel:
    """A LanguageModel in float32 with the checkpoint's weights dequantized, on the device."""
    with torch.device("meta"):
        model = LanguageModel(checkpoint.config)
    model = model.to_empty(device=device)
    fill_language(checkpoint, model)
    return model.eval().requires_grad_(False)
