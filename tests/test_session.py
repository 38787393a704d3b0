"""Sessions over small random models: the same tokens with and without speculation, whatever was asked before."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.tiny import tiny_checkpoint, tiny_model
from trtvlm.model.errors import UserError
from trtvlm.model.processor import Processor
from trtvlm.model.vlm import DeepseekVL2
from trtvlm.plugins.replace import for_cpu
from trtvlm.runtime.engine import Engine
from trtvlm.runtime.lane import Lane
from trtvlm.runtime.request import Request, question
from trtvlm.runtime.result import Result
from trtvlm.runtime.session import Cancelled, Session
from trtvlm.runtime.torch_executor import TorchExecutor

KINDS = ["mla", "mha", "base"]
NOISE = [0.0, 0.01, 0.05]  # from a draft that is the target, to one that is seldom right


CHUNK = 32
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # shown only when no later token can complete it


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts here are short: with this, they still take several chunks."""
    monkeypatch.setattr("trtvlm.runtime.lane.PREFILL_CHUNK", CHUNK)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    folder: Path = tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model", "mla")
    return Processor.from_pretrained(folder)


@pytest.fixture(scope="module")
def page() -> Image.Image:
    return picture(0, (100, 60))


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    noise = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.to(torch.uint8).numpy())


def noisy(model: DeepseekVL2, scale: float, seed: int = 9) -> DeepseekVL2:
    """The same model with every weight moved a little: right for some tokens."""
    generator = torch.Generator().manual_seed(seed)
    twin = DeepseekVL2(model.config).eval().requires_grad_(False)
    twin.load_state_dict(model.state_dict())
    for parameter in twin.parameters():
        parameter += scale * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return twin


def engine(
    processor: Processor, kind: str = "mla", noise: float = 0.02, length: int = 512, draft_length: int = 512
) -> Engine:
    model = tiny_model(kind)
    draft = TorchExecutor(for_cpu(noisy(model, noise)), draft_length)
    return Engine("tiny", TorchExecutor(for_cpu(model, torch.float32), length), draft, processor, load_ms=1.0)


def ask(page: Image.Image, **settings: object) -> Request:
    return Request(question([page]), **({"max_new_tokens": 40} | settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_the_same_with_and_without_speculation(kind: str, processor: Processor, page: Image.Image) -> None:
    seen = set()
    request = ask(page, max_new_tokens=64)
    plain = Session(engine(processor, kind)).answer(replace(request, draft_tokens=0))
    for noise in NOISE:
        for k in (1, 4, 7):
            result = Session(engine(processor, kind, noise)).answer(replace(request, draft_tokens=k))
            assert result.token_ids == plain.token_ids
            assert result.text == plain.text
            seen.add(round(result.accepted_per_step, 3))
    assert plain.accepted_per_step == 1.0
    assert (plain.drafted, plain.steps) == (0, 63)
    assert min(seen) < 2.5 < max(seen)  # both good and bad drafts were among them


@pytest.mark.parametrize("kind", KINDS)
def test_plain_is_what_the_model_itself_generates(kind: str, processor: Processor, page: Image.Image) -> None:
    request = ask(page, max_new_tokens=32, draft_tokens=0)
    inputs = processor(request.conversation)
    model = tiny_model(kind)
    embeds = model.embed(
        inputs.input_ids[None],
        inputs.images_seq_mask[None],
        images_spatial_crop=inputs.images_spatial_crop[None],
        pixels=inputs.pixels[None],
    )
    wanted = model.generate_greedy(embeds, 32, processor.eos_id)[0].tolist()
    result = Session(engine(processor, kind)).answer(request)
    assert list(result.token_ids) == wanted
    assert result.text == processor.decode(wanted)
    assert result.prompt_tokens == len(inputs.input_ids)
    assert result.image_tokens == sum(inputs.num_image_tokens) == int(inputs.images_seq_mask.sum())


def test_the_pieces_are_the_text(processor: Processor, page: Image.Image) -> None:
    *pieces, result = Session(engine(processor)).generate(ask(page))
    assert isinstance(result, Result)
    assert "".join(str(piece) for piece in pieces) == result.text == processor.decode(result.token_ids)
    assert len(pieces) > 3
    assert set(result.timings) == {"load", "image", "prefill", "decode", "first_token", "total"}
    assert all(ms > 0 for ms in result.timings.values())
    assert result.timings["first_token"] <= result.timings["total"]
    assert result.tokens_per_second > 0


def test_sampled_answers_repeat_with_their_seed(processor: Processor, page: Image.Image) -> None:
    request = ask(page, temperature=1.0, top_p=0.9, seed=5)
    session = Session(engine(processor))
    first = session.answer(request).token_ids
    assert session.answer(request).token_ids == first
    assert session.answer(replace(request, seed=6)).token_ids != first


def conversation(pages: list[Image.Image], answer: str) -> list[dict[str, object]]:
    return [
        {"role": "user", "content": "<image>\n" * len(pages) + "Read.", "images": pages},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "Once more, but slowly."},
        {"role": "assistant", "content": ""},
    ]


def test_a_later_turn_reuses_the_prompt_and_changes_no_bit(processor: Processor) -> None:
    pages = [picture(1, (120, 120)), picture(2, (120, 90))]
    first = Request(conversation(pages, "")[:2], max_new_tokens=20)  # type: ignore[arg-type]
    second = Request(conversation(pages, "An answer."), max_new_tokens=20)  # type: ignore[arg-type]
    session = Session(engine(processor))
    assert session.answer(first).reused_tokens == 0
    later = session.answer(second)
    fresh = Session(engine(processor)).answer(second)
    prompt = len(processor(first.conversation).input_ids)
    assert later.reused_tokens == prompt // CHUNK * CHUNK > 0
    assert later.token_ids == fresh.token_ids
    assert fresh.reused_tokens == 0


def test_reuse_is_bit_for_bit(processor: Processor) -> None:
    """After other prompts and decoded tokens, the logits are those of an empty cache: for any overlap."""
    pages = [picture(1, (120, 120)), picture(2, (120, 90)), picture(3, (120, 120))]
    prompts = [
        processor(conversation([pages[a], pages[b]], answer))  # type: ignore[arg-type]
        for a, b, answer in [(0, 1, ""), (0, 1, "x"), (0, 2, "x"), (2, 1, ""), (0, 1, "x"), (0, 1, "x")]
    ]
    lane = Lane(TorchExecutor(for_cpu(tiny_model("mla")), 1024))
    reused = []
    for prompt in prompts:
        filled = lane.fill(prompt)
        lane.executor.decode([5, 6, 7])
        fresh = Lane(TorchExecutor(for_cpu(tiny_model("mla")), 1024)).fill(prompt)
        assert torch.equal(filled.logits, fresh.logits)
        reused.append(filled.reused)
    assert reused[0] == reused[3] == reused[4] == 0  # another first image, nothing in common
    assert 0 < reused[2] < reused[1] <= reused[5] == (len(prompts[5].input_ids) - 1) // CHUNK * CHUNK


def test_the_tower_runs_once_an_image(processor: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    encode = TorchExecutor.encode_image
    monkeypatch.setattr(
        TorchExecutor, "encode_image", lambda self, image: seen.append(image.digest) or encode(self, image)
    )
    session = Session(engine(processor))
    a, b = picture(1, (64, 64)), picture(2, (64, 64))
    for pages in ([a], [a, b], [b], [a.copy()]):
        session.answer(Request(question(pages), max_new_tokens=4))
    assert len(seen) == 4  # two images, each by the target's tower and the draft's
    assert len(set(seen)) == 2


def test_few_images_are_kept(processor: Processor) -> None:
    lane = Lane(TorchExecutor(for_cpu(tiny_model("mla")), 512), images_kept=2)
    for seed in range(4):
        lane.fill(processor(question([picture(seed, (40, 40))])))
    assert len(lane._images) == 2
    three = processor(question([picture(seed, (40, 40)) for seed in range(3)]))
    assert torch.equal(lane.fill(three).logits, Lane(TorchExecutor(for_cpu(tiny_model("mla")), 512)).fill(three).logits)


def test_text_alone(processor: Processor) -> None:
    result = Session(engine(processor)).answer(Request(question([], "Hello"), max_new_tokens=8))
    assert (result.image_tokens, len(result.token_ids)) == (0, 8)


def test_max_new_tokens(processor: Processor, page: Image.Image) -> None:
    session = Session(engine(processor, noise=0.0))
    everything = session.answer(ask(page)).token_ids
    for limit in (1, 2, 3, 5, 6, 7):
        result = session.answer(ask(page, max_new_tokens=limit))
        assert (result.token_ids, result.finish_reason) == (everything[:limit], "length")


@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("room", [1, 2, 3, 6, 9])
def test_a_full_context_ends_the_answer(processor: Processor, page: Image.Image, room: int, noise: float) -> None:
    everything = Session(engine(processor)).answer(ask(page)).token_ids
    prompt = len(processor(question([page])).input_ids)
    result = Session(engine(processor, length=prompt + room, noise=noise)).answer(ask(page))
    assert (result.token_ids, result.finish_reason) == (everything[:room], "length")


def test_a_prompt_that_fills_the_context_is_refused(processor: Processor, page: Image.Image) -> None:
    prompt = len(processor(question([page])).input_ids)
    with pytest.raises(UserError, match=rf"{prompt} tokens .*no room .*context of {prompt}"):
        Session(engine(processor, length=prompt)).answer(ask(page))


@pytest.mark.parametrize("room", [-5, 0, 1, 2, 7])
def test_a_draft_with_less_context_drafts_while_it_can(processor: Processor, page: Image.Image, room: int) -> None:
    everything = Session(engine(processor)).answer(ask(page)).token_ids
    prompt = len(processor(question([page])).input_ids)
    result = Session(engine(processor, noise=0.0, draft_length=prompt + room)).answer(ask(page))
    assert result.token_ids == everything
    assert result.drafted == result.accepted <= max(0, room + 1)
    assert (result.drafted > 0) == (room > 0)


def test_the_end_of_sequence(processor: Processor, page: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = Session(engine(processor)).answer(ask(page)).token_ids
    for position in (0, 1, 3, 5, 20):
        eos = everything[position]
        at = everything.index(eos)
        monkeypatch.setattr(processor, "eos_id", eos)
        for k in (0, 4):
            session = Session(engine(processor, noise=0.0))
            result = session.answer(ask(page, draft_tokens=k))
            assert (result.token_ids, result.finish_reason) == (everything[: at + 1], "stop")


def test_an_empty_page_is_an_empty_text(
    processor: Processor, page: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Session(engine(processor)).answer(ask(page)).token_ids[0]
    special = processor.eos_id
    decode = processor.decode
    monkeypatch.setattr(processor, "eos_id", first)
    monkeypatch.setattr(processor, "decode", lambda ids: decode([special if t == first else t for t in ids]))
    *pieces, result = Session(engine(processor)).generate(ask(page))
    assert isinstance(result, Result)
    assert (pieces, result.text, result.token_ids, result.finish_reason) == ([], "", (first,), "stop")
    assert (result.steps, result.accepted_per_step, result.tokens_per_second) == (0, 0.0, 0.0)


def test_stop_strings(processor: Processor, page: Image.Image) -> None:
    whole = Session(engine(processor)).answer(ask(page))
    for start, end in ((0, 1), (3, 8), (10, 17), (len(whole.text) - 2, len(whole.text))):
        stop = whole.text[start:end]
        for k in (0, 4):
            result = Session(engine(processor)).answer(ask(page, stop=("never in there", stop), draft_tokens=k))
            assert result.text == whole.text[: whole.text.index(stop)]
            assert result.finish_reason == "stop"
            assert result.token_ids == whole.token_ids[: len(result.token_ids)]
            assert stop in processor.decode(result.token_ids)
            if REPLACEMENT not in stop:
                assert stop not in processor.decode(result.token_ids[:-1])


def test_cancelling(processor: Processor, page: Image.Image) -> None:
    session = Session(engine(processor))
    whole = session.answer(ask(page))
    cancel = threading.Event()
    pieces = session.generate(ask(page), cancel)
    assert whole.text.startswith(str(next(pieces)))
    cancel.set()
    with pytest.raises(Cancelled):
        next(pieces)
    with pytest.raises(Cancelled):
        session.answer(ask(picture(8, (90, 90))), cancel)
    assert session.answer(ask(page)).token_ids == whole.token_ids


def test_cancelling_in_the_middle_of_a_prompt(processor: Processor) -> None:
    """Whatever part of a prompt was done before the end, the next request sees the truth."""
    request = Request(conversation([picture(1, (120, 120)), picture(2, (120, 90))], "x"), max_new_tokens=5)  # type: ignore[arg-type]
    whole = Session(engine(processor)).answer(request)
    for allowed in range(1, 6):
        session = Session(engine(processor))
        with pytest.raises(Cancelled):
            session.answer(request, _CancelAfter(allowed))  # type: ignore[arg-type]
        assert session.answer(request).token_ids == whole.token_ids


class _CancelAfter:
    """An Event that is set the n-th time it is looked at."""

    def __init__(self, looks: int) -> None:
        self._left = looks

    def is_set(self) -> bool:
        self._left -= 1
        return self._left < 0


def test_closing_frees_the_session(processor: Processor, page: Image.Image) -> None:
    session = Session(engine(processor))
    pieces = session.generate(ask(page))
    next(pieces)
    assert isinstance(pieces, Iterator)
    pieces.close()  # type: ignore[attr-defined]
    assert session.answer(ask(page)).finish_reason == "length"


def test_requests_from_several_threads_wait_for_each_other(processor: Processor) -> None:
    session = Session(engine(processor))
    pages = [picture(seed, (50, 50)) for seed in range(4)]
    wanted = [Session(engine(processor)).answer(ask(page)).token_ids for page in pages]
    got: list[tuple[int, ...]] = [()] * 4

    def work(index: int) -> None:
        got[index] = session.answer(ask(pages[index])).token_ids

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == wanted


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"draft_tokens": 8}, "draft_tokens"),
        ({"draft_tokens": -1}, "draft_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"stop": ("a", "")}, "stop string"),
    ],
)
def test_settings_out_of_range(page: Image.Image, settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=f"(?i){sentence}"):
        ask(page, **settings)
