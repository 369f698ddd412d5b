"""The command rotate."""

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
    ModelArgument,
    OutArgument,
    OverwriteOption,
    RestartOption,
    SamplesOption,
    SeedOption,
)
from hesse.cli.terminal import print_report, progress_bars


def rotate(
    model: ModelArgument,
    out: OutArgument,
    kind: Annotated[str, typer.Option(help="Rotation: hadamard (random) or kurtail (learned).")] = "hadamard",
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
    """Rotate a model to remove outliers without changing its function, before it is rounded."""
    from hesse.reporting import rotation_summary

    with progress_bars(as_json) as bars:
        report = hesse.rotate(
            model,
            out,
            kind=kind,
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
    print_report(report, rotation_summary, as_json)
