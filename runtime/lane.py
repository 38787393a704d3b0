"""An executor and what it remembers from one prompt to the next: encoded images, and the prompt in its cache."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from torch import Tensor

    from trtvlm.model.inputs import ImageView, ModelInputs
    from trtvlm.runtime.executor import Executor

PREFILL_CHUNK = 256
IMAGES_KEPT = 16


@dataclass(frozen=True)
class Filled:
    """A prompt in the cache: logits [vocab] after it, how many of its tokens were there already, and times in ms."""

    logits: Tensor
    reused: int
    image_ms: float
    prefill_ms: float


class Lane:
    """Puts prompts into one executor's cache, doing again only what the last prompt did not already do.

    A prompt is computed in chunks of PREFILL_CHUNK positions, or as many as the executor asks for with `prefill_chunk`, and
    whole chunks are what the next prompt can reuse. So every chunk is computed by the same call on the same input whether
    or not another turn came before: reuse changes no bit of the answer. That is also why the positions of a decoded answer
    are not reused as part of the next prompt: a decode step rounds differently from a prefill.
    """

    def __init__(self, executor: Executor, images_kept: int = IMAGES_KEPT) -> None:
        self.executor = executor
        self._images: OrderedDict[str, Tensor] = OrderedDict()  # by digest, the least recently used first
        self._images_kept = images_kept
        self._chunks: list[tuple[Hashable, ...]] = []  # what the cache holds from position 0 on

    @property
    def chunk(self) -> int:
        """Positions of a chunk."""
        size: int = getattr(self.executor, "prefill_chunk", PREFILL_CHUNK)
        return size

    def fill(self, inputs: ModelInputs, checkpoint: Callable[[], None] = lambda: None) -> Filled:
        """Make the cache hold exactly this prompt. `checkpoint` is called between pieces of work and may raise."""
        size = self.chunk
        chunks = _chunks(inputs, size)
        kept = 0
        while kept < min(len(chunks) - 1, len(self._chunks)) and chunks[kept] == self._chunks[kept]:
            kept += 1
        del self._chunks[kept:]
        reused = kept * size
        self.executor.rollback(reused)

        started = time.perf_counter()
        images = self._encode(inputs, reused, checkpoint)
        encoded = time.perf_counter()
        embeds = self._embed(inputs, reused, images)
        for chunk, part in zip(chunks[kept:], torch.split(embeds, size), strict=True):
            checkpoint()
            logits = self.executor.prefill(part)
            self._chunks.append(chunk)
        return Filled(logits, reused, 1e3 * (encoded - started), 1e3 * (time.perf_counter() - encoded))

    def _encode(self, inputs: ModelInputs, reused: int, checkpoint: Callable[[], None]) -> list[Tensor]:
        """Each image's tokens; an image that lies within the reused part is not needed, and stays empty."""
        left = int(inputs.images_seq_mask[:reused].sum())
        out = []
        for image, count in zip(inputs.images, inputs.num_image_tokens, strict=True):
            if left >= count:
                out.append(torch.empty(0))
            else:
                checkpoint()
                out.append(self._image(image))
            left -= min(left, count)
        return out

    def _image(self, image: ImageView) -> Tensor:
        if image.digest not in self._images:
            self._images[image.digest] = self.executor.encode_image(image)
        self._images.move_to_end(image.digest)
        found = self._images[image.digest]
        while len(self._images) > self._images_kept:
            self._images.popitem(last=False)
        return found

    def _embed(self, inputs: ModelInputs, start: int, images: list[Tensor]) -> Tensor:
        """Embeddings [T - start, hidden] of the prompt from position `start` on."""
        is_image = inputs.images_seq_mask[start:]
        embeds = self.executor.embed(inputs.input_ids[start:])
        rows = [image for image in images if len(image)]
        if rows:
            # Of an image that the reused part cuts in two, the end is left to do.
            values = torch.cat(rows)[-int(is_image.sum()) :]
            embeds = embeds.masked_scatter(is_image.to(embeds.device).unsqueeze(-1), values.to(embeds.dtype))
        return embeds


def _chunks(inputs: ModelInputs, size: int) -> list[tuple[Hashable, ...]]:
    """What decides the embedding at each position, in chunks: the token id, or the image and the place in it."""
    keys: list[Hashable] = list(inputs.input_ids.tolist())
    places = iter(inputs.images_seq_mask.nonzero().flatten().tolist())
    for image, count in zip(inputs.images, inputs.num_image_tokens, strict=True):
        for row in range(count):
            keys[next(places)] = (image.digest, row)
    return [tuple(keys[i : i + size]) for i in range(0, len(keys), size)]
