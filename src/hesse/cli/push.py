"""The command push."""

from pathlib import Path
from typing import Annotated

import typer

import hesse
from hesse.cli.options import AS_JSON, with_options
from hesse.cli.terminal import print_report, progress_bars


@with_options(AS_JSON)
def push(
    out: Annotated[Path, typer.Argument(help="A folder that a command wrote.", metavar="OUT")],
    repository: Annotated[str, typer.Argument(help="The repository, such as owner/name.", metavar="REPO")],
    private: Annotated[bool, typer.Option("--private", help="Create the repository as private.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch to upload to.", show_default="main")] = None,
    *,
    as_json: bool,
) -> None:
    """Upload a written model or adapter to a repository of the hub, with its card and its report."""
    from hesse.reporting import push_summary

    with progress_bars(as_json):  # which turns an interruption into one line
        report = hesse.push(out, repository, private=private, revision=revision).report
    print_report(report, push_summary, as_json)
