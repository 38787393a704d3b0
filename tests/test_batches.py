"""Training batches of pages: the very inputs the processor would make of the same pages."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny import tiny_checkpoint
from trtvlm.model.pages.batches import PageBatch, PageBatches, Prompts, to_float
from trtvlm.model.pages.curriculum import CURRICULUM, PROMPTS, Stage, stage_at
from trtvlm.model.pages.page import Page, PageSpec
from trtvlm.model.processor import Processor

SMALL = Stage(1.0, ((PageSpec(max_lines=2, max_chars=8, max_width=120, max_height=60, max_letter=20),
                     1.0),), 100)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("batches"), "mla")


def _first(folder: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> tuple[PageBatch, list[Page]]:
    """The first batch of drawn pages of one mode, and those pages; no fonts are needed for them."""
    from PIL import Image

    drawn: list[Page] = []

    def draw(rng: np.random.Generator, spec: PageSpec) -> Page:
        shape = (int(rng.integers(20, 60)), int(rng.integers(20, 120)), *((3,) if mode == "RGB" else ()))
        page = Page(Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)), f"Nr. {len(drawn)}\nlines")
        drawn.append(page)
        return page

    monkeypatch.setattr("trtvlm.model.pages.batches.render_page", draw)
    return next(iter(PageBatches(folder, seed=3, stages=(SMALL,)))), drawn


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_equal_what_the_processor_makes(folder: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    batch, drawn = _first(folder, monkeypatch, mode)
    processor = Processor.from_pretrained(folder)
    pages = {page.text: page for page in drawn}
    prompt = next(p for p in PROMPTS if Prompts(processor).ids(p, batch.tiles)[0] == batch.prompt_ids[0].tolist())
    assert len(batch.texts) >= 8
    for row, text in enumerate(batch.texts):
        turns = [{"role": "user", "content": f"<image>\n{prompt}"}, {"role": "assistant", "content": text}]
        expected = processor(turns, [pages[text].image], keep_last_eos=True)
        assert batch.input_ids[row, : batch.lengths[row]].tolist() == expected.input_ids.tolist()
        assert torch.equal(to_float(batch.pixels[row]), expected.pixels)
        assert expected.images[0].tiles == batch.tiles
        assert int(expected.images_seq_mask.int().argmax()) == batch.image_start
        labels = batch.labels()[row]
        known = labels[labels >= 0].tolist()
        assert known == expected.input_ids[batch.answer_start :].tolist()
        assert known[-1] == processor.eos_id


def test_seeds_and_epochs_draw_other_pages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _first(folder, monkeypatch, "L")[0]
    assert torch.equal(_first(folder, monkeypatch, "L")[0].pixels, first.pixels)
    other = next(iter(PageBatches(folder, seed=3, epoch=1, stages=(SMALL,))))
    assert not torch.equal(other.pixels, first.pixels)


def test_stages_follow_their_shares() -> None:
    assert sum(stage.share for stage in CURRICULUM) == pytest.approx(1)
    assert [stage_at(progress) for progress in (0.0, 0.9999, 1.0)] == [0, len(CURRICULUM) - 1, len(CURRICULUM) - 1]
    stages = [stage_at(step / 1000) for step in range(1000)]
    assert stages == sorted(stages)
    for index, stage in enumerate(CURRICULUM):
        assert abs(stages.count(index) / 1000 - stage.share) < 0.002
