"""The command cut."""

from pathlib import Path
from typing import Annotated

import typer

import hesse
from hesse.cli.options import (
    DeviceOption,
    IgnoreOption,
    JsonOption,
    ModelArgument,
    OutArgument,
    OverwriteOption,
    RequiredSizeOption,
)
from hesse.cli.terminal import print_report, progress_bars


def cut(
    model: ModelArgument,
    statistics: Annotated[Path, typer.Argument(help="A folder that `hesse estimate` wrote of the model.")],
    out: OutArgument,
    size: RequiredSizeOption,
    ignore: IgnoreOption = None,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Factorize a model to any size by one ranking of the singular directions of all layers."""
    from hesse.reporting import compression_summary

    with progress_bars(as_json) as bars:
        report = hesse.cut(
            model,
            statistics,
            out,
            size=size,
            ignore=tuple(ignore or ()),
            device=device,
            overwrite=overwrite,
            progress=bars,
        ).report
    print_report(report, compression_summary, as_json)
