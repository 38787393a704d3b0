"""Conversation and images -> ModelInputs, and token ids -> text, as the official DeepSeek-VL2 processor does."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from trtvlm.model.config import ModelConfig
from trtvlm.model.conversation import ASSISTANT, DEFAULT_PROMPT, IMAGE, USER, Message, Turn, render, user_turn
from trtvlm.model.errors import UserError
from trtvlm.model.images import MAX_PIXELS, ImageSource, load_image
from trtvlm.model.inputs import IGNORE_ID, BatchInputs, ImageView, ModelInputs, join
from trtvlm.model.tiling import Size, best_resolution, cut_views

__all__ = ["DEFAULT_PROMPT", "BatchInputs", "ImageView", "ModelInputs", "Processor", "load_image"]

# A conversation with more images than this has none of them cut into tiles.
MAX_TILED_IMAGES: Final = 2


@dataclass(frozen=True)
class ProcessorConfig:
    """What processor_config.json says beyond config.json; the defaults are those of the official checkpoints."""

    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    pad_token: str = "<｜▁pad▁｜>"

    @classmethod
    def from_pretrained(cls, folder: str | Path, model: ModelConfig) -> ProcessorConfig:
        """Read `folder`/processor_config.json; without the file, the defaults. UserError: values we do not support."""
        path = Path(folder) / "processor_config.json"
        raw = _read_json(path) if path.exists() else {}
        for key, supported in _required(model).items():
            if raw.get(key, supported) != supported:
                raise UserError(f"{path} has {key} = {_short(raw[key])}, but only {_short(supported)} fits this model.")
        mean, std = (raw.get(key, [0.5, 0.5, 0.5]) for key in ("image_mean", "image_std"))
        for key, value in (("image_mean", mean), ("image_std", std)):
            if not (isinstance(value, list) and len(value) == 3 and all(isinstance(v, int | float) for v in value)):
                raise UserError(f"{path} has {key} = {_short(value)}: three numbers are needed.")
        if min(std) <= 0 or min(mean) < 0 or max(mean) > 1:
            raise UserError(f"{path} needs image_mean within 0 to 1 and image_std above 0.")
        return cls(tuple(map(float, mean)), tuple(map(float, std)), str(raw.get("pad_token", cls.pad_token)))


def _required(model: ModelConfig) -> dict[str, Any]:
    return {
        "candidate_resolutions": [list(size) for size in model.candidate_resolutions],
        "patch_size": model.vision.patch_size,
        "downsample_ratio": model.projector.downsample_ratio,
        "image_token": IMAGE,
        "normalize": True,
        "add_special_token": False,
        "mask_prompt": False,
        "ignore_id": IGNORE_ID,
        "sft_format": "deepseek",
    }


class Processor:
    """Makes prompts. Holds no state between calls: one may serve several threads.

    Public: config, tokenizer, max_pixels (of one image), bos_id, eos_id, pad_id, image_token_id.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        settings: ProcessorConfig | None = None,
        *,
        bos_token: str = "<｜begin▁of▁sentence｜>",
        eos_token: str = "<｜end▁of▁sentence｜>",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.max_pixels = max_pixels
        self._settings = settings or ProcessorConfig()
        self._padding_colour = tuple(int(mean * 255) for mean in self._settings.image_mean)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        _check_size(tokenizer, config.language.vocab_size)
        self.bos_id = _special(tokenizer, bos_token)
        self.eos_id = _special(tokenizer, eos_token)
        self.pad_id = _special(tokenizer, self._settings.pad_token)
        self.image_token_id = _special(tokenizer, IMAGE)
        for role in (USER, ASSISTANT):
            _special(tokenizer, role)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, config: ModelConfig | None = None, max_pixels: int = MAX_PIXELS
    ) -> Processor:
        """Read the tokenizer and processor files of a checkpoint or engine folder.

        config: the model's, where `folder`/config.json is not it.
        UserError: a file is missing, damaged or does not fit.
        """
        config = config or ModelConfig.from_pretrained(folder)
        names_file = Path(folder) / "tokenizer_config.json"
        names = _read_json(names_file) if names_file.exists() else {}
        return cls(
            config,
            _read_tokenizer(Path(folder) / "tokenizer.json"),
            ProcessorConfig.from_pretrained(folder, config),
            max_pixels=max_pixels,
            **{key: _content(names[key]) for key in ("bos_token", "eos_token") if names.get(key)},
        )

    def __call__(
        self,
        conversation: Sequence[Message],
        images: Sequence[ImageSource] | None = None,
        *,
        crop: bool | None = None,
        keep_last_eos: bool = False,
    ) -> ModelInputs:
        """A conversation -> the inputs that ask for its last message.

        conversation: messages {"role": user | assistant | system, "content": text with one `<image>` an image,
        "images": [...]}; the last one is the assistant's, empty or an answer begun.
        images: in the order of their tags; by default the messages' own "images".
        crop: cut images into tiles; by default with at most two images in the conversation, as the official one does.
        keep_last_eos: keep the end-of-sequence token of the last message, as training wants.

        UserError: what `render` and `load_image` refuse, tags and images that do not match in number, a prompt longer
        than the model's context.
        """
        turns = render(conversation)
        if images is None:
            images = [image for message in conversation for image in _as_list(message.get("images") or [])]
        return self._prepare(turns, _as_list(images), crop, keep_last_eos)

    def ask(
        self, images: Sequence[ImageSource] | ImageSource = (), prompt: str | None = None, *, crop: bool | None = None
    ) -> ModelInputs:
        """One question about images (or none).

        prompt: DEFAULT_PROMPT when None; without an `<image>` tag it gets one line with a tag for each image in front.
        """
        images = _as_list(images)
        text = DEFAULT_PROMPT if prompt is None else prompt
        if IMAGE not in text:
            text = f"{IMAGE}\n" * len(images) + text
        return self([{"role": "user", "content": text}, {"role": "assistant", "content": ""}], images, crop=crop)

    def complete(
        self,
        prompt: str,
        images: Sequence[ImageSource] = (),
        *,
        as_user: bool = False,
        crop: bool | None = None,
    ) -> ModelInputs:
        """A bare text to continue, or, with `as_user`, the text as a user's only message (the official `prompt=`)."""
        text = user_turn(prompt.strip()) if as_user else prompt
        return self._prepare([Turn(text, ends=True)], _as_list(images), crop, keep_last_eos=False)

    def batch(self, prompts: Sequence[ModelInputs]) -> BatchInputs:
        """Prompts padded on the left."""
        if not prompts:
            raise UserError("A batch needs at least one prompt.")
        return join(prompts, self.pad_id)

    def decode(self, ids: Sequence[int] | Tensor, skip_special_tokens: bool = True) -> str:
        """Token ids -> text. Bytes that are no UTF-8 become U+FFFD; ids past the tokenizer are left out."""
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        text: str = self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def _prepare(
        self, turns: Sequence[Turn], images: Sequence[ImageSource], crop: bool | None, keep_last_eos: bool
    ) -> ModelInputs:
        tags = sum(turn.text.count(IMAGE) for turn in turns)
        if tags != len(images):
            raise UserError(
                f"The prompt has {tags} {IMAGE} tag{'s' * (tags != 1)} but {len(images)} "
                f"image{'s' * (len(images) != 1)}: give one tag for each image."
            )
        pictures = [
            load_image(image, self.max_pixels, _nameless(image, number, len(images)))
            for number, image in enumerate(images, start=1)
        ]
        tiled = len(pictures) <= MAX_TILED_IMAGES if crop is None else crop
        resolutions = [self._resolution(picture.size, tiled) for picture in pictures]
        counts = tuple(self.config.image_tokens(*self._tiles(resolution)) for resolution in resolutions)
        ids, is_image = self._tokens(turns, counts)
        if not keep_last_eos:
            ids, is_image = ids[:-1], is_image[:-1]
        self._check_context(len(ids), counts)  # before the pixels are made: they are the expensive part

        views = [self._view(picture, size) for picture, size in zip(pictures, resolutions, strict=True)]
        side = self.config.tile_size
        input_ids = torch.tensor(ids, dtype=torch.int64)
        images_seq_mask = torch.tensor(is_image, dtype=torch.bool)
        return ModelInputs(
            input_ids=input_ids,
            target_ids=input_ids.masked_fill(images_seq_mask, IGNORE_ID),
            images_seq_mask=images_seq_mask,
            attention_mask=torch.ones_like(images_seq_mask),
            images_spatial_crop=torch.tensor([view.tiles for view in views] or [(0, 0)], dtype=torch.int64),
            pixels=torch.cat([view.pixels for view in views]) if views else torch.zeros(1, 3, side, side),
            images=tuple(views),
            num_image_tokens=counts,
        )

    def _tokens(self, turns: Sequence[Turn], counts: Sequence[int]) -> tuple[list[int], list[bool]]:
        """Token ids, and which of them stand for images. Each piece of text between images is encoded on its own."""
        ids, is_image = [self.bos_id], [False]

        def add(new: list[int], image: bool) -> None:
            ids.extend(new)
            is_image.extend([image] * len(new))

        left = iter(counts)
        for turn in turns:
            for position, piece in enumerate(turn.text.split(IMAGE)):
                if position:
                    add([self.image_token_id] * next(left), True)
                add(self._encode(piece), False)
            if turn.ends:
                add([self.eos_id], False)
        return ids, is_image

    def _encode(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError("The prompt contains half a surrogate pair: send text that is valid Unicode.") from None
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _check_context(self, length: int, counts: Sequence[int]) -> None:
        limit = self.config.language.max_position_embeddings
        if length <= limit:
            return
        if not counts:
            raise UserError(f"The prompt has {length} tokens, but the model's context is {limit}: shorten it.")
        images = f"{len(counts)} image{'s' * (len(counts) > 1)}: {' + '.join(map(str, counts))}"
        raise UserError(
            f"The prompt has {length} tokens ({images}; text: {length - sum(counts)}), but the model's context is "
            f"{limit}: send fewer or smaller images, or less text."
        )

    def _resolution(self, size: Size, tiled: bool) -> Size:
        side = self.config.tile_size
        return best_resolution(size, self.config.candidate_resolutions) if tiled else (side, side)

    def _tiles(self, resolution: Size) -> tuple[int, int]:
        return resolution[0] // self.config.tile_size, resolution[1] // self.config.tile_size

    def _view(self, picture: Image.Image, resolution: Size) -> ImageView:
        tiles = self._tiles(resolution)
        digest = hashlib.sha256(f"{picture.size} {tiles} ".encode() + picture.tobytes()).hexdigest()
        views = cut_views(picture, resolution, self.config.tile_size, self._padding_colour)
        pixels = torch.from_numpy(views).permute(0, 3, 1, 2).to(torch.float32) / 255
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self._settings.image_mean, self._settings.image_std))
        return ImageView(((pixels - mean) / std).contiguous(), tiles, digest)


def _as_list(images: Sequence[ImageSource] | ImageSource) -> list[ImageSource]:
    if isinstance(images, str | os.PathLike | bytes | bytearray | memoryview | Image.Image):
        return [images]
    return list(images)


def _nameless(image: ImageSource, number: int, total: int) -> str | None:
    """What to call an image that has no path, when there are several."""
    return None if total == 1 or isinstance(image, str | os.PathLike) else f"image {number} of {total}"


def _read_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise UserError(
            f"There is no {path.name} in {path.parent}: a DeepSeek-VL2 checkpoint has one beside its weights."
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises bare Exception
        raise UserError(f"{path} is no tokenizer file ({' '.join(str(error).split())}): download it again.") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): download it again.") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} does not hold a JSON object: download it again.")
    return raw


def _content(token: Any) -> str:
    """A token's text; the file names it as a string or as an object."""
    return str(token["content"] if isinstance(token, dict) else token)


def _check_size(tokenizer: Tokenizer, vocab_size: int) -> None:
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab_size:
        raise UserError(
            f"The tokenizer has ids up to {largest}, but the model's vocab_size is {vocab_size}: "
            "tokenizer and model do not belong together; take the tokenizer.json that the model came with."
        )


def _special(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    if found is None or tokenizer.encode(token, add_special_tokens=False).ids != [found]:
        raise UserError(
            f"The tokenizer has no special token {token}: it does not belong to a DeepSeek-VL2 checkpoint; take the "
            "tokenizer.json that the model came with."
        )
    return int(found)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
