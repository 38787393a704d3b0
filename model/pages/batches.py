"""Batches of pages for training, drawn by worker processes: every batch has one tile grid and one prompt."""

from __future__ import annotations

import multiprocessing
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from trtvlm.model.pages.curriculum import CURRICULUM, DEFAULT_PROMPT_SHARE, PROMPTS, Stage
from trtvlm.model.pages.page import render_page
from trtvlm.model.processor import Processor
from trtvlm.model.tiling import best_resolution, cut_views

Grid = tuple[int, int]


@dataclass
class PageBatch:
    """Pages of one tile grid under one prompt.

    pixels uint8 [B, 1 + tw * th, 3, S, S], or one channel for grey pages (see `to_float`); input_ids int64
    [B, T]: prompt, answer, end of sequence, then padding; image_start and answer_start are the same in every row;
    lengths int64 [B] count a row's real tokens.
    """

    pixels: Tensor
    tiles: Grid
    input_ids: Tensor
    image_start: int
    answer_start: int
    lengths: Tensor
    texts: list[str]

    @property
    def prompt_ids(self) -> Tensor:
        """The prompt alone, int64 [B, answer_start]."""
        return self.input_ids[:, : self.answer_start]

    def labels(self, ignore: int = -100) -> Tensor:
        """What positions answer_start - 1 on should predict: int64 [B, T - answer_start], `ignore` at padding."""
        answer = self.input_ids[:, self.answer_start :]
        places = torch.arange(self.answer_start, self.input_ids.shape[1], device=answer.device)
        return answer.masked_fill(places >= self.lengths.unsqueeze(1), ignore)

    def to(self, device: torch.device | str) -> PageBatch:
        """The same batch on another device."""
        pixels, ids, lengths = (t.to(device, non_blocking=True) for t in (self.pixels, self.input_ids, self.lengths))
        return PageBatch(pixels, self.tiles, ids, self.image_start, self.answer_start, lengths, self.texts)


def to_float(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Pixels uint8 [..., 1 or 3, S, S] -> -1..1 [..., 3, S, S], as the processor normalises them."""
    scaled = (pixels.to(dtype) / 255 - 0.5) / 0.5
    return scaled.expand(*scaled.shape[:-3], 3, *scaled.shape[-2:])


class Prompts:
    """The token ids around an image, for any tile grid."""

    def __init__(self, processor: Processor) -> None:
        self.processor = processor
        self._parts: dict[str, tuple[list[int], list[int]]] = {}

    def ids(self, prompt: str, grid: Grid) -> tuple[list[int], int]:
        """The prompt's ids with one image cut in `grid`, and where the image's tokens start."""
        if prompt not in self._parts:
            tile = self.processor.config.tile_size
            from PIL import Image

            asked = self.processor.ask([Image.new("RGB", (tile, tile))], prompt)
            start, count = int(asked.images_seq_mask.int().argmax()), int(asked.images_seq_mask.sum())
            ids = asked.input_ids.tolist()
            self._parts[prompt] = ids[:start], ids[start + count :]
        before, after = self._parts[prompt]
        image = [self.processor.image_token_id] * self.processor.config.image_tokens(*grid)
        return before + image + after, len(before)


class _Pages(IterableDataset[PageBatch]):
    """An endless stream of batches; each worker process draws its own."""

    def __init__(
        self, folder: Path, seed: tuple[int, ...], stage: Synchronized[int], stages: tuple[Stage, ...]
    ) -> None:
        self.folder, self.seed, self.stage, self.stages = folder, seed, stage, stages

    def __iter__(self) -> Iterator[PageBatch]:
        torch.set_num_threads(1)
        info = get_worker_info()
        rng = np.random.default_rng([*self.seed, info.id if info else 0])
        processor = Processor.from_pretrained(self.folder)
        prompts = Prompts(processor)
        config = processor.config
        grey = int(0.5 * 255)
        waiting: dict[tuple[Grid, str], list[tuple[np.ndarray[Any, Any], str]]] = defaultdict(list)
        current = -1
        while True:
            if self.stage.value != current:
                current = self.stage.value
                stage = self.stages[current]
                waiting.clear()
                weights = np.array([weight for _, weight in stage.pages])
                weights = weights / weights.sum()
            spec = stage.pages[int(rng.choice(len(weights), p=weights))][0]
            page = render_page(rng, spec)
            # Grey pages stay grey until they are on the model's device: a third of the resizing and copying.
            image = page.image
            resolution = best_resolution(image.size, config.candidate_resolutions)
            views = cut_views(image, resolution, config.tile_size, [grey] * len(image.getbands()))
            grid = (resolution[0] // config.tile_size, resolution[1] // config.tile_size)
            waiting[grid, image.mode].append((views, page.text))
            # A guess of 80 answer tokens a page keeps the batch near its budget.
            wanted = max(8, stage.batch_tokens // (config.image_tokens(*grid) + 80))
            if len(waiting[grid, image.mode]) >= wanted:
                prompt = (
                    PROMPTS[0] if rng.random() < DEFAULT_PROMPT_SHARE else PROMPTS[int(rng.integers(1, len(PROMPTS)))]
                )
                yield _collate(processor, prompts, waiting.pop((grid, image.mode)), grid, prompt)


def _collate(
    processor: Processor, prompts: Prompts, pages: list[tuple[np.ndarray[Any, Any], str]], grid: Grid, prompt: str
) -> PageBatch:
    ids, image_start = prompts.ids(prompt, grid)
    texts = [text for _, text in pages]
    answers = [encoding.ids for encoding in processor.tokenizer.encode_batch(texts, add_special_tokens=False)]
    length = len(ids) + max(len(answer) for answer in answers) + 1
    input_ids = torch.full((len(pages), length), processor.pad_id, dtype=torch.int64)
    lengths = torch.empty(len(pages), dtype=torch.int64)
    for row, answer in enumerate(answers):
        whole = torch.tensor([*ids, *answer, processor.eos_id])
        input_ids[row, : len(whole)] = whole
        lengths[row] = len(whole)
    stacked = torch.from_numpy(np.stack([views for views, _ in pages]))
    pixels = stacked.unsqueeze(2) if stacked.dim() == 4 else stacked.permute(0, 1, 4, 2, 3).contiguous()
    return PageBatch(pixels, grid, input_ids, image_start, len(ids), lengths, texts)


class PageBatches:
    """Draws batches in `workers` processes (0: in this one); `set_stage` moves along the curriculum.

    folder: a checkpoint's, for its tokenizer and configuration. `epoch` makes other pages of the same seed, for a run
    that goes on after a stop.
    """

    def __init__(
        self,
        folder: str | Path,
        seed: int = 0,
        epoch: int = 0,
        workers: int = 0,
        stage: int = 0,
        stages: tuple[Stage, ...] = CURRICULUM,
    ) -> None:
        self.stages = stages
        context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
        self._stage = context.Value("i", stage)
        pages = _Pages(Path(folder), (seed, epoch), self._stage, stages)
        self._loader: DataLoader[PageBatch] = DataLoader(
            pages,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=3 if workers else None,
            multiprocessing_context=context if workers else None,
        )

    @property
    def stage(self) -> int:
        """The stage batches are drawn from now."""
        return int(self._stage.value)

    def set_stage(self, stage: int) -> None:
        """Draw from another stage; a few batches already drawn still come first."""
        self._stage.value = stage

    def __iter__(self) -> Iterator[PageBatch]:
        return iter(self._loader)
