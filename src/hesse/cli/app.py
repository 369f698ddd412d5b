"""The command line: the table of commands, and how they end."""

import signal
import sys
from collections.abc import Callable
from typing import Annotated, NamedTuple

import typer

from hesse.cli.compress import compress
from hesse.cli.measure import demo, estimate, evaluate, inspect, methods
from hesse.cli.prune import prune
from hesse.cli.push import push
from hesse.cli.repair import repair
from hesse.cli.rotate import rotate
from hesse.cli.runtimes import benchmark, export
from hesse.cli.terminal import Interrupted, print_error, print_line
from hesse.errors import HesseError, OptionError

CHANGE, LOOK, ELSEWHERE = "Change a model", "Look at a model", "Run it elsewhere"


class Command(NamedTuple):
    """A command, its group in `hesse --help`, and an example."""

    run: Callable[..., None]
    panel: str
    example: str

    @property
    def name(self) -> str:
        """The word after `hesse`."""
        return self.run.__name__.replace("_", "-")


COMMANDS = (
    Command(compress, CHANGE, "hesse compress default tiny-4bit --bits 4 --group-size 64 --samples 64"),
    Command(prune, CHANGE, "hesse prune default narrower --what hidden --keep 0.75"),
    Command(repair, CHANGE, "hesse repair default tiny-3bit tiny-3bit-adapter --rank 16"),
    Command(rotate, CHANGE, "hesse rotate default default-rotated --kind kurtail --samples 32"),
    Command(demo, LOOK, "hesse demo"),
    Command(methods, LOOK, "hesse methods pruning"),
    Command(inspect, LOOK, "hesse inspect default --report report.html"),
    Command(evaluate, LOOK, "hesse evaluate tiny-4bit --reference default"),
    Command(estimate, LOOK, "hesse estimate default statistics --samples 64"),
    Command(export, ELSEWHERE, "hesse export tiny-4bit tiny-4bit.gguf --to gguf"),
    Command(benchmark, ELSEWHERE, "hesse benchmark tiny-4bit --reference default"),
    Command(push, ELSEWHERE, "hesse push tiny-4bit owner/tiny-4bit --private"),
)
BEGIN = (
    "Where to begin:",
    "  hesse demo                          compress the shipped model to 4 bits and see what it cost (a minute)",
    "  hesse compress MODEL OUT --bits 4   compress your own model: a folder, or a hub id such as owner/name",
    "  hesse methods                       list the methods, what each needs, and its source",
    "All commands: hesse --help",
)

app = typer.Typer(
    name="hesse",
    help="Change the weights of a trained network with the curvature of its loss, and report what that costs.",
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
for command in COMMANDS:
    app.command(command.name, rich_help_panel=command.panel, epilog=f"Example: `{command.example}`")(command.run)


def _print_version(wanted: bool) -> None:
    if wanted:
        from hesse.version import __version__

        print_line(f"hesse {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        for line in BEGIN:
            print_line(line)


def _terminate(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line; a HesseError is one line on standard error and an exit code that is not 0."""
    signal.signal(signal.SIGTERM, _terminate)  # so that a killed run also cleans up
    try:
        app(prog_name="hesse")
    except HesseError as error:
        print_error(f"Error: {error}")
        sys.exit(2 if isinstance(error, OptionError) else 1)
    except Interrupted as interrupted:
        print_error(f"Interrupted: {str(interrupted) or 'nothing was written'}.")
        sys.exit(130)
