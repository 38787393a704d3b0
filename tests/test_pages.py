"""Pages: what is drawn is what the text says, within the limits asked for; the samples; the tokenizer they need."""

from __future__ import annotations

import json
import random
import string
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from tokenizers import Tokenizer

from trtvlm.model.errors import UserError
from trtvlm.model.pages import KINDS, Page, PageSpec, degrade, load_samples, render_page
from trtvlm.model.pages.content import Writer, words
from trtvlm.model.pages.fonts import FAMILIES, FONTS_VARIABLE, face, families, glyphs, lookalikes, missing_characters
from trtvlm.model.pages.samples import DEMO_PAGE, DEMO_TEXT, load_labelled, write_labelled
from trtvlm.model.pages.sheet import Cell, Sheet
from trtvlm.model.pages.typography import TO_ASCII, Typesetter
from trtvlm.scripts.evaluate_reading import evaluate, fold, markdown, score
from trtvlm.scripts.make_real_pages import Word, block_at, rows_of
from trtvlm.scripts.make_tokenizer import LATE_TOKENS, candidate_resolutions, train_tokenizer, write_tokenizer

NANO_TOKENIZER = Path(__file__).parent.parent / "model" / "nano" / "tokenizer"


def _installed(split: str) -> bool:
    try:
        return bool(families(split))  # type: ignore[arg-type]
    except UserError:
        return False


needs_fonts = pytest.mark.skipif(not _installed("train"), reason="no font to draw with")
SMALL = PageSpec(max_lines=4, max_chars=30, max_width=320, max_height=160)


@pytest.fixture(scope="module")
def font() -> str:
    if not _installed("train"):
        pytest.skip("no font to draw with")
    return families("train")[0][0].path


# Drawing


@needs_fonts
@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from([SMALL, PageSpec(), PageSpec(max_lines=1, max_chars=20, max_width=192, max_height=48)]),
)
def test_page_keeps_to_its_spec(seed: int, spec: PageSpec) -> None:
    page = render_page(np.random.default_rng(seed), spec)
    assert page.image.mode in {"L", "RGB"}
    assert max(page.image.size) <= max(spec.max_width, spec.max_height)
    assert page.image.width * page.image.height <= spec.max_width * spec.max_height
    lines = page.text.split("\n")
    assert len(lines) <= spec.max_lines
    for line in lines:
        assert len(line) <= spec.max_chars
        assert line == " ".join(line.split())
        assert line.isascii()
        assert line.isprintable()


@needs_fonts
def test_same_seed_same_page() -> None:
    first, again, other = (render_page(np.random.default_rng([seed, 7]), SMALL) for seed in (1, 1, 2))
    assert first.text == again.text
    assert first.image.tobytes() == again.image.tobytes()
    assert (other.text, other.image.tobytes()) != (first.text, first.image.tobytes())


@needs_fonts
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_writes(kind: str) -> None:
    spec = PageSpec(kinds={kind: 1.0}, degraded=0.0)
    for seed in range(6):
        page = render_page(np.random.default_rng(seed), spec)
        low, high = page.image.convert("L").getextrema()
        assert bool(page.text) == (kind != "blank")
        assert (low < high) == (kind != "blank")


@needs_fonts
def test_minimum_of_lines() -> None:
    spec = PageSpec(min_lines=5, max_lines=6, max_letter=20, kinds={"lines": 1.0})
    counts = [render_page(np.random.default_rng(seed), spec).text.count("\n") + 1 for seed in range(12)]
    assert sum(count >= 5 for count in counts) >= 10  # a page of large pitch may be full earlier


def _sheet(font: str, **rest: object) -> Sheet:
    rng = random.Random(0)
    body = face(font, 20)
    options = {"width": 300, "height": 200, "columns": 30, "rows": 4, "pitch": 1.5} | rest
    return Sheet(rng, Writer(rng), body, bold=body, **options)  # type: ignore[arg-type]


def test_sheet_ink_is_where_its_rows_are(font: str) -> None:
    sheet = _sheet(font)
    spans = [sheet.row([Cell(0, text, sheet.body)]) for text in ("Hxg", "lower", "pqy")]
    ink = np.asarray(sheet.image)
    for top, bottom in spans:
        assert ink[top + sheet.slack : bottom + sheet.slack].any()
    for (_, bottom), (top, _) in pairwise(spans):
        assert not ink[bottom + sheet.slack + 1 : top + sheet.slack - 1].any()
    assert sheet.text == "Hxg\nlower\npqy"


def test_cells_are_joined_by_one_blank(font: str) -> None:
    sheet = _sheet(font)
    sheet.row([Cell(0, "a  b", sheet.body), Cell(90, "", sheet.body), Cell(200, "c", sheet.body)])
    sheet.row([Cell(0, "", sheet.body)])
    assert sheet.lines == ["a b c"]


@given(st.text(st.sampled_from("abc il .W"), max_size=60))
@settings(max_examples=40, deadline=None)
def test_cut_fits_and_is_a_beginning(text: str) -> None:
    if not _installed("train"):
        pytest.skip("no font to draw with")
    sheet = _sheet(families("train")[0][0].path, width=90)
    cut = sheet.cut(text)
    assert sheet.fits(cut)
    assert text.strip().startswith(cut)


def test_width_is_what_the_font_draws(font: str) -> None:
    for text in ("Width of a line", "iiii", "1234.50"):
        assert face(font, 24).width(text) == pytest.approx(face(font, 24).font.getlength(text), rel=0.05, abs=2)


# Fonts


@needs_fonts
def test_held_out_families_are_not_trained_on() -> None:
    names = [family.name for family in FAMILIES]
    assert len(names) == len(set(names))
    trained = {font.path for group in families("train") for font in group}
    if _installed("heldout"):
        assert not trained & {font.path for group in families("heldout") for font in group}


def test_no_fonts_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FONTS_VARIABLE, str(tmp_path))
    families.cache_clear()
    try:
        with pytest.raises(UserError, match=r"apt-get install .*fonts-dejavu.*TRTVLM_FONTS"):
            render_page(np.random.default_rng(0))
    finally:
        families.cache_clear()


def test_glyphs_there_and_absent(font: str) -> None:
    assert not missing_characters(font)
    assert glyphs(font, "A\u4e2d") == {"A"}


@needs_fonts
def test_lookalikes_of_a_plain_sans() -> None:
    paths = [font.path for group in families("train") for font in group]
    sans = next((path for path in paths if Path(path).stem in {"LiberationSans-Regular", "Lato-Regular"}), None)
    if sans is None:
        pytest.skip("neither Liberation Sans nor Lato is installed")
    assert "I" in lookalikes(sans)
    assert "a" not in lookalikes(sans)


# Text


@given(st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_writer_writes_printable_ascii(seed: int) -> None:
    writer = Writer(random.Random(seed), frozenset("Il0O"))
    for make in (writer.anything, writer.sentence, writer.title, writer.number, writer.price, writer.date, writer.code):
        text = make()
        assert text
        assert text.isascii()
        assert text.isprintable()
    assert not set(writer.letters()) & set("Il0O")
    assert not set(writer.characters()) & set("Il0O")


def test_words() -> None:
    assert 8000 < len(words()) == len(set(words())) < 13000
    assert all(word.isalpha() and word.islower() and word.isascii() for word in words())


@given(st.text(st.sampled_from("fil \"'-(ab"), max_size=30))
@settings(max_examples=80, deadline=None)
def test_typesetting_folds_back(text: str) -> None:
    if not _installed("train"):
        pytest.skip("no font to draw with")
    path = families("train")[0][0].path
    assert Typesetter(quotes=True, ligatures=True)(text, path).translate(TO_ASCII) == text
    assert Typesetter()(text, path) == text


# Wear


def _ink(width: int = 160, height: int = 60, at: tuple[int, int, int, int] = (50, 20, 110, 40)) -> Image.Image:
    image = Image.new("L", (width, height))
    draw = ImageDraw.Draw(image)
    for x in range(at[0], at[2], 4):
        draw.line((x, at[1], x, at[3]), fill=255)
    return image


@given(st.integers(0, 2**32), st.booleans())
@settings(max_examples=60, deadline=None)
def test_warp_loses_no_ink(seed: int, tight: bool) -> None:
    ink = _ink(at=(1, 1, 158, 58)) if tight else _ink()
    before, after = np.asarray(ink, float).sum(), np.asarray(degrade.warp(ink, random.Random(seed)), float).sum()
    assert after == pytest.approx(before, rel=0.12)


@given(st.integers(0, 2**32), st.sampled_from(["L", "RGB"]))
@settings(max_examples=60, deadline=None)
def test_wear_keeps_size_and_mode(seed: int, mode: str) -> None:
    rng = random.Random(seed)
    ink = degrade.soften(degrade.ghost(degrade.ruled(_ink(), rng, 12), rng), rng, 16.0)
    assert (ink.size, ink.mode) == ((160, 60), "L")
    page = Image.new(mode, (160, 60), 200 if mode == "L" else (200, 180, 160))
    for wear in (degrade.light, degrade.grain, degrade.compressed):  # each takes (page, rng)
        page = wear(page, rng)
        assert (page.size, page.mode) == ((160, 60), mode)
    specked = degrade.specks(page, rng, 20.0)
    assert specked.size == page.size


@given(st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_two_levels_keep_thin_strokes(seed: int) -> None:
    faint = _ink().point([round(value * 0.35) for value in range(256)])
    out = np.asarray(degrade.two_level(faint, random.Random(seed)))
    assert set(np.unique(out)) == {0, 255}
    assert ((out == 255) == (np.asarray(faint) > 0)).all()


@given(st.integers(0, 2**32), st.booleans())
@settings(max_examples=100, deadline=None)
def test_colors_are_told_apart(seed: int, plain: bool) -> None:
    ink, paper = degrade.colors(random.Random(seed), plain=plain)
    weights = (0.299, 0.587, 0.114)
    assert abs(sum(w * (a - b) for w, a, b in zip(weights, ink, paper, strict=True))) >= 90
    page = degrade.paint(_ink(), ink, paper)
    assert page.mode == ("L" if len(set(ink)) == len(set(paper)) == 1 else "RGB")
    assert page.convert("RGB").getpixel((0, 0)) == paper
    assert page.convert("RGB").getpixel((50, 30)) == ink


# Samples


@pytest.mark.parametrize(
    ("split", "count"), [("calibration", 64), ("heldout", 100), ("heldout_fonts", 60), ("real", 60)]
)
def test_samples(split: str, count: int) -> None:
    pages = load_samples(split)
    assert len(pages) == count
    for page in pages:
        assert page.image.mode == "L"
        assert page.image.width * page.image.height <= 768 * 512
        assert page.text.isascii()
        assert page.text.count("\n") < 10
        assert max(map(len, page.text.split("\n"))) <= 48
    assert [page.text for page in load_samples(split, 3)] == [page.text for page in pages[:3]]


def test_demo_page() -> None:
    with Image.open(DEMO_PAGE) as image:
        assert image.width * image.height <= 768 * 512
    assert "TOTAL $34.35" in DEMO_TEXT.read_text(encoding="utf-8").splitlines()


def test_samples_are_small() -> None:
    assert sum(path.stat().st_size for path in DEMO_PAGE.parent.rglob("*") if path.is_file()) < 4.5e6


def test_unknown_split() -> None:
    with pytest.raises(UserError, match="calibration"):
        load_samples("training")


def test_labelled_round_trip(tmp_path: Path) -> None:
    pages = [Page(_ink(), "a\nb"), Page(Image.effect_noise((80, 60), 40), 'quote "')]
    write_labelled(tmp_path, pages, extra=[{"source": "x"}, {"source": "y"}])
    again = load_labelled(tmp_path)
    assert [page.text for page in again] == [page.text for page in pages]
    assert again[0].image.tobytes() == pages[0].image.tobytes()  # a clean page is kept exactly
    (tmp_path / "labels.jsonl").write_text('{"file": "000.png"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="Line 1"):
        load_labelled(tmp_path)
    with pytest.raises(UserError, match=r"labels\.jsonl"):
        load_labelled(tmp_path / "nowhere")


# Real pages


def _words(text: str, top: float, size: float = 10.0) -> list[Word]:
    words_, x = [], 50.0
    for token in text.split():
        words_.append(Word(token, x, top - size, x + 5 * len(token), top))
        x += 5 * len(token) + 4
    return words_


def test_blocks_are_cut_at_words() -> None:
    long = " ".join(["eleven"] * 12)
    rows = rows_of([*_words("second row", 85), *_words(long, 100), *_words("third", 70)])
    assert [row[0].text for row in rows] == ["eleven", "second", "third"]
    block = block_at(rows, 0, 3)
    assert block is not None
    first = block.text.split("\n")[0]
    assert len(first) <= 48 < len(first) + 7
    assert {word.text for word in block.cut} == {"eleven"}


def test_blocks_that_cannot_be_judged_are_passed_over() -> None:
    plain = _words("base line", 100)
    raised = [*plain, Word("2", 120, 94, 124, 102)]
    assert block_at(rows_of(plain), 0, 1) is not None
    assert block_at(rows_of(raised), 0, 1) is None  # a superscript
    assert block_at(rows_of(_words("naïve", 100)), 0, 1) is None
    assert block_at(rows_of(_words("Intro . . . . . 5", 100)), 0, 1) is None
    assert block_at(rows_of([*plain, *_words("far", 30)]), 0, 2) is None


# Scores


def test_score_counts_edits_over_characters() -> None:
    blank = Image.new("L", (8, 8))
    pages = [Page(blank, "abcd  ef\ngh"), Page(blank, "xy"), Page(blank, "")]
    result = score(pages, ["abcd ef gh", "xz", ""])
    assert result.cer == pytest.approx(1 / 12)
    assert (result.pages, result.characters, result.exact) == (3, 12, 2)
    assert (result.blank_pages, result.blank_read_blank) == (1, 1)
    assert [entry["page"] for entry in result.worst] == [1]


def test_evaluate_and_table() -> None:
    pages = [Page(Image.new("L", (8, 8), index), f"page {index}") for index in range(3)]

    def right(images: list[Image.Image]) -> list[str]:
        return [f"page  {image.getpixel((0, 0))}" for image in images]

    result = evaluate({"right": right, "wrong": lambda images: ["no"] * len(images)}, {"a set": pages})
    assert result["a set"]["right"].cer == 0
    assert result["a set"]["wrong"].cer > 0.9
    rows = markdown(result).splitlines()
    assert len(rows) == 3
    assert len({row.count("|") for row in rows}) == 1


def test_fold() -> None:
    assert fold(" “a”\n\n b–c ﬁn ") == '"a" b-c fin'


# Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(NANO_TOKENIZER / "tokenizer.json"))


@given(st.one_of(st.text(st.sampled_from(string.printable), max_size=80), st.text(max_size=20)))
@settings(max_examples=200, deadline=None)
def test_tokenizer_gives_any_text_back(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(NANO_TOKENIZER / "tokenizer.json"))
    assume(not any(token in text for token in LATE_TOKENS))  # their names are not text
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tokenizer_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == 1024
    names = [tokenizer.id_to_token(index) for index in (0, 1, 2, *range(1016, 1024))]
    assert names == ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", *LATE_TOKENS]
    assert tokenizer.encode("x").ids[0] == 0
    config = json.loads((NANO_TOKENIZER / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert {int(i): entry["content"] for i, entry in config["added_tokens_decoder"].items()} == {
        index: tokenizer.id_to_token(index) for index in (0, 1, 2, *range(1016, 1024))
    }


def test_tokenizer_splits_digits_and_lines(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("the 12\n\nthe", add_special_tokens=False).tokens
    assert tokens[-4:] == ["2", "Ċ", "Ċ", "the"]
    assert not any(sum(char.isdigit() for char in token) > 1 for token in tokenizer.get_vocab())


def test_tokenizer_is_made_again_the_same(tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    for folder in (first, again):
        write_tokenizer(folder, train_tokenizer(3000))
    for path in first.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()
    same = "processor_config.json"
    assert (first / same).read_bytes() == (NANO_TOKENIZER / same).read_bytes()


def test_candidate_resolutions_in_the_official_order() -> None:
    official = "1x1 1x2 2x1 1x3 3x1 1x4 4x1 2x2 1x5 5x1 1x6 6x1 2x3 3x2 1x7 7x1 1x8 8x1 2x4 4x2 1x9 9x1 3x3"
    assert candidate_resolutions(1, 9) == [tuple(map(int, grid.split("x"))) for grid in official.split()]
    grids = candidate_resolutions(1, 24)
    assert len(grids) == len(set(grids))
    assert set(grids) == {(m, n) for m in range(1, 25) for n in range(1, 25) if m * n <= 24}


# Travelling fonts


def test_collected_fonts_draw_the_same(tmp_path: Path, font: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fontTools")
    from trtvlm.scripts import collect_fonts

    chosen = next(file for group in families("train") for file in group if file.path == font)
    monkeypatch.setattr(collect_fonts, "families", lambda split: ((chosen,),) if split == "train" else ())
    manifest = collect_fonts.collect_fonts(tmp_path)
    copy = tmp_path / Path(font).name
    assert manifest[copy.name]["family"] == chosen.family
    assert json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8")) == manifest
    assert copy.stat().st_size < Path(font).stat().st_size
    assert not missing_characters(str(copy))
    for text in ("Waves, 12.50", "“fi” – it’s"):
        assert bytes(face(str(copy), 22).font.getmask(text)) == bytes(face(font, 22).font.getmask(text))
