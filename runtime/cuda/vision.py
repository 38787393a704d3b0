"""The vision tower and projector on a GPU in half: fused attention, an image's views together, few of them in a CUDA graph."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from trtvlm.model.vision import Projector, VisionTower

GRAPHED_VIEWS = 4
"""Up to so many views, launching takes longer than the work, and a graph pays; a graph's activations stay allocated."""

# The attention of a tower has no mask and heads of any width: one of these takes it, and the unfused one is never wanted.
_FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


class VisionProgram:
    """Encodes the views of one image at a time, so that nothing depends on the images beside it. One caller at a time."""

    def __init__(
        self, tower: VisionTower, projector: Projector, device: torch.device | str, graphed_views: int = GRAPHED_VIEWS
    ) -> None:
        self.device, self.graphed_views = torch.device(device), graphed_views
        self._model = nn.Sequential(tower, projector).to(self.device, torch.half).eval()
        # With channels last, the patches come out position by position, as everything after them reads them.
        tower.patch_embed.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self._pool: Any = None

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [V, 3, S, S] on any device -> projected features half [V, h * h, hidden], of their own memory."""
        pixels = pixels.to(self.device, torch.half)
        if self.device.type != "cuda" or len(pixels) > self.graphed_views:
            return self._run(pixels)
        graph, inputs, outputs = self._graph(pixels)
        inputs.copy_(pixels)
        graph.replay()
        return outputs.clone()

    def _run(self, pixels: Tensor) -> Tensor:
        with sdpa_kernel(_FUSED) if self.device.type == "cuda" else nullcontext():
            out: Tensor = self._model(pixels)
        return out

    def _graph(self, pixels: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        views = len(pixels)
        if views not in self._graphs:
            inputs = pixels.clone()
            self._run(inputs)  # libraries choose and load their kernels before anything is captured
            torch.cuda.synchronize()
            # All graphs share their memory: what one leaves there is copied out before another runs.
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                outputs = self._run(inputs)
            self._graphs[views] = graph, inputs, outputs
        return self._graphs[views]
