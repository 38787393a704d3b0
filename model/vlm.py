"""DeepSeek-VL2 (arXiv 2412.10302) whole: tiles -> image tokens -> language model. Module names are the checkpoint's."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trtvlm.model.cache import KVCache
from trtvlm.model.config import ModelConfig
from trtvlm.model.language import LanguageModel
from trtvlm.model.vision import Projector, VisionTower


class DeepseekVL2(nn.Module):
    """Vision tower, projector and language model of one configuration."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionTower(config.vision)
        self.projector = Projector(config.projector)
        self.image_newline = nn.Parameter(torch.zeros(config.projector.n_embed))
        self.view_seperator = nn.Parameter(torch.zeros(config.projector.n_embed))
        self.language = LanguageModel(config.language)

    def encode_views(self, pixels: Tensor) -> Tensor:
        """Pixels [V, 3, S, S] -> projected view features [V, h * h, hidden]."""
        out: Tensor = self.projector(self.vision(pixels))
        return out

    def image_embeds(self, features: Tensor, tiles: tuple[int, int]) -> Tensor:
        """Lay out one image's tokens: features [1 + tw * th, h * h, hidden] -> [image tokens, hidden].

        The first view is the global one; the others are the tw x th grid of tiles, row by row. Each row of a view (for
        the tiles: of the whole assembled grid) ends in `image_newline`; `view_seperator` stands between the two.
        """
        return self.batch_image_embeds(features.unsqueeze(0), tiles)[0]

    def batch_image_embeds(self, features: Tensor, tiles: tuple[int, int]) -> Tensor:
        """`image_embeds` of images cut alike: [B, 1 + tw * th, h * h, hidden] -> [B, image tokens, hidden]."""
        side, (wide, high) = self.config.view_tokens_side, tiles
        batch, hidden = features.shape[0], features.shape[-1]
        newline = self.image_newline.to(features.dtype).expand(batch, 1, 1, hidden)
        overview = features[:, 0].view(batch, side, side, hidden)
        local = features[:, 1:].view(batch, high, wide, side, side, hidden).transpose(2, 3)
        local = local.reshape(batch, high * side, wide * side, hidden)
        rows = [
            torch.cat((grid, newline.expand(-1, grid.shape[1], -1, -1)), dim=2).flatten(1, 2)
            for grid in (overview, local)
        ]
        separator = self.view_seperator.to(features.dtype).expand(batch, 1, hidden)
        if self.config.global_view_pos == "head":
            return torch.cat((rows[0], separator, rows[1]), dim=1)
        return torch.cat((rows[1], separator, rows[0]), dim=1)

    def embed(
        self,
        input_ids: Tensor,
        images_seq_mask: Tensor | None = None,
        images_spatial_crop: Tensor | None = None,
        pixels: Tensor | None = None,
        image_embeds: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Token embeddings with image tokens put in their places: -> [B, T, hidden].

        input_ids int64 [B, T], images_seq_mask bool [B, T]; either pixels [B, V, 3, S, S] with images_spatial_crop
        [B, n, 2] = (tiles across, tiles down), where a 0 ends a sample's images, or the images' embeddings themselves,
        in the order they appear in the batch.
        """
        embeds: Tensor = self.language.model.embed_tokens(input_ids)
        if image_embeds is None:
            image_embeds = self._encode_batch(images_spatial_crop, pixels)
        if not image_embeds:
            return embeds
        assert images_seq_mask is not None
        values = torch.cat([embedding.to(embeds.dtype) for embedding in image_embeds])
        expected = int(images_seq_mask.sum())
        if expected != values.shape[0]:
            raise ValueError(f"{expected} image positions but {values.shape[0]} image tokens")
        return embeds.masked_scatter(images_seq_mask.bool().unsqueeze(-1), values)

    def _encode_batch(self, crops: Tensor | None, pixels: Tensor | None) -> list[Tensor]:
        if crops is None or pixels is None:
            return []
        images = []
        for sample_crops, sample_pixels in zip(crops.tolist(), pixels, strict=True):
            first = 0
            for wide, high in sample_crops:
                if wide == 0 or high == 0:
                    break
                views = sample_pixels[first : first + 1 + wide * high]
                first += views.shape[0]
                images.append(self.image_embeds(self.encode_views(views.to(self.image_newline.dtype)), (wide, high)))
        return images

    @torch.no_grad()
    def generate_greedy(
        self,
        inputs_embeds: Tensor,
        max_new_tokens: int,
        eos_token_id: int | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """The reference loop: prefill, then a token a step -> new ids [B, <= max_new_tokens], the stop token included.

        inputs_embeds [B, T, hidden], left-padded where attention_mask [B, T] is 0. Rows that end early are filled up
        with the stop token.
        """
        batch, length, _ = inputs_embeds.shape
        cache = KVCache(self.config.language, batch, length + max_new_tokens, inputs_embeds.dtype, inputs_embeds.device)
        logits = self.language(inputs_embeds, cache, attention_mask, last_only=True)[:, -1]
        tokens: list[Tensor] = []
        ended = torch.zeros(batch, dtype=torch.bool, device=inputs_embeds.device)
        while True:
            token = logits.argmax(-1)
            if eos_token_id is not None:
                token = token.masked_fill(ended, eos_token_id)
                ended = ended | (token == eos_token_id)
            tokens.append(token)
            if len(tokens) == max_new_tokens or bool(ended.all()):
                return torch.stack(tokens, dim=1)
            if attention_mask is not None:
                attention_mask = torch.cat((attention_mask, attention_mask.new_ones(batch, 1)), dim=1)
            embeds = self.language.model.embed_tokens(token).unsqueeze(1)
            logits = self.language(embeds, cache, attention_mask, last_only=True)[:, -1]

    def forward_train(
        self, input_ids: Tensor, image_start: int, pixels: Tensor, tiles: tuple[int, int], keep_from: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Teacher forcing on a batch of one-image prompts cut alike, none padded on the left.

        input_ids int64 [B, T] whose image tokens start at `image_start` in every row, pixels [B, 1 + tw * th, 3, S, S]
        -> logits [B, T - keep_from, vocab] of positions `keep_from` on (in the autocast dtype) and the routers' mean
        balance loss (1 is even).
        """
        batch, views = pixels.shape[:2]
        features = self.encode_views(pixels.flatten(0, 1)).unflatten(0, (batch, views))
        images = self.batch_image_embeds(features, tiles)
        embeds = self.language.model.embed_tokens(input_ids)
        images = images.to(embeds.dtype)
        end = image_start + images.shape[1]
        embeds = torch.cat((embeds[:, :image_start], images, embeds[:, end:]), dim=1)
        hidden, balance = self.language.forward_train(embeds)
        return self.language.lm_head(hidden[:, keep_from:]), balance
