"""Greedy decoding with and without speculation, page by page: the tokens must be the very same.

    python -m trtvlm.scripts.check_lossless --engine DIR --tokens 10000 --output benchmarks/lossless-int4.json
    python -m trtvlm.scripts.check_lossless --model nano --tokens 10000 --output benchmarks/lossless-16bit.json

Prints every mismatch and the counts; exits with status 1 if there was one, or if the pages held too few tokens.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trtvlm.model.errors import UserError
from trtvlm.runtime.request import Request, question

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from PIL import Image

    from trtvlm.runtime.session import Session

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
@click.option("--output", metavar="FILE", help="Write the counts as JSON.")
def main(
    engine: str | None,
    model: str | None,
    draft: str | None,
    tokens: int,
    draft_tokens: int,
    max_new_tokens: int,
    device: str,
    output: str | None,
) -> None:
    """Run the comparison and report."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from trtvlm.runtime.engine import open_engine, open_model
    from trtvlm.runtime.session import Session

    if (engine is None) == (model is None):
        raise click.UsageError("Give either --engine DIR or --model NAME.")
    opened = open_engine(engine, device) if engine is not None else open_model(str(model), draft, device)
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
    if output is not None:
        what = Path(engine).name if engine is not None else model
        record = {
            "what": what,
            "command": f"python -m trtvlm.scripts.check_lossless {'--engine' if engine else '--model'} {what} "
            f"--tokens {tokens} --draft-tokens {draft_tokens}",
            **{name: round(value, 1) if isinstance(value, float) else value for name, value in asdict(total).items()},
            "accepted_per_step": round(total.accepted_per_step, 3),
            "speedup": round(total.speedup, 3),
            **_environment(device),
        }
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if total.tokens < tokens:
        click.echo(f"The pages held only {total.tokens} of the {tokens} tokens asked for.", err=True)
    if total.mismatches or total.tokens < tokens:
        sys.exit(1)


def _environment(device: str) -> dict[str, Any]:
    import torch

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
