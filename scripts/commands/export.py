"""`trtvlm export`: an engine directory's quantized checkpoint for other programs."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option(
    "--engine",
    metavar="DIR",
    required=True,
    type=click.Path(path_type=Path),
    help="What `trtvlm build` made; its draft is an engine directory too (DIR/draft).",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["hf"]),
    default="hf",
    show_default=True,
    help="hf: Hugging Face's layout, quantized tensors named as ModelOpt's unified export names them.",
)
@click.option("--output", metavar="DIR", required=True, type=click.Path(path_type=Path), help="The new folder.")
def command(engine: Path, form: str, output: Path) -> None:
    """Write an engine's quantized checkpoint for other programs.

    \b
    trtvlm export --engine engine --format hf --output nano-awq
    """
    from trtvlm.builder.export_hf import export_hf

    written = export_hf(engine, output)
    click.echo(f"{output} has {written['tensors']} tensors, {written['bytes'] / 1e6:.1f} MB.")
