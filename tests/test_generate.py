"""The generate command: what goes to stdout and stderr, and what it refuses before doing anything."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from tests.tiny import tiny_checkpoint
from trtvlm.model.errors import UserError
from trtvlm.scripts.cli import cli
from trtvlm.scripts.commands.generate import command

KEYS = {
    *("image", "speculation", "text", "token_ids", "finish_reason", "accepted_per_step", "tokens", "tokens_per_second"),
    *("steps", "drafted", "accepted", "prompt_tokens", "image_tokens", "timings"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, a draft, three images and one file that is none."""
    folder: Path = tmp_path_factory.mktemp("generate")
    tiny_checkpoint(folder / "target", "mla", seed=1)
    tiny_checkpoint(folder / "draft", "mha", seed=2)
    for number, size in enumerate([(60, 40), (40, 60), (70, 70)]):
        Image.effect_noise(size, 80).convert("RGB").save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:200])
    return folder


def run(files: Path, *options: str, images: Sequence[str] = ("0.png",)) -> Result:
    paths = [str(files / image) for image in images]
    options = ("--model", str(files / "target"), "--draft", str(files / "draft"), "--max-new-tokens", "12", *options)
    return CliRunner().invoke(command, [*options, *(["--image", *paths] if paths else [])], catch_exceptions=False)


def records(result: Result) -> list[dict[str, object]]:
    assert result.exit_code == 0
    assert result.stderr == ""
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_json(files: Path) -> None:
    first, second = records(run(files, "--json", images=["0.png", "1.png"]))
    assert set(first) == KEYS
    assert [Path(str(r["image"])).name for r in (first, second)] == ["0.png", "1.png"]
    assert first["tokens"] == len(first["token_ids"]) == 12  # type: ignore[arg-type]
    assert first["finish_reason"] == "length"
    assert first["speculation"] is True
    assert set(first["timings"]) == {"load", "image", "prefill", "decode", "first_token", "total"}  # type: ignore[call-overload]
    assert records(run(files, "--json", images=["1.png"]))[0]["token_ids"] == second["token_ids"]


def test_latents_in_8_bits(files: Path) -> None:
    (spoken,) = records(run(files, "--json", "--kv-cache", "int8"))
    (plain,) = records(run(files, "--json", "--kv-cache", "int8", "--no-speculation"))
    assert spoken["token_ids"] == plain["token_ids"]


def test_a_pair_without_latents_has_no_int8_cache(files: Path) -> None:
    draft = str(files / "draft")
    arguments = ["generate", "--model", draft, "--draft", draft, "--prompt", "x", "--kv-cache", "int8"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert result.stderr == f"Error: --kv-cache int8 is for latent attention, which {draft} has not: leave it out.\n"


def test_without_speculation_the_text_is_the_same(files: Path) -> None:
    (spoken,) = records(run(files, "--json", "--draft-tokens", "3"))
    (plain,) = records(run(files, "--json", "--no-speculation"))
    assert (plain["token_ids"], plain["text"]) == (spoken["token_ids"], spoken["text"])
    assert (plain["speculation"], plain["drafted"], plain["accepted_per_step"]) == (False, 0, 1.0)
    assert int(spoken["drafted"]) > 0  # type: ignore[call-overload]


def test_text_goes_to_stdout_and_the_table_to_stderr(files: Path) -> None:
    (record,) = records(run(files, "--json"))
    result = run(files)
    assert result.stdout == f"{record['text']}\n"
    figures = ("tokens", "tokens a second", "accepted draft tokens a step", "image tokens", "time to first token")
    for name, line in zip(figures, result.stderr.strip().splitlines(), strict=True):
        assert line.strip().startswith(name)
    assert f"image tokens                  {record['image_tokens']}" in result.stderr


def test_several_texts_are_told_apart(files: Path) -> None:
    a, b = (records(run(files, "--json", images=[name]))[0]["text"] for name in ("0.png", "2.png"))
    result = run(files, images=["0.png", "2.png"])
    assert result.stdout == f"==> {files / '0.png'} <==\n{a}\n\n==> {files / '2.png'} <==\n{b}\n"
    assert [line.split()[0] for line in result.stderr.splitlines()[-2:]] == ["0.png", "2.png"]


def test_images_together(files: Path) -> None:
    (record,) = records(run(files, "--json", "--together", images=["0.png", "1.png"]))
    alone = records(run(files, "--json", images=["0.png", "1.png"]))
    assert record["image"] == [str(files / "0.png"), str(files / "1.png")]
    assert record["image_tokens"] == sum(int(r["image_tokens"]) for r in alone)  # type: ignore[call-overload]


def test_a_prompt_and_stop_strings(files: Path) -> None:
    (record,) = records(run(files, "--json", "--prompt", "Say something.", images=[]))
    assert (record["image"], record["image_tokens"]) == (None, 0)
    text = str(record["text"])
    stops = ("--stop", "not in there", text[2:5])
    (stopped,) = records(run(files, "--json", "--prompt", "Say something.", *stops, images=[]))
    assert stopped["text"] == text[: text.index(text[2:5])]
    assert stopped["finish_reason"] == "stop"


def test_a_seed_repeats(files: Path) -> None:
    sampled = ("--json", "--temperature", "1", "--top-p", "0.9", "--seed")
    texts = [records(run(files, *sampled, seed))[0]["text"] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_a_broken_image_stops_it_before_anything_is_read(files: Path) -> None:
    with pytest.raises(UserError, match=r"broken\.png"):
        run(files, images=["0.png", "broken.png"])
    with pytest.raises(UserError, match=r"nowhere\.png"):
        run(files, "--json", images=["nowhere.png"])
    runner = CliRunner()
    arguments = ["--model", str(files / "target"), "--image", str(files / "0.png"), str(files / "broken.png")]
    assert runner.invoke(command, arguments).stdout == ""


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "either --engine DIR or --model"),
        (["--engine", "x", "--model", "y"], "either --engine DIR or --model"),
        (["--engine", "x", "--draft", "y", "--prompt", "z"], "--draft goes with --model"),
        (["--model", "nano"], "at least one --image"),
        (["--model", "nano", "--image", "a.png", "--draft-tokens", "9"], "1<=x<=7"),
    ],
)
def test_usage(arguments: list[str], sentence: str) -> None:
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 2
    assert sentence in result.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--temperature", "-1"], "temperature"),
        (["--top-p", "0"], "top_p"),
        (["--stop", ""], "stop string"),
    ],
)
def test_settings_are_checked_before_the_model_is_loaded(arguments: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=f"(?i){sentence}"):
        CliRunner().invoke(command, ["--model", "no such model", "--prompt", "x", *arguments], catch_exceptions=False)


def test_help_names_what_comes_out() -> None:
    result = CliRunner().invoke(command, ["--help"])
    assert result.exit_code == 0
    for key in KEYS:
        assert key in result.stdout
