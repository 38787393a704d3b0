"""What the processor hands to the model: one prompt, or a batch of them padded on the left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE_ID = -100  # target id of tokens that carry no loss


@dataclass(frozen=True, eq=False)
class ImageView:
    """One image of a prompt.

    pixels: float32 [1 + tw*th, 3, S, S], the global view, then the tiles row by row.
    tiles: (tw, th), tiles across and down.
    digest: sha256 of the RGB pixels, their size and `tiles`: under one model, equal digests mean equal `pixels`.
    """

    pixels: Tensor
    tiles: tuple[int, int]
    digest: str


@dataclass(frozen=True, eq=False)
class ModelInputs:
    """One prompt of T tokens with n images of V views in all.

    input_ids: int64 [T]; every image token, newlines and separators included, has the `<image>` id.
    target_ids: int64 [T]; input_ids with IGNORE_ID at the image tokens.
    images_seq_mask: bool [T], true at the image tokens.
    attention_mask: bool [T], all true.
    images_spatial_crop: int64 [n, 2], tiles (across, down); [[0, 0]] without images.
    pixels: float32 [V, 3, S, S], the images' views one after the other; one zero view without images.
    images: the same, image by image.
    num_image_tokens: tokens of each image.
    """

    input_ids: Tensor
    target_ids: Tensor
    images_seq_mask: Tensor
    attention_mask: Tensor
    images_spatial_crop: Tensor
    pixels: Tensor
    images: tuple[ImageView, ...]
    num_image_tokens: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class BatchInputs:
    """B prompts, padded on the left to T tokens; views and crops padded at the end with zeros to V and n.

    input_ids, target_ids: int64 [B, T]. images_seq_mask, attention_mask: bool [B, T], false at padding.
    images_spatial_crop: int64 [B, n, 2]. pixels: float32 [B, V, 3, S, S].
    """

    input_ids: Tensor
    target_ids: Tensor
    images_seq_mask: Tensor
    attention_mask: Tensor
    images_spatial_crop: Tensor
    pixels: Tensor
    images: tuple[tuple[ImageView, ...], ...]


def join(prompts: Sequence[ModelInputs], pad_id: int) -> BatchInputs:
    """Pad prompts to a batch. At least one prompt."""
    return BatchInputs(
        input_ids=_pad_left([p.input_ids for p in prompts], pad_id),
        target_ids=_pad_left([p.target_ids for p in prompts], IGNORE_ID),
        images_seq_mask=_pad_left([p.images_seq_mask for p in prompts], False),
        attention_mask=_pad_left([p.attention_mask for p in prompts], False),
        images_spatial_crop=_pad_right([p.images_spatial_crop for p in prompts]),
        pixels=_pad_right([p.pixels for p in prompts]),
        images=tuple(p.images for p in prompts),
    )


def _pad_left(rows: Sequence[Tensor], value: int | bool) -> Tensor:
    # rows: [t] each -> [B, max t]
    out = torch.full((len(rows), max(len(row) for row in rows)), value, dtype=rows[0].dtype)
    for into, row in zip(out, rows, strict=True):
        into[len(into) - len(row) :] = row
    return out


def _pad_right(rows: Sequence[Tensor]) -> Tensor:
    # rows: [k, ...] each -> [B, max k, ...]
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
