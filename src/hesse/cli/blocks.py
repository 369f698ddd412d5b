"""The commands that change a model's shape: drop-blocks and narrow."""

from typing import Annotated

import typer

from hesse.cli.app import app, out_console, print_forecast, print_json, progress_bars
from hesse.cli.options import (
    BatchOption,
    DataOption,
    DeviceOption,
    DryRunOption,
    JsonOption,
    LengthOption,
    ModelArgument,
    OutArgument,
    OverwriteOption,
    RestartOption,
    SamplesOption,
    SeedOption,
)
from hesse.reporting import blocks_summary, narrow_summary
from hesse.result import ForecastReport


@app.command("drop-blocks", epilog="Example: `hesse drop-blocks default shorter --blocks 1`")
def drop_blocks(
    model: ModelArgument,
    out: OutArgument,
    blocks: Annotated[int | None, typer.Option(help="How many blocks go.")] = None,
    loss: Annotated[float | None, typer.Option(help="Or what they may cost together, in nats per token.")] = None,
    importance: Annotated[
        str, typer.Option(help="loss: what removing a block costs, measured, one at a time; cosine; or quadratic.")
    ] = "loss",
    share_rank: Annotated[
        int | None, typer.Option(help="Make the blocks of others that stay, and so high a rank beside each layer.")
    ] = None,
    data: DataOption = None,
    samples: Annotated[int, typer.Option(help="Samples that blocks are judged by.")] = 16,
    length: LengthOption = None,
    seed: SeedOption = 0,
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
    restart: RestartOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Take whole blocks out of a model, chosen by what they are measured or predicted to be worth."""
    import hesse

    with progress_bars(as_json) as bars:
        report = hesse.drop_blocks(
            model,
            out,
            blocks=blocks,
            loss=loss,
            importance=importance,
            share_rank=share_rank,
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
        out_console.print(blocks_summary(report))


@app.command(epilog="Example: `hesse narrow default narrower --keep 0.75`")
def narrow(
    model: ModelArgument,
    out: OutArgument,
    keep: Annotated[float, typer.Option(help="Share of the hidden units of feed-forward layers that stay.")] = 0.75,
    data: DataOption = None,
    samples: SamplesOption = 128,
    length: LengthOption = None,
    seed: Annotated[int, typer.Option(help="Of the choice of samples.")] = 0,
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
    restart: RestartOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make feed-forward layers narrower: the best units stay, and what reads them is refitted."""
    import hesse

    with progress_bars(as_json) as bars:
        report = hesse.narrow(
            model,
            out,
            keep=keep,
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
        out_console.print(narrow_summary(report))
