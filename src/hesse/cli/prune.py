"""The commands that remove parts of a model: drop-blocks and narrow."""

from typing import Annotated

import typer

import hesse
from hesse.cli.options import (
    BatchOption,
    DataOption,
    DeviceOption,
    DryRunOption,
    JsonOption,
    LengthOption,
    LossOption,
    ModelArgument,
    OutArgument,
    OverwriteOption,
    RestartOption,
    SamplesOption,
    SeedOption,
)
from hesse.cli.terminal import out_console, print_forecast, print_json, progress_bars
from hesse.result import ForecastReport


def drop_blocks(
    model: ModelArgument,
    out: OutArgument,
    blocks: Annotated[int | None, typer.Option(help="Number of blocks to remove.")] = None,
    loss: LossOption = None,
    importance: Annotated[
        str, typer.Option(help="Score of a block: loss (measured, one block at a time), cosine, or quadratic.")
    ] = "loss",
    share_rank: Annotated[
        int | None,
        typer.Option(help="Replace blocks by blocks that stay, plus a low rank of this rank in each layer."),
    ] = None,
    data: DataOption = None,
    samples: SamplesOption = 16,
    length: LengthOption = None,
    seed: SeedOption = 0,
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
    restart: RestartOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Remove whole blocks of a model, chosen by their measured or predicted cost."""
    from hesse.reporting import blocks_summary

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


def narrow(
    model: ModelArgument,
    out: OutArgument,
    keep: Annotated[float, typer.Option(help="Share of the parts that stays.")] = 0.75,
    data: DataOption = None,
    samples: SamplesOption = 128,
    length: LengthOption = None,
    seed: SeedOption = 0,
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
    restart: RestartOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Remove hidden units of the feed-forward layers, and refit the layers that read them."""
    from hesse.reporting import narrow_summary

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
