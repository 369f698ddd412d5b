"""The command repair."""

from typing import Annotated

import typer

import hesse
from hesse.cli.options import (
    BatchOption,
    CurvatureOption,
    DampingOption,
    DataOption,
    DeviceOption,
    DryRunOption,
    FormatOption,
    IgnoreOption,
    JsonOption,
    LengthOption,
    ModelArgument,
    OutArgument,
    OverwriteOption,
    RankOption,
    RestartOption,
    SamplesOption,
    SeedOption,
)
from hesse.cli.terminal import print_report, progress_bars


def repair(
    dense: ModelArgument,
    compressed: Annotated[str, typer.Argument(help="The compressed model, made by Hesse or by another program.")],
    out: OutArgument,
    rank: RankOption = 32,
    curvature: CurvatureOption = "gram",
    format: FormatOption = "adapter",
    damping: DampingOption = 0.01,
    ignore: IgnoreOption = None,
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
    """Add to each layer of a compressed model the low rank that is nearest to its error, without training.

    The low rank minimizes the error in the layer's outputs with --curvature gram (EoRA), in the end loss with
    kronecker, and in the weights with identity (LoRC). --format adapter writes a LoRA for PEFT, to load on top of the
    compressed model; dense writes a whole model.
    """
    from hesse.reporting import repair_summary

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
    print_report(report, repair_summary, as_json)
