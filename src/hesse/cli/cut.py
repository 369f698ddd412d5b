"""The command that makes a model of any size from one ranking: cut."""

from pathlib import Path
from typing import Annotated

import typer

from hesse.cli.app import app, out_console, print_forecast, print_json, progress_bars
from hesse.cli.options import DeviceOption, IgnoreOption, JsonOption, ModelArgument, OutArgument, OverwriteOption
from hesse.reporting import compression_summary
from hesse.result import ForecastReport


@app.command(epilog="Example: `hesse cut default STATISTICS smaller --size 80%`")
def cut(
    model: ModelArgument,
    statistics: Annotated[Path, typer.Argument(help="What `hesse estimate --curvature gram,kronecker` wrote of it.")],
    out: OutArgument,
    size: Annotated[str, typer.Option(help="Of the linear layers: 60% of their dense bytes, or 5MB.")],
    ignore: IgnoreOption = None,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Cut thin factors of any total size from one ranking of the directions of all layers."""
    import hesse

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
    if isinstance(report, ForecastReport):
        print_forecast(report, as_json)
        return
    if as_json:
        print_json(report.to_dict())
    else:
        out_console.print(compression_summary(report))
