"""Samples for calibration and for checking: images with a prompt and, where it is known, the answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trtvlm.model.errors import UserError
from trtvlm.model.images import ImageSource
from trtvlm.model.inputs import ModelInputs
from trtvlm.model.processor import DEFAULT_PROMPT, Processor
from trtvlm.model.vlm import DeepseekVL2

_IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True)
class Sample:
    """An image, what is asked of it and what should be answered ("" when unknown)."""

    image: ImageSource
    prompt: str = DEFAULT_PROMPT
    answer: str = ""


def bundled_samples(split: str, limit: int) -> list[Sample]:
    """The first `limit` of the project's own pages of a split ("calibration", "heldout", "heldout_fonts", "real")."""
    from trtvlm.model.pages.samples import load_samples

    return [Sample(page.image, answer=page.text) for page in load_samples(split, limit)]


def read_samples(source: str | Path, limit: int) -> list[Sample]:
    """The first `limit` samples of a folder (images, each perhaps with its text in a .txt of the same name) or a JSONL file.

    A line of the file is {"image": path, "prompt": text, "answer": text}; only the image is needed, and its path is
    relative to the file. Raises UserError when there is nothing, or a line or an image is not usable.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in _IMAGES)[:limit]
        if not files:
            raise UserError(f"The calibration folder {path} holds no images ({', '.join(sorted(_IMAGES))}).")
        return [Sample(file, answer=_text_beside(file)) for file in files]
    if not path.is_file():
        raise UserError(f"There is no calibration data at {path}: give a folder of images or a JSONL file.")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    samples = [_sample(line, number, path) for number, line in enumerate(lines, 1) if line.strip()][:limit]
    if not samples:
        raise UserError(f"{path} has no samples: write one JSON object a line, with at least an 'image'.")
    return samples


def _text_beside(image: Path) -> str:
    text = image.with_suffix(".txt")
    return text.read_text(encoding="utf-8", errors="replace").strip() if text.is_file() else ""


def _sample(line: str, number: int, path: Path) -> Sample:
    try:
        raw = json.loads(line)
    except ValueError:
        raise UserError(f"Line {number} of {path} is not a JSON object.") from None
    if not isinstance(raw, dict) or not all(isinstance(raw.get(key, ""), str) for key in ("image", "prompt", "answer")):
        raise UserError(f"Line {number} of {path} needs 'image', and 'prompt' and 'answer' if given, as strings.")
    if not raw.get("image"):
        raise UserError(f"Line {number} of {path} has no 'image'.")
    image = path.parent / raw["image"]
    if not image.is_file():
        raise UserError(f"Line {number} of {path} names an image that is not there: {image}.")
    return Sample(image, raw.get("prompt") or DEFAULT_PROMPT, raw.get("answer", ""))


def prepare(samples: list[Sample], processor: Processor) -> list[ModelInputs]:
    """Token ids and pixels of every sample, its answer and the end of sequence included."""
    prepared = []
    for sample in samples:
        content = sample.prompt if "<image>" in sample.prompt else f"<image>\n{sample.prompt}"
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": sample.answer}]
        prepared.append(processor(turns, [sample.image], keep_last_eos=bool(sample.answer)))
    return prepared


@torch.no_grad()
def embeddings(model: DeepseekVL2, inputs: ModelInputs) -> Tensor:
    """What the first decoder layer sees of one sample: [1, T, hidden], where the model is."""
    device = model.image_newline.device
    ids, is_image, pixels = (x.to(device) for x in (inputs.input_ids, inputs.images_seq_mask, inputs.pixels))
    return model.embed(ids[None], is_image[None], inputs.images_spatial_crop[None], pixels[None])
