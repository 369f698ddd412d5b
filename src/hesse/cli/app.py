"""The command line: what all commands share, and how they end."""

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

from hesse.cli.progress import Bars
from hesse.errors import HesseError, OptionError, printable
from hesse.reporting.forecast import forecast_summary
from hesse.result import ForecastReport
from hesse.version import __version__

app = typer.Typer(
    name="hesse",
    help="Compress a trained network with second-order information, and say what it cost.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
out_console = Console()
error_console = Console(stderr=True)


class _Interrupted(Exception):
    """Ctrl-C, or a signal to end, after everything has been tidied up; its argument is what became of the work."""


def _print_version(wanted: bool) -> None:
    if wanted:
        out_console.print(f"hesse {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@contextmanager
def progress_bars(quiet: bool) -> Iterator[Bars]:
    """How far a run is, on standard error."""
    try:
        with Bars(Console(stderr=True, quiet=quiet)) as bars:
            yield bars
    except KeyboardInterrupt as interrupt:
        raise _Interrupted(*interrupt.args) from None


def print_line(text: str) -> None:
    """A line on standard output, as it is: a path in it may hold anything."""
    out_console.print(printable(text), soft_wrap=True, markup=False, emoji=False, highlight=False)


def print_forecast(report: ForecastReport, as_json: bool) -> None:
    """Print what a run would take."""
    if as_json:
        print_json(report.to_dict())
    else:
        out_console.print(forecast_summary(report))


def print_json(content: Any) -> None:
    """For machines."""
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


def _terminate(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line; errors of ours are one line, and the exit code is not 0."""
    signal.signal(signal.SIGTERM, _terminate)  # so that a killed run also tidies up
    try:
        app()
    except HesseError as error:
        line = printable(f"Error: {error}")
        error_console.print(line, style="red", soft_wrap=True, markup=False, emoji=False, highlight=False)
        sys.exit(2 if isinstance(error, OptionError) else 1)
    except _Interrupted as interrupted:
        left = str(interrupted) or "nothing was written"
        error_console.print(f"Interrupted: {left}.", style="red", soft_wrap=True, markup=False, highlight=False)
        sys.exit(130)
