"""The processor equals the official one on its goldens, exactly, and refuses in one sentence what it cannot prepare."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from safetensors.torch import load_file
from tokenizers import Tokenizer

from trtvlm.model.config import ModelConfig
from trtvlm.model.errors import UserError
from trtvlm.model.grounding import parse_grounding
from trtvlm.model.processor import DEFAULT_PROMPT, ModelInputs, Processor
from trtvlm.model.tiling import best_resolution, cut_views, pad_to

OFFICIAL = Path(__file__).parent / "golden" / "official"
VARIANTS = ["tiny-like", "small-like", "base-like"]
INPUTS = ["text", "one_image", "two_images", "three_images", "multi_turn"]
TILING = json.loads((OFFICIAL / "tiling.json").read_text())
CANDIDATES = [tuple(size) for size in TILING["candidate_resolutions"]]
GREY = (127, 127, 127)
PROCESSORS = {variant: Processor.from_pretrained(OFFICIAL / variant / "model") for variant in VARIANTS}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def processor() -> Processor:
    return PROCESSORS["tiny-like"]


def golden(variant: str, name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    folder = OFFICIAL / variant / "golden"
    return json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")


def with_paths(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation, its image names made paths."""
    return [{**m, "images": [OFFICIAL / "images" / name for name in m.get("images", [])]} for m in conversation]


def user(content: str, *images: object) -> list[dict[str, Any]]:
    """A user's question that waits for its answer."""
    return [{"role": "user", "content": content, "images": list(images)}, {"role": "assistant", "content": ""}]


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


def equal(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return got.dtype == expected.dtype and torch.equal(got, expected)


# --- against the official processor


@pytest.mark.parametrize("name", INPUTS)
def test_official_inputs(variant: str, name: str) -> None:
    said, expected = golden(variant, name)
    got = PROCESSORS[variant](with_paths(said["conversation"]))
    for field in ("input_ids", "images_seq_mask", "attention_mask", "images_spatial_crop"):
        assert equal(getattr(got, field), expected[field]), field
    assert list(got.num_image_tokens) == said["num_image_tokens"]
    if "images_u8" in expected:
        assert equal(got.pixels, (expected["images_u8"].float() / 255 - 0.5) / 0.5)
    if "images" in expected:
        assert equal(got.pixels, expected["images"])
    if name == "text":
        assert equal(got.pixels, torch.zeros(1, 3, *got.pixels.shape[2:]))
        assert got.images == ()
    assert PROCESSORS[variant].decode(said["greedy_tokens"], skip_special_tokens=False) == said["greedy_text"]


@pytest.mark.parametrize("index", range(15))
def test_official_cases(variant: str, index: int) -> None:
    cases = json.loads((OFFICIAL / variant / "golden" / "processor_cases.json").read_text())
    case, processor = cases[index], PROCESSORS[variant]
    assert len(cases) == 15
    options = case["kwargs"]

    def run() -> ModelInputs:
        if case["conversation"] is None:
            return processor.complete(options["prompt"], as_user=options.get("apply_sft_format", False))
        # the official system_prompt argument reaches no token, so there is none here
        return processor(with_paths(case["conversation"]), keep_last_eos=not options.get("inference_mode", True))

    if "error" in case:
        refusal(run)
        return
    got = run()
    assert got.input_ids.tolist() == case["input_ids"]
    assert got.target_ids.tolist() == case["target_ids"]
    assert got.images_spatial_crop.tolist() == case["images_spatial_crop"]
    assert list(got.num_image_tokens) == case["num_image_tokens"]


def test_official_batch(variant: str) -> None:
    said, expected = golden(variant, "batch")
    processor = PROCESSORS[variant]
    singles = [processor(with_paths(golden(variant, name)[0]["conversation"])) for name in said["samples"]]
    got = processor.batch(singles)
    for field in ("input_ids", "images_seq_mask", "attention_mask", "images_spatial_crop"):
        assert equal(getattr(got, field), expected[field]), field
    for row, single in enumerate(singles):
        length, views = len(single.input_ids), len(single.pixels)
        assert equal(got.input_ids[row, -length:], single.input_ids)
        assert equal(got.target_ids[row, -length:], single.target_ids)
        assert (got.target_ids[row, :-length] == -100).all()
        assert equal(got.pixels[row, :views], single.pixels)
        assert not got.pixels[row, views:].any()


@pytest.mark.parametrize("row", TILING["rows"], ids=lambda row: f"{row['width']}x{row['height']}")
def test_official_tiling(row: dict[str, Any]) -> None:
    config = ModelConfig.from_pretrained(OFFICIAL / "tiny-like" / "model")
    vision = dataclasses.replace(config.vision, image_size=TILING["image_size"], patch_size=TILING["patch_size"])
    config = dataclasses.replace(config, vision=vision, candidate_resolutions=tuple(CANDIDATES))
    size = (row["width"], row["height"])
    resolution = best_resolution(size, CANDIDATES)
    assert list(resolution) == row["best_resolution"]
    tiles = (resolution[0] // 384, resolution[1] // 384)
    assert tiles == (row["num_width_tiles"], row["num_height_tiles"])
    assert 1 + tiles[0] * tiles[1] == row["num_views"]
    assert config.image_tokens(*tiles) == row["num_image_tokens"]
    rows, columns = np.where(np.asarray(pad_to(Image.new("L", size, 255), (384, 384), (127,))) != 127)
    assert (rows.min(), columns.min()) == (row["global_view_pad_rows_top"], row["global_view_pad_cols_left"])


# --- tiling: invariants

sides = st.one_of(st.integers(1, 40), st.integers(1, 1500))
grids = st.tuples(st.integers(1, 4), st.integers(1, 4))


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@given(width=sides, height=sides, candidates=st.lists(grids, min_size=1, max_size=9))
def test_no_candidate_beats_the_chosen_one(width: int, height: int, candidates: list[tuple[int, int]]) -> None:
    sizes = [(w * 32, h * 32) for w, h in candidates]
    chosen = best_resolution((width, height), sizes)

    def kept(size: tuple[int, int]) -> int:
        scale = min(size[0] / width, size[1] / height)
        return min(int(width * scale) * int(height * scale), width * height)

    def area(size: tuple[int, int]) -> int:
        return size[0] * size[1]

    assert kept(chosen) == max(map(kept, sizes))
    rivals = [size for size in sizes if kept(size) == kept(chosen)]
    assert area(chosen) == min(map(area, rivals))
    assert chosen == next(size for size in rivals if area(size) == area(chosen))


@settings(deadline=None)
@given(width=sides, height=sides, box=st.tuples(st.integers(1, 200), st.integers(1, 200)))
def test_padding_equals_pillows(width: int, height: int, box: tuple[int, int]) -> None:
    got = pad_to(noise(width, height), box, GREY)
    assert got.size == box
    if round(height / width * box[0]) > 0 and round(width / height * box[1]) > 0:
        assert got.tobytes() == ImageOps.pad(noise(width, height), box, Image.Resampling.BICUBIC, color=GREY).tobytes()
    else:  # Pillow loses the image altogether
        white = pad_to(Image.new("RGB", (width, height), "white"), box, GREY)
        assert white.getextrema()[0][1] == 255


@settings(deadline=None, max_examples=40)
@given(width=sides, height=sides, grid=grids)
def test_tiles_join_to_the_canvas(width: int, height: int, grid: tuple[int, int]) -> None:
    across, down = grid
    image, resolution = noise(width, height), (across * 16, down * 16)
    views = cut_views(image, resolution, 16, GREY)
    assert views.shape == (1 + across * down, 16, 16, 3)
    joined = views[1:].reshape(down, across, 16, 16, 3).swapaxes(1, 2).reshape(down * 16, across * 16, 3)
    assert np.array_equal(joined, np.asarray(pad_to(image, resolution, GREY)))
    if grid == (1, 1):
        assert np.array_equal(views[0], views[1])


@given(grid=grids)
def test_image_tokens_are_the_layout_counted(grid: tuple[int, int]) -> None:
    for processor in PROCESSORS.values():
        side = processor.config.view_tokens_side
        global_rows = [["feature"] * side + ["newline"]] * side
        local_rows = [["feature"] * side * grid[0] + ["newline"]] * (side * grid[1])
        layout = [token for row in [*global_rows, ["separator"], *local_rows] for token in row]
        assert processor.config.image_tokens(*grid) == len(layout)


@settings(deadline=None, max_examples=40)
@given(shapes=st.lists(st.tuples(sides, sides), min_size=1, max_size=4), crop=st.sampled_from([None, True, False]))
def test_the_parts_of_a_prompt_agree(shapes: list[tuple[int, int]], crop: bool | None) -> None:
    processor = PROCESSORS["base-like"]
    got = processor.ask([noise(*shape) for shape in shapes], crop=crop)
    mask, tiles = got.images_seq_mask, got.images_spatial_crop.tolist()
    assert int(mask.sum()) == sum(got.num_image_tokens) == sum(processor.config.image_tokens(*t) for t in tiles)
    assert torch.equal(mask, got.input_ids == processor.image_token_id)
    assert torch.equal(mask, got.target_ids == -100)
    assert torch.equal(got.target_ids[~mask], got.input_ids[~mask])
    assert len(got.pixels) == sum(1 + across * down for across, down in tiles)
    assert torch.equal(got.pixels, torch.cat([image.pixels for image in got.images]))
    assert [list(image.tiles) for image in got.images] == tiles
    assert float(got.pixels.min()) >= -1
    assert float(got.pixels.max()) <= 1
    tiled = crop if crop is not None else len(shapes) <= 2
    assert tiled or all(t == [1, 1] for t in tiles)


# --- prompts


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1)])
def test_extreme_images(processor: Processor, size: tuple[int, int]) -> None:
    got = processor.ask([Image.new("RGB", size, "white")])
    padding = (127 / 255 - 0.5) / 0.5
    assert (got.pixels[0] > padding + 0.5).any()  # not all padding: something of the image is left


def test_ask_puts_one_tag_a_line_before_the_prompt(processor: Processor) -> None:
    images = [noise(9, 9), noise(9, 8)]
    got = processor.ask(images, "What?")
    assert equal(got.input_ids, processor(user("<image>\n<image>\nWhat?", *images)).input_ids)
    assert equal(
        processor.ask(images, "A <image> B <image>").input_ids, processor(user("A <image> B <image>"), images).input_ids
    )
    assert equal(
        processor.ask(images[0]).input_ids, processor(user(f"<image>\n{DEFAULT_PROMPT}"), images[:1]).input_ids
    )
    assert not processor.ask([], "Hello").images


def test_a_single_path_is_one_image(processor: Processor) -> None:
    assert len(processor.ask(str(OFFICIAL / "images" / "a.png")).images) == 1


def test_images_given_apart_replace_the_messages_own(processor: Processor) -> None:
    got = processor(user("<image>", "no-such-file.png"), [noise(5, 5)])
    assert equal(got.pixels, processor.ask(noise(5, 5)).pixels)


def test_digests_tell_views_apart(processor: Processor) -> None:
    def digest(image: Image.Image, crop: bool = True) -> str:
        return processor.ask(image, crop=crop).images[0].digest

    wide = noise(200, 90)
    assert digest(wide) == digest(wide.copy())
    assert digest(wide) != digest(noise(200, 90, seed=1))
    assert digest(wide) != digest(wide, crop=False)
    plain = Image.new("RGB", (20, 30))
    assert digest(plain) != digest(plain.transpose(Image.Transpose.ROTATE_90))


def test_decode_leaves_special_tokens_out(processor: Processor) -> None:
    ids = processor.complete("two <|ref|>x<|/ref|>").input_ids
    assert processor.decode(ids) == "two x"
    assert processor.decode([processor.config.language.vocab_size - 1]) == ""  # a padding row of the head


@pytest.mark.parametrize(
    ("conversation", "sentence"),
    [
        ([], "empty"),
        ([{"role": "user", "content": "Hi"}], "end with an assistant message"),
        ([{"role": "tool", "content": "Hi"}, {"role": "assistant", "content": ""}], "unknown role 'tool'"),
        ([{"role": None, "content": "Hi"}, {"role": "assistant", "content": ""}], "unknown role None"),
        ([{"content": "Hi"}], 'must have a "role" and a "content"'),
        ([{"role": "user", "content": [{"type": "text"}]}], "content of type list"),
        ([*user("Hi"), {"role": "system", "content": "x"}, *user("Hi")], "Message 3 of the conversation is a system"),
        ([{"role": "assistant", "content": "see <image>"}], "only user messages may show images"),
        (user("\ud800"), "surrogate"),
    ],
    ids=["empty", "user-last", "role", "role-type", "keys", "content-type", "late-system", "answer-image", "unicode"],
)
def test_refused_conversations(processor: Processor, conversation: list[dict[str, Any]], sentence: str) -> None:
    assert sentence in refusal(lambda: processor(conversation))


def test_tags_and_images_must_match(processor: Processor) -> None:
    assert "2 <image> tags but 1 image:" in refusal(lambda: processor(user("<image><image>"), [noise(4, 4)]))
    assert "1 <image> tag but 0 images:" in refusal(lambda: processor(user("<image>")))
    assert "0 <image> tags but 1 image:" in refusal(lambda: processor(user("Hi", noise(4, 4))))


def test_a_bad_image_among_several_is_numbered(processor: Processor) -> None:
    assert refusal(lambda: processor.ask([noise(4, 4), b"junk"])).startswith("Image 2 of 2 is not an image")


def test_images_beyond_the_context(processor: Processor) -> None:
    language = dataclasses.replace(processor.config.language, max_position_embeddings=150)
    small = Processor(dataclasses.replace(processor.config, language=language), processor.tokenizer)
    large = noise(300, 300)
    needed = processor.ask([large, large], "Hi")
    sentence = refusal(lambda: small.ask([large, large], "Hi"))
    counts = needed.num_image_tokens
    text = len(needed.input_ids) - sum(counts)
    assert f"{len(needed.input_ids)} tokens (2 images: {counts[0]} + {counts[1]}; text: {text})" in sentence
    assert "context is 150" in sentence
    assert "context is 150" in refusal(lambda: small.ask([], "word " * 400))
    assert len(small.ask([large, large], "Hi", crop=False).input_ids) <= 150


def test_the_context_may_be_filled_to_its_last_position(processor: Processor) -> None:
    length = len(processor.ask([], "Hello there").input_ids)

    def limited(limit: int) -> ModelInputs:
        language = dataclasses.replace(processor.config.language, max_position_embeddings=limit)
        return Processor(dataclasses.replace(processor.config, language=language), processor.tokenizer).ask(
            [], "Hello there"
        )

    assert len(limited(length).input_ids) == length
    refusal(lambda: limited(length - 1))


def test_an_empty_batch_is_refused(processor: Processor) -> None:
    assert "at least one" in refusal(lambda: processor.batch([]))


# --- files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint folder without weights, to be spoilt."""
    skip = shutil.ignore_patterns("*.safetensors")
    return Path(shutil.copytree(OFFICIAL / "tiny-like" / "model", tmp_path / "model", ignore=skip))


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_the_processor_and_tokenizer_configs_may_be_absent(folder: Path) -> None:
    (folder / "processor_config.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    conversation = with_paths(golden("tiny-like", "one_image")[0]["conversation"])
    assert equal(Processor.from_pretrained(folder)(conversation).pixels, PROCESSORS["tiny-like"](conversation).pixels)


def test_mean_and_deviation_are_read(folder: Path) -> None:
    edit(folder / "processor_config.json", image_mean=[0.25, 0.5, 0.5], image_std=[0.5, 1.0, 0.5])
    pixels = Processor.from_pretrained(folder).ask(Image.new("RGB", (76, 76), (255, 0, 51))).pixels
    assert pixels[0, :, 3, 3].tolist() == pytest.approx([1.5, -0.5, -0.6])


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer.json", "{", "no tokenizer file"),
        ("tokenizer_config.json", "[]", "JSON object"),
        ("processor_config.json", "{", "JSON"),
        ("config.json", None, "config.json"),
    ],
)
def test_missing_and_damaged_files(folder: Path, name: str, text: str | None, sentence: str) -> None:
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text)
    assert sentence in refusal(lambda: Processor.from_pretrained(folder))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sft_format", "plain"),
        ("image_token", "<img>"),
        ("patch_size", 16),
        ("mask_prompt", True),
        ("candidate_resolutions", [[76, 76]]),
        ("image_mean", [0.5]),
        ("image_std", [0.5, 0.0, 0.5]),
    ],
)
def test_settings_that_do_not_fit_are_refused(folder: Path, key: str, value: object) -> None:
    edit(folder / "processor_config.json", **{key: value})
    assert key in refusal(lambda: Processor.from_pretrained(folder))


@pytest.mark.parametrize("token", ["<image>", "<|User|>", "<|Assistant|>", "<｜▁pad▁｜>", "<｜end▁of▁sentence｜>"])
def test_a_tokenizer_without_a_special_token_is_refused(folder: Path, token: str) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace(token, "<other>"))
    assert f"no special token {token}" in refusal(lambda: Processor.from_pretrained(folder))


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(processor: Processor) -> None:
    tokenizer = Tokenizer.from_str(processor.tokenizer.to_str())
    vocab_size = processor.config.language.vocab_size
    room = vocab_size - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<extra{i}>" for i in range(room)])
    assert Processor(processor.config, tokenizer).image_token_id == processor.image_token_id
    tokenizer.add_tokens(["<one too many>"])
    sentence = refusal(lambda: Processor(processor.config, tokenizer))
    assert f"ids up to {vocab_size}" in sentence
    assert f"vocab_size is {vocab_size}" in sentence


# --- grounding


def test_grounding_in_pixels() -> None:
    answer = (
        "Here: <|ref|>the cat<|/ref|><|det|>[[0, 0, 999, 999], [500, 10, 250, 20]]<|/det|> and "
        "<|ref|> a dog <|/ref|><|det|>[[1,2,3,4]]<|/det|>."
    )
    assert parse_grounding(answer, (1998, 1000)) == [
        ("the cat", [(0, 0, 1998, 1000), (1000, 10, 500, 20)]),
        ("a dog", [(2, 2, 6, 4)]),
    ]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("no boxes here", []),
        ("<|ref|>cut<|/ref|><|det|>[[1, 2, 3", []),
        ("<|ref|>odd<|/ref|><|det|>[[1, 2, 3], [a, b], [5, 6, 7, 8]]<|/det|>", [("odd", [(5, 6, 7, 8)])]),
        ("<|ref|>none<|/ref|><|det|>nothing<|/det|>", [("none", [])]),
        ("<|ref|>far<|/ref|><|det|>[[0, 0, 5000, 999]]<|/det|>", [("far", [(0, 0, 999, 999)])]),
    ],
)
def test_grounding_takes_what_is_a_box(answer: str, expected: list[Any]) -> None:
    assert parse_grounding(answer, (999, 999)) == expected
