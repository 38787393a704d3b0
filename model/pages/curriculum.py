"""What a model that learns to read is shown, and when: from one short line to whole pages.

Whole pages from the start teach nothing: the decoder settles on guessing text and never looks. One short line is read
within a thousand steps, and each larger canvas then keeps what was learned.
"""

from dataclasses import dataclass
from typing import Final

from trtvlm.model.pages.page import KINDS, PageSpec

PROMPTS: Final = (
    "Read the text in the image.",
    "Read the text.",
    "Free OCR.",
    "OCR",
    "What does it say?",
    "What is written here?",
    "Transcribe this page.",
    "Extract all the text from the image.",
    "Please read this image aloud.",
    "Return the text line by line.",
)
# How often the first prompt, which is the default one, is used; the others share the rest.
DEFAULT_PROMPT_SHARE: Final = 0.6


@dataclass(frozen=True)
class Stage:
    """A part of the training: `share` of its time, the pages drawn (specification, weight) and tokens in a batch.

    Small batches come first: what the beginning needs is steps.
    """

    share: float
    pages: tuple[tuple[PageSpec, float], ...]
    batch_tokens: int


def _simple(lines: int, chars: int, width: int, height: int, **rest: float) -> PageSpec:
    kinds = {"lines": 0.8, "prose": 0.1, "single": 0.1}
    return PageSpec(max_lines=lines, max_chars=chars, max_width=width, max_height=height, kinds=kinds, **rest)  # type: ignore[arg-type]


_LINE = _simple(1, 22, 192, 48, max_letter=32, degraded=0.3)
_LINES_2 = _simple(2, 30, 288, 96, max_letter=34, degraded=0.4)
_LINES_4 = PageSpec(max_lines=4, max_chars=40, max_width=448, max_height=192, degraded=0.5)
_PAGE_7 = PageSpec(max_lines=7, max_width=576, max_height=320)
_PAGE = PageSpec()
_DENSE = PageSpec(min_lines=5, kinds={**KINDS, "single": 0.0, "blank": 0.0})

CURRICULUM: Final = (
    Stage(0.14, ((_LINE, 1.0),), 40_000),
    Stage(0.12, ((_LINES_2, 0.8), (_LINE, 0.2)), 60_000),
    Stage(0.18, ((_LINES_4, 0.8), (_LINES_2, 0.2)), 100_000),
    Stage(0.20, ((_PAGE_7, 0.7), (_LINES_4, 0.3)), 100_000),
    Stage(0.36, ((_PAGE, 0.55), (_DENSE, 0.3), (_PAGE_7, 0.15)), 100_000),
)


def stage_at(progress: float) -> int:
    """The stage of CURRICULUM at `progress` (0 to 1) of the training."""
    passed = 0.0
    for index, stage in enumerate(CURRICULUM):
        passed += stage.share
        if progress < passed:
            return index
    return len(CURRICULUM) - 1
