"""Output of commands: progress bars on standard error; lines, tables and JSON on standard output."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console, RenderableType

from hesse.cli.progress import Bars
from hesse.errors import printable
from hesse.result import ForecastReport, Report, Result

R = TypeVar("R", bound=Report)

out_console = Console()
error_console = Console(stderr=True)


class Interrupted(Exception):
    """Ctrl-C or a signal to end, after cleaning up; the argument says what became of the work."""


@contextmanager
def progress_bars(quiet: bool) -> Iterator[Bars]:
    """Show how far a run is, on standard error.

    Raises:
        Interrupted: the run was interrupted.
    """
    try:
        with Bars(Console(stderr=True, quiet=quiet)) as bars:
            yield bars
    except KeyboardInterrupt as interrupt:
        raise Interrupted(*interrupt.args) from None


def print_line(text: str) -> None:
    """Print a line on standard output as it is, without markup: it may contain any path."""
    out_console.print(printable(text), soft_wrap=True, markup=False, emoji=False, highlight=False)


def print_error(text: str) -> None:
    """Print a line on standard error, in red."""
    error_console.print(printable(text), style="red", soft_wrap=True, markup=False, emoji=False, highlight=False)


def print_report(
    report: R | ForecastReport, summary: Callable[[R], RenderableType], as_json: bool, page: Path | None = None
) -> None:
    """Print a report as JSON, or its summary and where its `page` is; of a dry run, the forecast."""
    from hesse.reporting import forecast_summary

    if as_json:
        print_json(report.to_dict())
    elif isinstance(report, ForecastReport):
        out_console.print(forecast_summary(report))
    else:
        out_console.print(summary(report), crop=False)  # commands and paths stay whole
        if page is not None:
            print_line(f"The report: {page.absolute()}")


def run_and_print(
    verb: Callable[..., Result[Any]],
    summary: Callable[[Any], RenderableType],
    *arguments: Any,
    as_json: bool,
    **options: Any,
) -> None:
    """Run a verb with progress bars, and print its report as JSON or as `summary` shows it."""
    with progress_bars(as_json) as bars:
        report = verb(*arguments, **options, progress=bars).report
    print_report(report, summary, as_json)


def print_json(content: Any) -> None:
    """Print JSON on standard output."""
    sys.stdout.write(json.dumps(content, indent=2) + "\n")
