"""`trtvlm draft-train`: distil a draft from a target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command()
@click.option(
    "--target", metavar="MODEL", required=True, help="The model to speed up: a name (nano), folder or hub name."
)
@click.option(
    "--draft",
    metavar="MODEL|scratch",
    default="scratch",
    show_default=True,
    help="What to train: a model that shares the target's vocabulary, or a new one about an eighth of its size.",
)
@click.option(
    "--data",
    metavar="pages|JSONL|FOLDER",
    default="pages",
    show_default=True,
    help="Pages drawn for it; a file of {image, prompt} objects, one a line; or a folder of images.",
)
@click.option("--output", metavar="DIR", type=click.Path(path_type=Path), required=True, help="The draft's new folder.")
@click.option("--steps", metavar="N", type=click.IntRange(min=1), help="Train so many steps.")
@click.option("--minutes", metavar="M", type=click.FloatRange(min=0, min_open=True), help="Or so many minutes in all.")
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped, from DIR.state.")
@click.option(
    "--config",
    "sizes",
    metavar="FILE.json",
    type=click.Path(exists=True, dir_okay=False),
    help='Sizes of a scratch draft, as in config.json: {"language_config": {"hidden_size": 128}}.',
)
@click.option("--prompt", metavar="TEXT", help="What to ask of images that come without a prompt.")
@click.option(
    "--batch-tokens",
    metavar="N",
    type=click.IntRange(min=1),
    help="Image and text tokens in a batch; the images in it follow. By default 100,000 on a GPU and 3,000 on a CPU.",
)
@click.option("--lr", type=float, help="Peak learning rate. By default 1.5e-3 from scratch, 2e-4 for a trained draft.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the first weights and the pages.")
@click.option(
    "--temperature",
    metavar="T",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="How the target answers: 0 greedily, above by sampling.",
)
@click.option(
    "--max-answer-tokens",
    metavar="N",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Cut answers there.",
)
@click.option(
    "--replay",
    metavar="N",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Train so often on each answered batch.",
)
@click.option(
    "--align",
    metavar="W",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    help="Weight of learning the target's image features besides its answers.",
)
@click.option(
    "--draft-tokens",
    metavar="K",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Measure speculation of so many drafted tokens a step.",
)
@click.option(
    "--held-out",
    metavar="N",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Records kept for the measurement, at most.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bf16"]),
    default="auto",
    show_default=True,
    help="What the models compute in; the weights stay float32. auto: bf16 on a GPU.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to train. auto: on a GPU if there is one.",
)
@click.option(
    "--workers",
    metavar="N",
    type=click.IntRange(min=0),
    help="Processes that draw pages. By default the cores less one.",
)
@click.option("--compile/--no-compile", default=False, show_default=True, help="Compile the layers with torch.compile.")
@click.option("--log-every", metavar="N", type=click.IntRange(min=1), default=50, show_default=True, help="Steps.")
@click.option("--save-every", metavar="N", type=click.IntRange(min=1), default=1000, show_default=True, help="Steps.")
def command(
    target: str,
    draft: str,
    data: str,
    output: Path,
    sizes: str | None,
    prompt: str | None,
    resume: bool,
    **settings: Any,
) -> None:
    """Distil a draft from a target, on the target's own answers.

    The draft learns the target's whole distribution at every token the target generates. DIR is a checkpoint that
    `trtvlm build --draft DIR` takes, written whole at the end; while the training runs its state is in DIR.state, and
    the same command with --resume goes on from there after a stop.

    \b
    trtvlm draft-train --target nano --draft scratch --data pages --output my-draft --minutes 12
    trtvlm draft-train --target nano --draft nano-draft --data receipts.jsonl --output my-draft --steps 2000
    """
    from trtvlm.draft.train import TrainSettings, default_batch_tokens, train

    settings["batch_tokens"] = settings["batch_tokens"] or default_batch_tokens(settings["device"])
    result = train(
        target,
        draft,
        data,
        output,
        TrainSettings(**settings),
        sizes=sizes,
        prompt=prompt,
        resume=resume,
        report=_show,
    )
    if result["unused_experts"]:
        click.echo(
            f"No token chose {', '.join(result['unused_experts'])}: train longer, or with fewer experts.", err=True
        )
    click.echo(f"The draft is in {output}.")


def _show(row: dict[str, Any]) -> None:
    """One line a row of the log; the last row is the measurement."""
    if "by_position" in row:
        positions = ", ".join(f"{rate:.0%}" for rate in row["by_position"])
        click.echo(
            f"held out ({row['held_out']}): {row['tokens_per_step']:.2f} tokens a target step with K={row['k']}, "
            f"accepted by position {positions}, agreement {row['agreement']:.1%}, KL {row['kl']:.3f}"
        )
        return
    click.echo(
        f"step {row['step']:>6}  {row['minutes']:6.2f} min  stage {row['stage']}  loss {row['loss']:.4f}  "
        f"agreement {row['agreement']:.1%}  "
        f"tokens a target step {row['tokens_per_step']:.2f} (expected {row['expected']:.2f})  "
        f"{row['tokens_s']:,} tokens/s"
    )
