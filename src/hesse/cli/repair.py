"""The command that makes good what a compression lost: repair."""

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
from hesse.reporting import repair_summary


@app.command(epilog="Example: `hesse repair default tiny-3bit tiny-3bit-adapter --rank 16`")
def repair(
    dense: ModelArgument,
    compressed: Annotated[str, typer.Argument(help="What was made of it, by Hesse or by another program.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    rank: Annotated[int, typer.Option(help="Of the two thin factors beside each layer.")] = 32,
    curvature: Annotated[
        str,
        typer.Option(help="Nearest in outputs of layers (gram), the end loss (kronecker), or weights (identity)."),
    ] = "gram",
    format: Annotated[
        str, typer.Option(help="adapter: PEFT's, to load beside the compressed model; dense: the sums, a whole model.")
    ] = "adapter",
    damping: Annotated[float, typer.Option(help="Share of the Gram's mean eigenvalue added to it.")] = 0.01,
    ignore: Annotated[list[str] | None, typer.Option(help="Pattern of layers to leave alone; may be repeated.")] = None,
    data: DataOption = None,
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 128,
    length: LengthOption = None,
    seed: Annotated[int, typer.Option(help="Of the choice of samples and of sampled labels.")] = 0,
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the adapter or model folder OUT.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Add to each layer of a compressed model the best low rank of what it lacks of the dense model."""
    from hesse import api

    with progress_bars(as_json) as bars:
        report = api.repair(
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
            progress=bars,
        )
    if as_json:
        print_json(report.to_dict())
    else:
        out_console.print(repair_summary(report))
