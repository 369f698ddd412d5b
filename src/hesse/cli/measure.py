"""The commands that look at a model: demo, methods, inspect, evaluate and estimate."""

from pathlib import Path
from typing import Annotated

import typer

import hesse
from hesse.cli.options import (
    AllSamplesOption,
    BatchOption,
    CurvatureOption,
    DataOption,
    DeviceOption,
    DryRunOption,
    JsonOption,
    LengthOption,
    ModelArgument,
    OutArgument,
    OverwriteOption,
    ReferenceOption,
    ReportOption,
    RestartOption,
    SamplesOption,
    SeedOption,
    ShortLengthOption,
    StatisticsOption,
)
from hesse.cli.terminal import out_console, print_json, print_line, print_report, progress_bars
from hesse.result import ForecastReport


def demo(
    out: Annotated[Path, typer.Argument(help="The folder to write; replaced if it is a model folder.")] = Path(
        "default-4bit"
    ),
) -> None:
    """Compress the shipped model to 4 bits, and measure it on text that training and calibration never saw."""
    from hesse.reporting import cost_table

    with progress_bars(False) as bars:
        options = hesse.Options(bits=4, group_size=64)
        report = hesse.compress("default", out, options=options, overwrite=True, progress=bars).report
        after = hesse.evaluate(out, reference="default", progress=bars).report
        before = hesse.evaluate("default", progress=bars).report
    if not isinstance(report, ForecastReport):
        out_console.print(cost_table(report, before, after))
    print_line(f"The compressed checkpoint: {out.absolute()}")
    print_line(
        "It loads in transformers: "
        f'AutoModelForCausalLM.from_pretrained("{out}")  (pip install transformers compressed-tensors)'
    )
    print_line("Next, your own model: hesse compress MODEL_FOLDER OUT --bits 4 --group-size 128 --data TEXT_FILE")


def methods(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Families or methods to show.", metavar="[NAME]...", show_default="all"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the methods as curvature × constraint × solver, with source and needs; for a method, also its options."""
    from hesse.methods import METHODS, find_methods, find_row
    from hesse.reporting import methods_table, options_table

    families = find_methods(names or ())
    if as_json:
        rows = [method.to_dict() for methods_of_it in families.values() for method in methods_of_it]
        print_json(rows)
    else:
        out_console.print(methods_table(families))
        for method in dict.fromkeys(find_row(name, METHODS) for name in names or ()):
            if method is not None:
                out_console.print(options_table(method) if method.options() else f"{method.name} has no options")


def inspect(
    model: ModelArgument,
    data: DataOption = None,
    statistics: StatisticsOption = None,
    samples: SamplesOption = 4,
    length: ShortLengthOption = 256,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    report: ReportOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show the loss around a model layer by layer, and which curvature predicts its changes best."""
    from hesse.reporting import check_page, inspection_page, inspection_summary, write_page

    if report is not None:
        check_page(report, overwrite, "--report")
    with progress_bars(as_json) as bars:
        result = hesse.inspect(
            model,
            data=data,
            statistics=statistics,
            samples=samples,
            length=length,
            seed=seed,
            device=device,
            progress=bars,
        ).report
    if report is not None:
        write_page(report, inspection_page(result))
    print_report(result, inspection_summary, as_json, report)


def evaluate(
    model: ModelArgument,
    reference: ReferenceOption = None,
    merge_adapter: Annotated[
        Path | None, typer.Option(help="A LoRA folder to add to the model, such as `hesse repair` writes.")
    ] = None,
    data: DataOption = None,
    samples: AllSamplesOption = None,
    length: LengthOption = None,
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure loss, perplexity and size of a model, and its divergence from the dense one."""
    from hesse.reporting import evaluation_table

    with progress_bars(as_json) as bars:
        result = hesse.evaluate(
            model,
            reference=reference,
            merge_adapter=merge_adapter,
            data=data,
            samples=samples,
            length=length,
            batch_size=batch_size,
            device=device,
            progress=bars,
        ).report
    print_report(result, evaluation_table, as_json)


def estimate(
    model: ModelArgument,
    out: OutArgument,
    data: DataOption = None,
    curvature: CurvatureOption = "gram",
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
    """Estimate a model's curvature once, to try many methods with it (--statistics of compress and inspect)."""
    from hesse.reporting import estimate_summary

    with progress_bars(as_json) as bars:
        report = hesse.estimate(
            model,
            out,
            curvatures=[kind.strip() for kind in curvature.split(",")],
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
    print_report(report, estimate_summary, as_json)
