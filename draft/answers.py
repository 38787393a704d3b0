"""What the target itself would answer, and its distribution at every token of that answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trtvlm.draft.distil import forced, pixels_of
from trtvlm.model.cache import KVCache
from trtvlm.model.pages.batches import PageBatch
from trtvlm.model.vlm import DeepseekVL2


@dataclass(frozen=True)
class AnswerSettings:
    """How the target answers: greedily at `temperature` 0, else by sampling; at most `max_tokens` tokens.

    A page comes with the text that is on it, and mostly that is what the target will say. So the text is tried first:
    one pass over it shows how far the target would have said the same. If at least `enough` of a batch's tokens hold,
    that part is used as it is; else the target answers those rows token by token.
    """

    temperature: float = 0.0
    max_tokens: int = 512
    enough: float = 1.0


@dataclass
class Answered:
    """A batch whose input_ids hold the target's own answers.

    logits [B, A, vocab] and features [B * V, h * h, hidden] are the target's; `known` bool [B, A] marks the positions
    whose context is the target's own answer: the loss is taken there and nowhere else.
    """

    batch: PageBatch
    logits: Tensor
    features: Tensor
    known: Tensor


@torch.no_grad()
def answer(target: DeepseekVL2, batch: PageBatch, settings: AnswerSettings) -> Answered:
    """The target's answers to a batch on its device; the answers in batch.input_ids are only guesses.

    Checking a guess loses nothing: where the guess's first t tokens are the greedy ones, the pass over the guess has
    computed the target's greedy token t, exactly what decoding would have. The position of the first difference is
    still known (its context was right); those after it are not.
    """
    if settings.temperature == 0:
        tried = _checked(target, batch)
        held = tried.known.sum(1) - _differs(tried)
        wanted = batch.lengths - batch.answer_start
        if float(held.sum() / wanted.sum()) >= settings.enough:
            return tried
        rows = (held < wanted).nonzero().flatten()
    else:
        rows = torch.arange(len(batch.lengths), device=batch.lengths.device)
    answers = _answers(batch)
    decoded = decode(target, _rows(batch, rows), settings)
    for row, tokens in zip(rows.tolist(), decoded, strict=True):
        answers[row] = tokens
    return _checked(target, with_answers(batch, answers), greedy=settings.temperature == 0)


@torch.no_grad()
def decode(target: DeepseekVL2, batch: PageBatch, settings: AnswerSettings) -> list[list[int]]:
    """Answer every row of the batch token by token; the end token, where it came, is the last of a row."""
    views = batch.pixels.shape[:2]
    features = target.encode_views(pixels_of(batch, target.image_newline.dtype).flatten(0, 1))
    images = target.batch_image_embeds(features.view(*views, *features.shape[1:]), batch.tiles)
    prompt = target.language.model.embed_tokens(batch.prompt_ids)
    end = batch.image_start + images.shape[1]
    embeds = torch.cat((prompt[:, : batch.image_start], images.to(prompt.dtype), prompt[:, end:]), dim=1)
    config = target.config.language
    limit = min(settings.max_tokens, config.max_position_embeddings - embeds.shape[1])
    cache = KVCache(config, embeds.shape[0], embeds.shape[1] + limit, embeds.dtype, embeds.device)
    ended = torch.zeros(embeds.shape[0], dtype=torch.bool, device=embeds.device)
    tokens: list[Tensor] = []
    while len(tokens) < limit and not bool(ended.all()):
        logits = target.language(embeds, cache, last_only=True)[:, -1]
        if settings.temperature == 0:
            token = logits.argmax(-1)
        else:
            token = torch.multinomial((logits.float() / settings.temperature).softmax(-1), 1).squeeze(1)
        tokens.append(token.masked_fill(ended, config.eos_token_id))
        ended = ended | (token == config.eos_token_id)
        embeds = target.language.model.embed_tokens(tokens[-1]).unsqueeze(1)
    rows = torch.stack(tokens, dim=1).tolist()
    return [_until(row, config.eos_token_id) for row in rows]


def with_answers(batch: PageBatch, answers: Sequence[Sequence[int]]) -> PageBatch:
    """The batch with other answers (token ids, the end token included), padded anew."""
    start, device = batch.answer_start, batch.input_ids.device
    longest = max(len(tokens) for tokens in answers)
    ids = torch.zeros(len(answers), longest, dtype=torch.int64)
    for row, tokens in enumerate(answers):
        ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
    lengths = torch.tensor([start + len(tokens) for tokens in answers], dtype=torch.int64)
    return replace(
        batch,
        input_ids=torch.cat((batch.prompt_ids, ids.to(device)), dim=1),
        lengths=lengths.to(device),
    )


class RememberedAnswers:
    """Greedy answers by a record's name (a batch's `texts`): the best guess when the record comes again."""

    def __init__(self) -> None:
        self.answers: dict[str, list[int]] = {}

    def recall(self, batch: PageBatch) -> PageBatch:
        """The batch with the remembered answers in place of its guesses."""
        own = _answers(batch)
        return with_answers(
            batch, [self.answers.get(name, guess) for name, guess in zip(batch.texts, own, strict=True)]
        )

    def keep(self, answered: Answered) -> None:
        """Remember the answers that are known to their end."""
        wanted = answered.batch.lengths - answered.batch.answer_start
        whole = (answered.known.sum(1) - _differs(answered) == wanted).tolist()
        for name, tokens, known in zip(answered.batch.texts, _answers(answered.batch), whole, strict=True):
            if known:
                self.answers[name] = tokens


def _answers(batch: PageBatch) -> list[list[int]]:
    rows = zip(batch.input_ids.tolist(), batch.lengths.tolist(), strict=True)
    return [row[batch.answer_start : length] for row, length in rows]


def _checked(target: DeepseekVL2, batch: PageBatch, greedy: bool = True) -> Answered:
    """One pass of the target over prompts and guesses; without `greedy` the guesses are taken as they are."""
    out = forced(target, batch)
    guess = batch.input_ids[:, batch.answer_start :]
    known = torch.arange(guess.shape[1], device=guess.device) < (batch.lengths - batch.answer_start).unsqueeze(1)
    if greedy:
        same = out.logits.argmax(-1) == guess
        right_before = torch.cat((torch.ones_like(same[:, :1]), same[:, :-1].long().cumprod(1).bool()), dim=1)
        known = known & right_before
    return Answered(batch, out.logits, out.features, known)


def _differs(answered: Answered) -> Tensor:
    """1 for each row whose last known position has another token than the guess, else 0: int64 [B]."""
    guess = answered.batch.input_ids[:, answered.batch.answer_start :]
    return ((answered.logits.argmax(-1) != guess) & answered.known).any(1).long()


def _rows(batch: PageBatch, rows: Tensor) -> PageBatch:
    texts = [batch.texts[row] for row in rows.tolist()]
    picked = (tensor[rows] for tensor in (batch.pixels, batch.input_ids, batch.lengths))
    pixels, ids, lengths = picked
    return replace(batch, pixels=pixels, input_ids=ids, lengths=lengths, texts=texts)


def _until(row: list[int], end: int) -> list[int]:
    return row[: row.index(end) + 1] if end in row else row
