"""The command that removes parts of a model: prune."""

from typing import Annotated, Any

import typer

import hesse
from hesse.cli.options import (
    CALIBRATION,
    METHOD,
    SAMPLES,
    SMALLER,
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
    SeedOption,
)
from hesse.cli.terminal import print_report, progress_bars
from hesse.options import help_of


def prune(
    model: ModelArgument,
    out: OutArgument,
    what: Annotated[str, typer.Option(help="Parts to remove: blocks, or hidden units of feed-forward layers.")],
    keep: Annotated[
        float | None, typer.Option(help="Share of the parts that stays, such as 0.75.", rich_help_panel=SMALLER)
    ] = None,
    loss: LossOption = None,
    method: Annotated[
        str | None,
        typer.Option(help="A row of `hesse methods`.", show_default="loss for blocks, modegpt-mlp for hidden"),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help=help_of("rank"), show_default="32 in flexigpt", rich_help_panel=METHOD)
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(
            help="Score that chooses blocks for flexigpt: loss, cosine or quadratic.",
            rich_help_panel=METHOD,
            show_default="loss",
        ),
    ] = None,
    data: DataOption = None,
    samples: Annotated[
        int | None,
        typer.Option(help=SAMPLES, show_default="16 for blocks, 128 for hidden", rich_help_panel=CALIBRATION),
    ] = None,
    length: LengthOption = None,
    seed: SeedOption = 0,
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
    restart: RestartOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Remove blocks, or hidden units of all blocks, and write a smaller model that transformers loads.

    Blocks are chosen by --method loss (measured, one at a time), cosine or quadratic, or made of others by flexigpt.
    """
    from hesse.reporting import prune_summary

    given: dict[str, Any] = {"keep": keep, "loss": loss, "rank": rank, "score": score}
    with progress_bars(as_json) as bars:
        report = hesse.prune(
            model,
            out,
            data,
            what=what,
            method=method,
            samples=samples,
            length=length,
            seed=seed,
            batch_size=batch_size,
            device=device,
            overwrite=overwrite,
            restart=restart,
            dry_run=dry_run,
            progress=bars,
            **{name: value for name, value in given.items() if value is not None},
        ).report
    print_report(report, prune_summary, as_json)
