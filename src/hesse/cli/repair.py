"""The command that makes good what a compression lost: repair."""

from typing import Annotated

import typer

from hesse.cli.app import app, out_console, print_forecast, print_json, progress_bars
from hesse.cli.options import (
    BatchOption,
    DataOption,
    DeviceOption,
    DryRunOption,
    IgnoreOption,
    JsonOption,
    LengthOption,
    ModelArgument,
    OutArgument,
    RestartOption,
    SamplesOption,
    SeedOption,
)
from hesse.reporting import repair_summary
from hesse.result import ForecastReport


@app.command(epilog="Example: `hesse repair default tiny-3bit tiny-3bit-adapter --rank 16`")
def repair(
    dense: ModelArgument,
    compressed: Annotated[str, typer.Argument(help="What was made of it, by Hesse or by another program.")],
    out: OutArgument,
    rank: Annotated[int, typer.Option(help="Of the two thin factors beside each layer.")] = 32,
    curvature: Annotated[
        str,
        typer.Option(help="Nearest in outputs of layers (gram), the end loss (kronecker), or weights (identity)."),
    ] = "gram",
    format: Annotated[
        str, typer.Option(help="adapter: PEFT's, to load beside the compressed model; dense: the sums, a whole model.")
    ] = "adapter",
    damping: Annotated[float, typer.Option(help="Share of the Gram's mean eigenvalue added to it.")] = 0.01,
    ignore: IgnoreOption = None,
    data: DataOption = None,
    samples: SamplesOption = 128,
    length: LengthOption = None,
    seed: SeedOption = 0,
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the adapter or model folder OUT.")] = False,
    restart: RestartOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Add to each layer of a compressed model the best low rank of what it lacks of the dense model."""
    import hesse

    with progress_bars(as_json) as bars:
        report = hesse.repair(
            dense,
            compressed,
            out,
            rank=rank,
            curvature=curvature,
            format=format,
            damping=damping,
            ignore=tuple(ignore or ()),
            data=data,
            samples=samples,
            length=length,
            seed=seed,
            batch_size=batch_size,
            device=device,
            overwrite=overwrite,
            restart=restart,
            dry_run=dry_run,
            progress=bars,
        ).report
    if isinstance(report, ForecastReport):
        print_forecast(report, as_json)
        return
    if as_json:
        print_json(report.to_dict())
    else:
        out_console.print(repair_summary(report))
