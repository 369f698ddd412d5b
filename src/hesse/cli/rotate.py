"""The command that rewrites a model without changing its function."""

from typing import Annotated

import typer

from hesse.cli.app import app, print_forecast, print_json, print_line, progress_bars
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
)
from hesse.result import ForecastReport


@app.command(epilog="Example: `hesse rotate default default-rotated --kind kurtail --samples 32`")
def rotate(
    model: ModelArgument,
    out: OutArgument,
    kind: Annotated[str, typer.Option(help="hadamard (random) or kurtail (learned on the samples).")] = "hadamard",
    data: DataOption = None,
    samples: Annotated[int, typer.Option(help="Samples to learn from.")] = 128,
    length: LengthOption = None,
    seed: Annotated[int, typer.Option(help="Of the random rotations and of the choice of samples.")] = 0,
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
    restart: RestartOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Rewrite a model so that nothing in it stands out, its function unchanged, for whatever rounds it next."""
    import hesse

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
    if isinstance(report, ForecastReport):
        print_forecast(report, as_json)
        return
    if as_json:
        print_json(report.to_dict())
        return
    loss = report.loss
    for note in report.notes:
        print_line(note)
    if loss is not None:
        print_line(f"{loss.name}: {loss.measured:.3g} nats per token, on {report.tokens:,} tokens")
    print_line(f"{report.bytes_before:,} bytes before, {report.bytes_after:,} after: {out.absolute()}")
    print_line(f"Next: hesse compress {out} OUT")
