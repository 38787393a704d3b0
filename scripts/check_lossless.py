"""Speculation changes nothing: greedy tokens are the very same, and sampled ones have the same distribution.

    python -m trtvlm.scripts.check_lossless --engine DIR --tokens 10000 --output benchmarks/lossless-int4.json
    python -m trtvlm.scripts.check_lossless --model nano --tokens 10000 --output benchmarks/lossless-16bit.json

Greedy: held-out pages are read with and without speculation; every mismatch is printed. Sampled (`--samples`): one page
is begun many times both ways, and a chi-square test compares the counts of each of the first tokens.
Exits with status 1 if there was a mismatch, if the pages held too few tokens, or if a p value is below 0.001.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch

from trtvlm.model.errors import UserError
from trtvlm.runtime.engine import open_engine, open_model
from trtvlm.runtime.lane import Lane
from trtvlm.runtime.request import Request, question
from trtvlm.runtime.sampling import Sampler
from trtvlm.runtime.session import Session
from trtvlm.runtime.speculate import speculate
from trtvlm.scripts.cache_option import kv_cache_option

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from PIL import Image

    from trtvlm.model.cache_kind import CacheKind
    from trtvlm.runtime.engine import Engine
    from trtvlm.runtime.executor import Executor

SPLITS = ("heldout", "heldout_fonts", "real")


@dataclass
class Comparison:
    """Counts over all pages. `mismatches`: the page, the first position that differs, and both tokens there."""

    pages: int = 0
    tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    plain_decode_ms: float = 0.0
    decode_ms: float = 0.0
    mismatches: list[dict[str, Any]] = field(default_factory=list)

    @property
    def accepted_per_step(self) -> float:
        """Tokens out of a target step, with speculation."""
        return (self.tokens - self.pages) / self.steps if self.steps else 0.0

    @property
    def speedup(self) -> float:
        """Decoding time without speculation, divided by that with it."""
        return self.plain_decode_ms / self.decode_ms if self.decode_ms else 0.0


def compare(
    session: Session,
    pages: Iterable[tuple[str, Image.Image]],
    tokens: int,
    draft_tokens: int = Request.draft_tokens,
    max_new_tokens: int = Request.max_new_tokens,
) -> Iterator[Comparison]:
    """Read pages both ways until `tokens` tokens are compared. Yields the same, growing Comparison after each page."""
    total = Comparison()
    for name, image in pages:
        if total.tokens >= tokens:
            return
        conversation = question([image])
        plain = session.answer(Request(conversation, max_new_tokens, draft_tokens=0))
        result = session.answer(Request(conversation, max_new_tokens, draft_tokens=draft_tokens))
        total.pages += 1
        total.tokens += len(plain.token_ids)
        total.steps += result.steps
        total.drafted += result.drafted
        total.accepted += result.accepted
        total.plain_decode_ms += plain.timings["decode"]
        total.decode_ms += result.timings["decode"]
        if plain.token_ids != result.token_ids:
            total.mismatches.append({"page": name} | _first_difference(plain.token_ids, result.token_ids))
        yield total


def _first_difference(plain: tuple[int, ...], speculative: tuple[int, ...]) -> dict[str, Any]:
    same = next(
        (i for i, pair in enumerate(zip(plain, speculative, strict=False)) if pair[0] != pair[1]),
        min(len(plain), len(speculative)),
    )
    ends = {"plain": plain, "speculative": speculative}
    return {"position": same} | {name: ids[same] if same < len(ids) else None for name, ids in ends.items()}


POSITIONS = 3
LEAST_P = 1e-3


@dataclass
class SampledComparison:
    """Chi-square tests of sampled tokens with speculation against those without, from `samples` runs each.

    p_values: for the first tokens of an answer; the first comes from the prefill, the next ones are speculated.
    kinds: how many different tokens each position saw.
    """

    temperature: float
    top_p: float
    samples: int
    p_values: list[float] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)


def compare_sampled(
    engine: Engine, image: Image.Image, samples: int, temperature: float, top_p: float, draft_tokens: int
) -> SampledComparison:
    """Begin the answer to one page `samples` times with, and as often without speculation."""
    assert engine.draft is not None
    inputs = engine.processor(question([image]))
    logits = Lane(engine.target).fill(inputs).logits
    Lane(engine.draft).fill(inputs)
    prompt = len(inputs.input_ids)

    def begin(sampler: Sampler, draft: Executor | None) -> list[int]:
        engine.target.rollback(prompt)
        first, _ = sampler.choose(logits)
        if draft is not None:
            draft.rollback(prompt)
        tokens = [first]
        for step in speculate(
            engine.target, draft, first, sampler, max_tokens=draft_tokens + 1, draft_tokens=draft_tokens
        ):
            tokens += step.tokens
            if len(tokens) >= POSITIONS:
                break
        return tokens[:POSITIONS]

    result = SampledComparison(temperature, top_p, samples)
    plain, speculative = (
        [begin(sampler, draft) for _ in range(samples)]
        for sampler, draft in ((Sampler(temperature, top_p, 1), None), (Sampler(temperature, top_p, 2), engine.draft))
    )
    for position in range(POSITIONS):
        counts = [Counter(tokens[position] for tokens in runs) for runs in (plain, speculative)]
        result.p_values.append(two_sample_p(*counts))
        result.kinds.append(len(counts[0] | counts[1]))
    return result


def two_sample_p(a: Counter[int], b: Counter[int]) -> float:
    """The p value of "both counts come from one distribution": chi-square, cells with fewer than 10 in all pooled."""
    cells = [(a[key], b[key]) for key in a | b]
    rare = [cell for cell in cells if sum(cell) < 10]
    pooled = [(sum(x for x, _ in rare), sum(y for _, y in rare))] if rare else []
    cells = [cell for cell in cells if sum(cell) >= 10] + pooled
    ratio = (b.total() / a.total()) ** 0.5
    statistic = sum((ratio * x - y / ratio) ** 2 / (x + y) for x, y in cells)
    if len(cells) < 2:
        return 1.0
    halves = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(halves[0], halves[1]))


def sample_pages(splits: Iterable[str] = SPLITS) -> Iterator[tuple[str, Image.Image]]:
    """The bundled held-out pages, none of which any model was trained on."""
    from trtvlm.model.pages.samples import load_samples

    for split in splits:
        for number, page in enumerate(load_samples(split)):
            yield f"{split}/{number:03}", page.image


@click.command(help=__doc__)
@click.option("--engine", metavar="DIR")
@click.option("--model", metavar="NAME")
@click.option("--draft", metavar="NAME")
@click.option("--tokens", default=10_000, show_default=True)
@click.option("--draft-tokens", default=Request.draft_tokens, show_default=True)
@click.option("--max-new-tokens", default=Request.max_new_tokens, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@kv_cache_option
@click.option("--samples", default=0, show_default=True, help="Sampled answers to compare, too.")
@click.option("--temperature", default=1.5, show_default=True, help="Of the sampled answers.")
@click.option("--top-p", default=0.95, show_default=True, help="Of the sampled answers.")
@click.option("--output", metavar="FILE", help="Write the counts as JSON.")
def main(
    engine: str | None,
    model: str | None,
    draft: str | None,
    tokens: int,
    draft_tokens: int,
    max_new_tokens: int,
    device: str,
    kv_cache: CacheKind,
    samples: int,
    temperature: float,
    top_p: float,
    output: str | None,
) -> None:
    """Run the comparisons and report."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if (engine is None) == (model is None):
        raise click.UsageError("Give either --engine DIR or --model NAME.")
    if engine is not None:
        opened = open_engine(engine, device, kv_cache=kv_cache)
    else:
        opened = open_model(str(model), draft, device, kv_cache=kv_cache)
    if opened.draft is None:
        raise UserError(f"{opened.name} has no draft, so there is nothing to compare; give --draft.")
    session = Session(opened)
    total = Comparison()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("tokens", total=tokens)
        for total in compare(session, sample_pages(), tokens, draft_tokens, max_new_tokens):
            progress.update(task, completed=min(total.tokens, tokens))
    for mismatch in total.mismatches:
        click.echo(f"MISMATCH {mismatch}")
    click.echo(
        f"{total.tokens} tokens of {total.pages} pages, {len(total.mismatches)} mismatches; with speculation "
        f"{total.accepted_per_step:.2f} tokens a step, {total.speedup:.2f} times as fast"
    )
    sampled = None
    if samples:
        (_, page), *_ = sample_pages()
        sampled = compare_sampled(opened, page, samples, temperature, top_p, draft_tokens)
        for position, (p, kinds) in enumerate(zip(sampled.p_values, sampled.kinds, strict=True), 1):
            click.echo(
                f"sampled token {position}: {kinds} different ones in 2 x {samples} runs, chi-square p = {p:.3f}"
            )
    if output is not None:
        what = opened.name if engine is not None else Path(str(model)).name  # folders of this machine say nothing
        which = "--engine" if engine is not None else "--model"
        drafted = f"--draft {Path(draft).name} " if draft is not None else ""
        options = f"{drafted}--tokens {tokens} --draft-tokens {draft_tokens}"
        options += f" --samples {samples}" if samples else ""
        options += f" --kv-cache {kv_cache}" if kv_cache != "fp16" else ""
        record = {
            "what": what,
            "kv_cache": kv_cache,
            "command": f"python -m trtvlm.scripts.check_lossless {which} {what} {options}",
            **{name: round(value, 1) if isinstance(value, float) else value for name, value in asdict(total).items()},
            "accepted_per_step": round(total.accepted_per_step, 3),
            "speedup": round(total.speedup, 3),
            "sampled": asdict(sampled) if sampled else None,
            **_environment(device),
        }
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if total.tokens < tokens:
        click.echo(f"The pages held only {total.tokens} of the {tokens} tokens asked for.", err=True)
    if total.mismatches or total.tokens < tokens or (sampled and min(sampled.p_values) < LEAST_P):
        sys.exit(1)


def _environment(device: str) -> dict[str, Any]:
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": git.stdout.strip() or None,
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
