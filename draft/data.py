"""What is asked of the target while a draft is trained: drawn pages, or a user's images and prompts."""

from __future__ import annotations

import json
import multiprocessing
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from trtvlm.model.errors import UserError
from trtvlm.model.images import ImageSource
from trtvlm.model.inputs import ModelInputs
from trtvlm.model.pages.batches import PageBatch, PageBatches
from trtvlm.model.pages.curriculum import CURRICULUM, stage_at
from trtvlm.model.pages.samples import load_samples
from trtvlm.model.processor import DEFAULT_PROMPT, Processor

PAGES = "pages"
_IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
# A guess of an answer's tokens, for how many rows fill a batch.
_ANSWER_TOKENS = 80


@dataclass(frozen=True)
class Record:
    """One image and what is asked of it. `guess` is what the target may answer, "" when unknown."""

    name: str
    image: ImageSource
    prompt: str
    guess: str = ""


class Source(Protocol):
    """Where batches come from.

    `keyed` tells that a batch's `texts` name its records, which come again, so that their answers can be remembered.
    """

    keyed: bool
    held_out: list[Record]

    def stage(self, progress: float) -> int:
        """The part of the curriculum at `progress` (0 to 1) of the training."""

    def batches(self, segment: int, stage: int, drawn: int) -> Iterator[PageBatch]:
        """Endless batches of `stage`; the same arguments give the same batches.

        segment: counts the times this is called in a training. drawn: batches used before.
        """


class Pages:
    """Pages drawn by worker processes along the curriculum; held out are bundled samples.

    from_scratch: begin with single lines; a draft that reads already gets whole pages at once.
    """

    keyed = False

    def __init__(
        self, folder: Path, batch_tokens: int, seed: int, workers: int, held_out: int, from_scratch: bool = True
    ) -> None:
        self.folder, self.seed, self.workers, self.from_scratch = folder, seed, workers, from_scratch
        largest = max(stage.batch_tokens for stage in CURRICULUM)
        self.stages = tuple(
            replace(stage, batch_tokens=stage.batch_tokens * batch_tokens // largest) for stage in CURRICULUM
        )
        samples = load_samples("heldout", held_out)
        self.held_out = [
            Record(f"page {number}", page.image, DEFAULT_PROMPT, page.text) for number, page in enumerate(samples)
        ]

    def stage(self, progress: float) -> int:
        """See Source."""
        return stage_at(progress if self.from_scratch else 1.0)

    def batches(self, segment: int, stage: int, drawn: int) -> Iterator[PageBatch]:
        """See Source. Every segment draws new pages: its number is part of the seed."""
        return iter(PageBatches(self.folder, self.seed, segment, self.workers, stage, self.stages))


class Records:
    """A user's records, passed over again and again in a new order; some are held out."""

    keyed = True

    def __init__(
        self, records: Sequence[Record], folder: Path, batch_tokens: int, seed: int, workers: int, held_out: int
    ) -> None:
        order = np.random.default_rng(seed).permutation(len(records))
        # At most a tenth, at least one; of a single record nothing can be spared.
        count = min(held_out, max(1, len(records) // 10))
        self.held_out = [records[i] for i in order[:count]]
        self.records = [records[i] for i in order[count:]] or list(records)
        self.folder, self.batch_tokens, self.seed, self.workers = folder, batch_tokens, seed, workers
        self.shapes = shapes(self.records, folder, workers)

    def stage(self, progress: float) -> int:
        """See Source: there is one stage."""
        return 0

    def batches(self, segment: int, stage: int, drawn: int) -> Iterator[PageBatch]:
        """See Source."""
        plan = _Plan(self.shapes, self.batch_tokens, self.seed, drawn)
        loader: DataLoader[PageBatch] = DataLoader(
            _Prepared(self.records, self.folder),
            batch_size=None,
            sampler=plan,
            num_workers=self.workers,
            multiprocessing_context=_context() if self.workers else None,
        )
        return iter(loader)


def open_source(
    data: str,
    folder: Path,
    batch_tokens: int,
    seed: int,
    workers: int,
    held_out: int,
    prompt: str | None,
    from_scratch: bool = True,
) -> Source:
    """The source `data` names: "pages", a JSONL file or a folder of images.

    folder: the target's, for its tokenizer and configuration. held_out: records kept for measuring, at most.
    from_scratch: the draft has read nothing yet.

    Raises UserError when `data` is none of these, holds nothing, or a record of it cannot be read.
    """
    if data == PAGES:
        return Pages(folder, batch_tokens, seed, workers, held_out, from_scratch)
    return Records(read_records(data, prompt), folder, batch_tokens, seed, workers, held_out)


def read_records(data: str, prompt: str | None = None) -> list[Record]:
    """The records of a JSONL file ({"image", "prompt", "answer"}, image paths relative to the file) or of a folder.

    prompt: what is asked where a record does not say. UserError: nothing there, or a line that is no record.
    """
    path = Path(data).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in _IMAGES)
        if not files:
            raise UserError(f"The folder {path} holds no images ({', '.join(sorted(_IMAGES))}).")
        return [Record(file.name, file, prompt or DEFAULT_PROMPT) for file in files]
    if not path.is_file():
        raise UserError(f"There is no data '{data}': give 'pages', a JSONL file or a folder of images.")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if line.strip():
            records.append(_record(line, number, path, prompt))
    if not records:
        raise UserError(f"{path} has no records: write one JSON object a line, with at least an 'image'.")
    return records


def _record(line: str, number: int, path: Path, prompt: str | None) -> Record:
    try:
        raw = json.loads(line)
    except ValueError as error:
        raise UserError(f"Line {number} of {path} is no JSON object ({error}).") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("image"), str):
        raise UserError(f"Line {number} of {path} needs an 'image': the path of one image file.")
    for key in ("prompt", "answer"):
        if not isinstance(raw.get(key, ""), str):
            raise UserError(f"Line {number} of {path} has a '{key}' that is not a text.")
    image = path.parent / raw["image"]
    return Record(f"line {number}", image, raw.get("prompt") or prompt or DEFAULT_PROMPT, raw.get("answer", ""))


@dataclass(frozen=True)
class Shape:
    """What records of one batch share, and the tokens of a prompt."""

    tiles: tuple[int, int]
    image_start: int
    prompt_tokens: int


def shapes(records: Sequence[Record], folder: Path, workers: int = 0) -> list[Shape]:
    """The shape of every record. Reads every image, so that a bad one is refused now and not hours later."""
    measure = partial(_shape, folder=folder)
    if workers and len(records) > 64:
        with _context().Pool(workers) as pool:
            return pool.map(measure, records, chunksize=16)
    return [measure(record) for record in records]


def prepare(records: Sequence[Record], processor: Processor) -> PageBatch:
    """A batch of records of one shape; its texts are their names. Pixels are float32, as the processor makes them."""
    asked = [_ask(record, processor) for record in records]
    answers = [
        [*processor.tokenizer.encode(record.guess, add_special_tokens=False).ids, processor.eos_id]
        for record in records
    ]
    start = len(asked[0].input_ids)
    room = processor.config.language.max_position_embeddings - start
    answers = [tokens[:room] for tokens in answers]
    lengths = torch.tensor([start + len(tokens) for tokens in answers])
    ids = torch.full((len(records), int(lengths.max())), processor.pad_id, dtype=torch.int64)
    for row, (inputs, tokens) in enumerate(zip(asked, answers, strict=True)):
        ids[row, :start] = inputs.input_ids
        ids[row, start : start + len(tokens)] = torch.tensor(tokens)
    shape = _shape_of(asked[0])
    pixels = torch.stack([inputs.pixels for inputs in asked])
    return PageBatch(pixels, shape.tiles, ids, shape.image_start, start, lengths, [r.name for r in records])


def grouped(shapes: Sequence[Shape], order: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices in `order`, cut into batches of one shape and about `batch_tokens` tokens, in the order they fill."""
    groups: dict[Shape, list[int]] = defaultdict(list)
    batches = []
    for index in order:
        shape = shapes[index]
        groups[shape].append(index)
        if len(groups[shape]) >= max(1, batch_tokens // (shape.prompt_tokens + _ANSWER_TOKENS)):
            batches.append(groups.pop(shape))
    return batches + list(groups.values())


class _Plan:
    """Endless lists of record indices, one list a batch: pass after pass, each in its own order."""

    def __init__(self, shapes: Sequence[Shape], batch_tokens: int, seed: int, skip: int) -> None:
        self.shapes, self.batch_tokens, self.seed, self.skip = shapes, batch_tokens, seed, skip

    def __iter__(self) -> Iterator[list[int]]:
        number, position = 0, 0
        while True:
            rng = np.random.default_rng((self.seed, number))
            batches = grouped(self.shapes, [int(i) for i in rng.permutation(len(self.shapes))], self.batch_tokens)
            for batch in rng.permutation(len(batches)):
                if position >= self.skip:
                    yield batches[batch]
                position += 1
            number += 1


class _Prepared(Dataset[PageBatch]):
    """Batches by their record indices."""

    def __init__(self, records: Sequence[Record], folder: Path) -> None:
        self.records, self.folder = records, folder

    def __getitem__(self, indices: list[int]) -> PageBatch:
        return prepare([self.records[index] for index in indices], processor_of(self.folder))


def _ask(record: Record, processor: Processor) -> ModelInputs:
    try:
        inputs = processor.ask([record.image], record.prompt)
    except UserError as error:
        raise UserError(f"The record {record.name} cannot be used: {error}") from None
    if len(inputs.input_ids) >= processor.config.language.max_position_embeddings:
        raise UserError(f"The record {record.name} leaves no room for an answer: shorten its prompt.")
    return inputs


def _shape(record: Record, folder: Path) -> Shape:
    return _shape_of(_ask(record, processor_of(folder)))


def _shape_of(inputs: ModelInputs) -> Shape:
    return Shape(inputs.images[0].tiles, int(inputs.images_seq_mask.int().argmax()), len(inputs.input_ids))


_processors: dict[Path, Processor] = {}


def processor_of(folder: Path) -> Processor:
    """One processor a process: reading a large tokenizer takes longer than using it."""
    if folder not in _processors:
        _processors[folder] = Processor.from_pretrained(folder)
    return _processors[folder]


def _context() -> multiprocessing.context.BaseContext:
    return multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
