"""The `trtvlm` command line: a group whose commands are imported when they are called, and only then."""

from __future__ import annotations

import importlib
import os
import signal
from typing import Any

import click

from trtvlm import __version__
from trtvlm.model.errors import UserError

# Command -> its line in `trtvlm --help`. The lines stand here so that the help imports no command; each command is the
# click object `command` of scripts/commands/<name>.py, a dash in its name being an underscore in the file's.
COMMANDS = {
    "plan": "Say what a model takes and could do on a GPU.",
    "build": "Turn a checkpoint into an engine directory.",
    "export": "Write an engine's quantized checkpoint for other programs.",
    "generate": "Read images and print what they say, as it is decoded.",
    "draft-train": "Distil a draft from a target, on the target's own answers.",
    "serve": "Answer OpenAI-style requests over HTTP, one after the other.",
    "bench": "Measure a model on this GPU: time, bytes, memory.",
}
# Modules that come with an extra of the package.
EXTRAS = {
    "accelerate": "train",
    "fastapi": "serve",
    "matplotlib": "bench",
    "prometheus_client": "serve",
    "pydantic": "serve",
    "starlette": "serve",
    "uvicorn": "serve",
}
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count


class Failure(click.ClickException):
    """A `UserError` on its way out: one sentence on stderr, exit status 2."""

    exit_code = EXIT_USER_ERROR


class LazyGroup(click.Group):
    """A group that imports the module of a command when that command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of a person's work, not of the alphabet."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command; None if there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"trtvlm.scripts.commands.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        command.name = cmd_name
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands' lines from the table."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; turn what a person can mend, or did, into a line and an exit status."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            raise Failure(str(error)) from error
        except ModuleNotFoundError as error:
            extra = EXTRAS.get((error.name or "").partition(".")[0])
            if extra is None:
                raise
            raise Failure(f"{error.name} is not installed: run `pip install 'trtvlm[{extra}]'`.") from error
        except KeyboardInterrupt:
            click.echo("\nInterrupted.", err=True)
            ctx.exit(EXIT_INTERRUPTED)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """DeepSeek-VL2 on one consumer GPU: INT4 AWQ engines, a trained draft, lossless speculative decoding.

    A model is named by a folder, a hub name (deepseek-ai/deepseek-vl2-tiny) or `nano`: the bundled pair, which reads
    printed text and needs no download. A tour:

    \b
    trtvlm build --model nano --quant int4_awq --sm 86 --output engine
    trtvlm generate --engine engine --image page.png
    trtvlm serve --engine engine

    `trtvlm COMMAND --help` tells more.
    """


def main() -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 something to mend in what was asked, 130 or 143 stopped."""
    # Threads that spin while they wait are seven times slower on two busy cores. Read when PyTorch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGTERM, _stop)
    cli(prog_name="trtvlm")


def _stop(number: int, frame: object) -> None:
    """End by an exception, as Ctrl+C does: what is half made is then removed on the way out."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
