"""The commands that look at a model: demo, methods, inspect, evaluate and estimate."""

from pathlib import Path
from typing import Annotated, Any

import typer

import hesse
from hesse.cli.options import (
    AS_JSON,
    BATCH_SIZE,
    BOS,
    CALIBRATE,
    CALIBRATION,
    DATA,
    DEVICE,
    LENGTH,
    OVERWRITE,
    REPORT,
    SEED,
    STATISTICS,
    WRITE,
    CurvatureOption,
    ModelArgument,
    OutArgument,
    ReferenceOption,
    length,
    samples,
    with_options,
)
from hesse.cli.terminal import out_console, print_json, print_line, print_report, progress_bars, run_and_print
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


@with_options(AS_JSON)
def methods(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Families or methods to show.", metavar="[NAME]...", show_default="all"),
    ] = None,
    *,
    as_json: bool,
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


@with_options(DATA, STATISTICS, samples(4), length(256), BOS, SEED, DEVICE, REPORT, OVERWRITE, AS_JSON)
def inspect(model: ModelArgument, *, report: Path | None, overwrite: bool, as_json: bool, **shared: Any) -> None:
    """Show the loss around a model layer by layer, and which curvature predicts its changes best."""
    from hesse.reporting import check_page, inspection_page, inspection_summary, write_page

    if report is not None:
        check_page(report, overwrite, "--report")
    with progress_bars(as_json) as bars:
        result = hesse.inspect(model, **shared, progress=bars).report
    if report is not None:
        write_page(report, inspection_page(result))
    print_report(result, inspection_summary, as_json, report)


@with_options(DATA, samples(None, "all"), LENGTH, BOS, BATCH_SIZE, DEVICE, AS_JSON)
def evaluate(
    model: ModelArgument,
    reference: ReferenceOption = None,
    merge_adapter: Annotated[
        Path | None, typer.Option(help="A LoRA folder to add to the model, such as `hesse repair` writes.")
    ] = None,
    standard: Annotated[
        str | None,
        typer.Option(
            help="Perplexity as papers print it: wikitext, from --data FILE of the test split or the local cache.",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks of lm-evaluation-harness, with commas: names, or YAML files; their data must be local.",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    **shared: Any,
) -> None:
    """Measure loss, perplexity and size of a model, and its divergence from the dense one."""
    from hesse.reporting import evaluation_summary

    names = tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
    own: dict[str, Any] = {"merge_adapter": merge_adapter, "standard": standard, "tasks": names}
    run_and_print(hesse.evaluate, evaluation_summary, model, reference=reference, **own, **shared)


@with_options(*CALIBRATE, *WRITE)
def estimate(model: ModelArgument, out: OutArgument, curvature: CurvatureOption = "gram", **shared: Any) -> None:
    """Estimate a model's curvature once, to try many methods with it (--statistics of compress and inspect)."""
    from hesse.reporting import estimate_summary

    kinds = [kind.strip() for kind in curvature.split(",")]
    run_and_print(hesse.estimate, estimate_summary, model, out, curvatures=kinds, **shared)
