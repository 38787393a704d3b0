"""Distillation of tiny random models on the CPU: what it learns from, that it learns, resumes, refuses and packages."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import nn

from tests.tiny import tiny_checkpoint, tiny_config, tiny_model
from trtvlm.draft.answers import AnswerSettings, RememberedAnswers, answer, decode, with_answers
from trtvlm.draft.data import Record, grouped, open_source, prepare, processor_of, read_records, shapes
from trtvlm.draft.distil import Student, feature_error, forced, forward_kl
from trtvlm.draft.measure import counted, measure
from trtvlm.draft.shrink import scratch_draft, shrunk_config
from trtvlm.draft.train import Training, TrainSettings, learning_rate, train
from trtvlm.model.checkpoint import load_model
from trtvlm.model.config import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from trtvlm.model.errors import UserError
from trtvlm.model.pages.batches import PageBatch
from trtvlm.model.pair import check_pair
from trtvlm.model.processor import Processor
from trtvlm.scripts.commands.draft_train import command

SMALL = TrainSettings(
    steps=12,
    batch_tokens=600,
    max_answer_tokens=8,
    pool=2,
    held_out=3,
    log_every=2,
    save_every=4,
    device="cpu",
    workers=0,
)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "target", "mla")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of seven images of three shapes, and a JSONL file that names them."""
    folder = tmp_path_factory.mktemp("images")
    lines = []
    for number in range(7):
        image = Image.new("RGB", [(64, 32), (32, 32), (40, 90)][number % 3], "white")
        ImageDraw.Draw(image).text((2, 2), f"{number}!", fill="black")
        image.save(folder / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "prompt": "Read.", "answer": "no" * number}))
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def batch(target: Path) -> PageBatch:
    """Three prompts of one shape."""
    pictures = [Image.effect_noise((64, 32), 40 + 30 * n).convert("RGB") for n in range(3)]
    records = [Record(f"r{n}", picture, "Read.", "guess") for n, picture in enumerate(pictures)]
    return prepare(records, processor_of(target))


def test_pages_to_a_checkpoint(target: Path, tmp_path: Path) -> None:
    """The command as a person types it: the loss falls and the output is a checkpoint that loads and reads."""
    output = tmp_path / "draft"
    arguments = ["--target", str(target), "--output", str(output), "--steps", "24", "--batch-tokens", "600"]
    arguments += [
        "--max-answer-tokens",
        "8",
        "--held-out",
        "3",
        "--log-every",
        "4",
        "--device",
        "cpu",
        "--workers",
        "0",
    ]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "tokens a target step with K=4" in result.output
    log = [json.loads(line) for line in (output / "training_log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [4, 8, 12, 16, 20, 24, 24]
    assert log[-2]["loss"] < 0.8 * log[0]["loss"]
    assert log[-2]["features"] < 0.8 * log[0]["features"]
    assert 1 <= log[-1]["tokens_per_step"] <= 5
    assert len(log[-1]["by_position"]) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["draft"]
    model = load_model(output)
    assert {tensor.dtype for tensor in load_file(output / "model.safetensors").values()} == {torch.float16}
    assert not model.config.language.use_mla
    inputs = Processor.from_pretrained(output).ask([Image.new("RGB", (64, 32), "white")])
    tensors = (inputs.input_ids, inputs.images_seq_mask, inputs.images_spatial_crop, inputs.pixels)
    embeds = model.embed(*(tensor[None] for tensor in tensors))
    assert model.generate_greedy(embeds, 4).shape == (1, 4)


class StoppedError(Exception):
    """Stands for whatever ends a run early."""


@pytest.mark.parametrize("data", ["pages", "records.jsonl"])
def test_a_stopped_run_ends_as_if_nothing_had_happened(target: Path, images: Path, tmp_path: Path, data: str) -> None:
    where = data if data == "pages" else str(images / data)
    train(str(target), "scratch", where, tmp_path / "whole", SMALL)

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 10:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(str(target), "scratch", where, tmp_path / "stopped", SMALL, report=stop)
    assert not (tmp_path / "stopped").exists()
    assert [path.name for path in (tmp_path / "stopped.state").iterdir()] == ["step-00000008"]
    train(str(target), "scratch", where, tmp_path / "stopped", SMALL, resume=True)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    losses = [
        [json.loads(line).get("loss") for line in (tmp_path / name / "training_log.jsonl").read_text().splitlines()]
        for name in ("whole", "stopped")
    ]
    assert losses[0] == losses[1]
    assert not (tmp_path / "stopped.state").exists()


def test_a_killed_run_leaves_a_state_and_no_output(target: Path, images: Path, tmp_path: Path) -> None:
    arguments = ["--target", target, "--data", images, "--output", tmp_path / "draft", "--steps", "100000"]
    arguments += ["--batch-tokens", "600", "--max-answer-tokens", "4", "--save-every", "2", "--device", "cpu"]
    program = "from trtvlm.scripts.commands.draft_train import command; command()"
    process = subprocess.Popen([sys.executable, "-c", program, *map(str, arguments), "--workers", "0"])
    state = tmp_path / "draft.state"
    deadline = time.monotonic() + 60
    while not list(state.glob("step-*/progress.json")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["draft.state"]
    short = replace(SMALL, steps=100000, max_answer_tokens=4, pool=8, held_out=64)
    with pytest.raises(UserError, match="go on with --resume"):
        train(str(target), "scratch", str(images), tmp_path / "draft", short)
    with pytest.raises(UserError, match="started with seed = 0, not 1"):
        train(str(target), "scratch", str(images), tmp_path / "draft", replace(short, seed=1), resume=True)

    def stop(row: dict[str, Any]) -> None:
        raise StoppedError

    with pytest.raises(StoppedError):  # it does go on
        train(str(target), "scratch", str(images), tmp_path / "draft", short, resume=True, report=stop)


def test_a_trained_draft_is_trained_further(target: Path, images: Path, tmp_path: Path) -> None:
    """The target as its own draft is already perfect: nothing to learn, everything accepted."""
    rows: list[dict[str, Any]] = []
    settings = replace(SMALL, steps=2, lr=1e-9, replay=1)
    result = train(str(target), str(target), str(images), tmp_path / "draft", settings, report=rows.append)
    assert rows[0]["loss"] < 1e-5
    assert rows[0]["agreement"] == result["agreement"] == 1.0
    assert set(result["by_position"]) == {1.0}


def test_minutes_end_a_run(target: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Training, "_elapsed", lambda self: 10.0 * self.step)  # a clock of ten seconds a step
    result = train(str(target), "scratch", str(images), tmp_path / "d", replace(SMALL, steps=None, minutes=0.5))
    assert result["step"] == 3


# What is learned from


def test_a_true_guess_costs_one_pass_and_changes_nothing(target: Path, batch: PageBatch) -> None:
    model = load_model(target)
    own = AnswerSettings(max_tokens=6)
    greedy = decode(model, batch, own)
    tried = answer(model, with_answers(batch, greedy), replace(own, enough=1.0))
    assert bool(tried.known.all(1).any())
    assert _said(tried) == greedy


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 5), st.integers(2, 500))
def test_a_wrong_guess_is_known_up_to_its_first_difference(place: int, token: int) -> None:
    model, batch = tiny_model("mla"), _plain_batch()
    own = AnswerSettings(max_tokens=6)
    greedy = decode(model, batch, own)
    guess = [list(row) for row in greedy]
    guess[0][place] = token
    tried = answer(model, with_answers(batch, guess), replace(own, enough=0.0))
    same = token == greedy[0][place]
    assert tried.known[0].tolist() == [True] * (6 if same else place + 1) + [False] * (0 if same else 5 - place)
    assert bool(tried.known[1:].all())
    decoded = answer(model, with_answers(batch, guess), replace(own, enough=1.0))
    assert bool(decoded.known.all())
    assert _said(decoded) == greedy


def test_sampled_answers_are_taken_as_they_are(batch: PageBatch) -> None:
    torch.manual_seed(0)
    model = tiny_model("mla")
    sampled = answer(model, batch, AnswerSettings(temperature=5.0, max_tokens=6))
    lengths = sampled.batch.lengths - sampled.batch.answer_start
    assert sampled.known.sum(1).tolist() == lengths.tolist()
    assert _said(sampled) != decode(model, batch, AnswerSettings(max_tokens=6))


def test_answers_are_remembered_by_name(batch: PageBatch) -> None:
    model, memory = tiny_model("mla"), RememberedAnswers()
    first = answer(model, batch, AnswerSettings(max_tokens=6))
    memory.keep(first)
    assert memory.answers == dict(zip(batch.texts, _said(first), strict=True))
    again = memory.recall(batch)
    assert torch.equal(again.input_ids, first.batch.input_ids)
    assert torch.equal(again.lengths, first.batch.lengths)


def test_decoding_agrees_with_the_reference_loop(batch: PageBatch) -> None:
    model = tiny_model("mha")
    mask = batch.prompt_ids == processor_image_id(batch)
    crops = torch.tensor([[batch.tiles]]).expand(len(batch.texts), -1, -1)
    embeds = model.embed(batch.prompt_ids, mask, crops, batch.pixels)
    assert decode(model, batch, AnswerSettings(max_tokens=5)) == model.generate_greedy(embeds, 5).tolist()


# The loss


def test_forward_kl_is_the_textbook_one_and_looks_at_known_positions_only() -> None:
    target_logits, draft_logits = torch.randn(2, 5, 7), torch.randn(2, 5, 7, requires_grad=True)
    known = torch.tensor([[True, True, False, False, False], [True] * 4 + [False]])
    value = forward_kl(target_logits, draft_logits, known)
    p, q = target_logits.softmax(-1)[known], draft_logits.softmax(-1)[known]
    assert value.item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)
    value.backward()
    gradient = draft_logits.grad
    assert gradient is not None
    assert bool((gradient[~known] == 0).all())
    assert bool((gradient[known].abs().sum(-1) > 0).all())
    assert forward_kl(target_logits, target_logits, known).item() == pytest.approx(0, abs=1e-6)


def test_feature_error_is_relative_to_the_spread() -> None:
    wanted = torch.randn(4, 9, 5) * 3 + 7
    assert feature_error(wanted, wanted).item() == 0
    assert feature_error(wanted.mean((0, 1)).expand_as(wanted), wanted).item() == pytest.approx(1, rel=1e-5)


def test_the_student_keeps_the_bridge_to_itself(batch: PageBatch) -> None:
    draft = scratch_draft(shrunk_config(tiny_config("mla")), 0)
    student = Student(draft, tiny_model("mla"))
    _, _, features = student(batch)
    assert features is not None
    assert features.shape[-1] == 64
    assert isinstance(student.bridge, nn.Linear)
    assert not any("bridge" in name for name, _ in draft.named_parameters())


def test_learning_rate_warms_up_holds_and_falls() -> None:
    rates = [learning_rate(step / 1000, step, 1.0, 100) for step in range(1001)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[99:551] == [1.0] * 452
    assert sorted(rates[551:], reverse=True) == rates[551:]
    assert rates[-1] == pytest.approx(0.01)


# The draft from scratch


def test_unused_experts_are_found(target: Path, batch: PageBatch) -> None:
    draft = scratch_draft(shrunk_config(tiny_config("mla"), {"language_config": {"n_routed_experts": 3}}), 0)
    records = [Record("r", Image.new("RGB", (32, 32), "white"), "Read.")]
    model = load_model(target)
    with torch.no_grad():
        gate = draft.get_parameter("language.model.layers.1.mlp.gate.weight")
        gate.zero_()  # ties: the first two experts always win
    result = measure(model, draft, records, target, k=4, batch_tokens=600, max_answer_tokens=4)
    assert result["unused_experts"] == ["layer 1, expert 2"]
    tokens: dict[int, torch.Tensor] = {}
    with counted(draft, tokens):
        forced(draft, batch)
    assert int(tokens[1].sum()) == 2 * batch.input_ids[:, :-1].numel()


def _published(**language: Any) -> ModelConfig:
    return ModelConfig(
        vision=VisionConfig(image_size=384, patch_size=14, width=1152, layers=27, heads=16, mlp_ratio=3.7362),
        projector=ProjectorConfig(input_dim=1152, n_embed=2048),
        language=LanguageConfig(
            vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, q_lora_rank=None,
            num_hidden_layers=27, num_attention_heads=16, num_key_value_heads=16, n_shared_experts=2,
            n_routed_experts=64, num_experts_per_tok=6, first_k_dense_replace=1, **language,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("config", [_published(), tiny_config("mla"), tiny_config("mha"), tiny_config("base")])
def test_a_shrunk_configuration_is_valid_and_fits_int4_groups(config: ModelConfig) -> None:
    small = shrunk_config(config)
    text = small.language
    assert ModelConfig.from_dict(small.to_dict()) == small
    assert not text.use_mla
    assert all(width % 64 == 0 for width in (text.hidden_size, text.intermediate_size, text.moe_intermediate_size))
    assert text.num_attention_heads * text.head_dim == text.hidden_size
    assert text.is_moe(text.num_hidden_layers - 1)
    assert small.candidate_resolutions == config.candidate_resolutions
    assert small.image_tokens(2, 3) == config.image_tokens(2, 3)
    assert text.vocab_size == config.language.vocab_size


def test_sizes_can_be_given_but_not_the_tokens() -> None:
    config = tiny_config("mla")
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    assert shrunk_config(config, {"language_config": sizes}).projector.n_embed == 128
    with pytest.raises(UserError, match=r"language_config\.vocab_size, which must be the target's"):
        shrunk_config(config, {"language_config": {"vocab_size": 7}})
    with pytest.raises(UserError, match=r"vision_config\.depth, which does not exist"):
        shrunk_config(config, {"vision_config": {"depth": 7}})
    with pytest.raises(UserError, match="no section 'text'"):
        shrunk_config(config, {"text": {}})


# Data


def test_records_are_read_and_grouped_by_shape(target: Path, images: Path) -> None:
    records = read_records(str(images / "records.jsonl"))
    assert [record.prompt for record in records] == ["Read."] * 7
    assert records[2].guess == "nono"
    found = shapes(records, target)
    batches = grouped(found, range(7), 600)
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    assert all(len({found[index] for index in batch}) == 1 for batch in batches)
    assert len(grouped(found, range(7), 1)) == 7


def test_a_source_skips_to_where_it_was(target: Path, images: Path) -> None:
    source = open_source(str(images), target, 200, 3, 0, 2, "What?")
    assert not {record.name for record in source.held_out} & {record.name for record in source.records}  # type: ignore[attr-defined]
    stream = source.batches(0, 0, 0)
    texts = [next(stream).texts for _ in range(9)]
    assert len({name for names in texts for name in names}) == 6
    rest = source.batches(1, 0, 4)
    assert [next(rest).texts for _ in range(5)] == texts[4:]


# Refusals


def test_another_vocabulary_is_refused_in_one_sentence(target: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(target, other)
    raw = json.loads((other / "config.json").read_text())
    raw["language_config"]["vocab_size"] = 600
    (other / "config.json").write_text(json.dumps(raw))
    arguments = ["--target", str(target), "--draft", str(other), "--output", str(tmp_path / "d"), "--steps", "1"]
    refused = CliRunner().invoke(command, arguments)
    assert isinstance(refused.exception, UserError)
    assert "a vocabulary of 600 tokens" in str(refused.exception)
    assert "one of 544" in str(refused.exception)
    assert not (tmp_path / "d").exists()


def test_another_tokenizer_or_tiling_is_refused(target: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(target, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(UserError, match=r"another tokenizer.*token '(a|b)'"):
        check_pair(target, other)
    shutil.copy(target / "tokenizer.json", other / "tokenizer.json")
    check_pair(target, other)
    for name in ("config.json", "processor_config.json"):
        raw = json.loads((other / name).read_text())
        raw["candidate_resolutions"] = raw["candidate_resolutions"][:3]
        (other / name).write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"cuts images differently.*candidate_resolutions"):
        check_pair(target, other)


def test_unusable_data_is_refused(target: Path, tmp_path: Path) -> None:
    empty, lines = tmp_path / "empty", tmp_path / "lines.jsonl"
    empty.mkdir()
    for data, message in ((empty, "holds no images"), (tmp_path / "none", "There is no data")):
        with pytest.raises(UserError, match=message):
            read_records(str(data))
    for text, message in (
        ("\n", "has no records"),
        ('{"image": 3}', "Line 1 of .* needs an 'image'"),
        ('{"image": "a.png"}\n{', "Line 2 of .* is no JSON object"),
        ('{"image": "a.png", "prompt": []}', "a 'prompt' that is not a text"),
    ):
        lines.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            read_records(str(lines))
    lines.write_text('{"image": "absent.png"}', encoding="utf-8")
    with pytest.raises(UserError, match="The record line 1 cannot be used: There is no image file"):
        open_source(str(lines), target, 600, 0, 0, 1, None)


def test_what_makes_no_training_is_refused(target: Path, images: Path, tmp_path: Path) -> None:
    for kwargs in ({}, {"steps": 1, "minutes": 1.0}, {"minutes": -1.0}):
        with pytest.raises(UserError):
            TrainSettings(**kwargs)
    with pytest.raises(UserError, match="exists already"):
        train(str(target), "scratch", str(images), images, SMALL)
    with pytest.raises(UserError, match="nothing to resume"):
        train(str(target), "scratch", str(images), tmp_path / "d", SMALL, resume=True)
    sizes = tmp_path / "sizes.json"
    sizes.write_text("[]")
    with pytest.raises(UserError, match="must be a JSON object"):
        train(str(target), "scratch", str(images), tmp_path / "d", SMALL, sizes=str(sizes))
    with pytest.raises(UserError, match="a draft named by --draft has its own"):
        train(str(target), str(target), str(images), tmp_path / "d", SMALL, sizes=str(sizes))


def _said(answered: Any) -> list[list[int]]:
    """The answers of an Answered, as token ids."""
    batch = answered.batch
    return [
        row[batch.answer_start : length].tolist() for row, length in zip(batch.input_ids, batch.lengths, strict=True)
    ]


def _plain_batch() -> PageBatch:
    """Two prompts of one tile, made without files."""
    count = tiny_config("mla").image_tokens(1, 1)
    ids = torch.full((2, count + 5), 7)
    pixels = torch.randn(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return PageBatch(pixels, (1, 1), ids, 2, count + 4, torch.tensor([count + 5] * 2), ["a", "b"])


def processor_image_id(batch: PageBatch) -> int:
    return int(batch.input_ids[0, batch.image_start])
