"""The vision tower's graph, and the layout of its features into image tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trtvlm.model.artifacts import EngineDir
from trtvlm.model.errors import UserError
from trtvlm.model.vlm import DeepseekVL2
from trtvlm.runtime.tensorrt.segment import Backend, Graph

if TYPE_CHECKING:
    from trtvlm.model.inputs import ImageView


class VisionProgram:
    """Turns one image's tiles into image tokens, with the tower and the projector in vision.engine."""

    def __init__(self, engine: EngineDir, backend: Backend, dtype: torch.dtype) -> None:
        """`dtype`: what the graph takes and makes, the language model's."""
        config = engine.model_config()
        size, side, hidden = config.tile_size, config.view_tokens_side, config.projector.n_embed
        most = 1 + max((w // size) * (h // size) for w, h in config.candidate_resolutions)
        self.pixels = torch.zeros(most, 3, size, size, dtype=dtype, device=backend.device)
        self.features = torch.zeros(most, side * side, hidden, dtype=dtype, device=backend.device)
        graph = Graph("vision", engine.vision, {"pixels": self.pixels}, {"features": self.features})
        (self._segment,) = backend.open([graph])
        self._layout = _layout(engine).to(backend.device)

    def encode(self, image: ImageView) -> Tensor:
        """[image tokens, hidden] of one image; alone, so that its bits do not depend on the images beside it."""
        views = len(image.pixels)
        self.pixels[:views] = image.pixels.to(self.pixels.device, self.pixels.dtype)
        self._segment.run(views)
        return self._layout.image_embeds(self.features[:views], image.tiles)


def _layout(engine: EngineDir) -> DeepseekVL2:
    """The model with nothing in it but the two vectors that are put between features."""
    with torch.device("meta"):
        model = DeepseekVL2(engine.model_config())
    for part in ("vision", "projector", "language"):
        setattr(model, part, nn.Identity())
    try:
        with safe_open(str(engine.vision_weights), framework="pt") as file:
            for name in ("image_newline", "view_seperator"):
                setattr(model, name, nn.Parameter(file.get_tensor(name), requires_grad=False))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{engine.vision_weights} is not whole ({error}): build the engine again.") from None
    return model
