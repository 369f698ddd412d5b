"""The command that removes parts of a model: prune."""

from typing import Annotated, Any

import typer

from hesse.cli.app import app, out_console, print_json, progress_bars
from hesse.cli.options import (
    BatchOption,
    DataOption,
    DeviceOption,
    JsonOption,
    LengthOption,
    ModelArgument,
    OutArgument,
    OverwriteOption,
    SeedOption,
)
from hesse.reporting import prune_summary


@app.command(epilog="Example: `hesse prune default narrower --what hidden --keep 0.75`")
def prune(
    model: ModelArgument,
    out: OutArgument,
    what: Annotated[str, typer.Option(help="Parts to remove: blocks, or hidden units of feed-forward layers.")],
    keep: Annotated[float | None, typer.Option(help="Share of the parts that stays, such as 0.75.")] = None,
    loss: Annotated[
        float | None, typer.Option(help="Remove as many blocks as cost no more than this, in nats per token.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="Of blocks: loss (measured, one at a time), cosine, quadratic or flexigpt."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="For flexigpt: rank beside each layer of blocks that are made of others.")
    ] = None,
    score: Annotated[
        str | None, typer.Option(help="For flexigpt: score that chooses the blocks: loss, cosine or quadratic.")
    ] = None,
    data: DataOption = None,
    samples: Annotated[
        int | None, typer.Option(help="Calibration samples; 16 for blocks and 128 for hidden units if absent.")
    ] = None,
    length: LengthOption = None,
    seed: SeedOption = 0,
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew, rather than resume an unfinished run.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove blocks, or hidden units of all blocks, and write a smaller model that transformers loads."""
    import hesse

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
            progress=bars,
            **{name: value for name, value in given.items() if value is not None},
        ).report
    if as_json:
        print_json(report.to_dict())
    else:
        out_console.print(prune_summary(report))
