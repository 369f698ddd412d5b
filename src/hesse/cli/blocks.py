"""The command that takes whole blocks out of a model: drop-blocks."""

from pathlib import Path
from typing import Annotated

import typer

from hesse.cli.app import (
    BatchOption,
    DataOption,
    DeviceOption,
    JsonOption,
    LengthOption,
    ModelArgument,
    app,
    out_console,
    print_json,
    progress_bars,
)
from hesse.reporting import blocks_summary


@app.command("drop-blocks", epilog="Example: `hesse drop-blocks default shorter --blocks 1`")
def drop_blocks(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
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
    seed: Annotated[int, typer.Option(help="Of the choice of samples and of sampled labels.")] = 0,
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model folder OUT.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Take whole blocks out of a model, chosen by what they are measured or predicted to be worth."""
    from hesse import api

    with progress_bars(as_json) as bars:
        report = api.drop_blocks(
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
            progress=bars,
        )
    if as_json:
        print_json(report.to_dict())
    else:
        out_console.print(blocks_summary(report))
