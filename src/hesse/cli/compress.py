"""The command compress."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import hesse
from hesse.cli.options import (
    CALIBRATE,
    DATA,
    MEMORY,
    METHOD_OPTIONS,
    REPORT,
    SETTING,
    SMALLER,
    STATISTICS,
    WRITE,
    AnyOutArgument,
    IgnoreOption,
    LossOption,
    ModelArgument,
    output_format,
    with_options,
)
from hesse.cli.terminal import print_report, progress_bars
from hesse.errors import OptionError
from hesse.options import Options, parse_settings
from hesse.result import ForecastReport

if TYPE_CHECKING:
    from hesse.methods import Recipe


@with_options(
    *(option for name, option in METHOD_OPTIONS.items() if name != "bits"),
    SETTING,
    DATA,
    STATISTICS,
    *CALIBRATE[1:],
    MEMORY,
    output_format("auto"),
    REPORT,
    *WRITE,
)
def compress(
    model: ModelArgument,
    out: AnyOutArgument = None,
    *,
    method: Annotated[str | None, typer.Option(help="A row of `hesse methods`.", show_default="kronecker")] = None,
    bits: Annotated[
        str | None,
        typer.Option(
            help="Bits per weight, 2 to 8; a mean to plan for if it has a point, such as 3.2.",
            rich_help_panel=SMALLER,
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Size to reach: a share of the dense bytes such as 40%, or a size such as 5MB.",
            rich_help_panel=SMALLER,
        ),
    ] = None,
    loss: LossOption = None,
    target: Annotated[
        str | None,
        typer.Option(help="Use only what this program loads: transformers, vllm, or any.", rich_help_panel=SMALLER),
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            help="Predict the costs of a plan by hawq or hawq-v2, instead of solving each choice.",
            rich_help_panel=SMALLER,
        ),
    ] = None,
    ignore: IgnoreOption = None,
    recipe: Annotated[Path | None, typer.Option(help="A YAML recipe instead of --method and its options.")] = None,
    print_recipe: Annotated[bool, typer.Option("--print-recipe", help="Print the recipe as YAML and stop.")] = False,
    setting: list[str] | None,
    report: Path | None,
    overwrite: bool,
    restart: bool,
    dry_run: bool,
    memory: str | None,
    as_json: bool,
    **shared: Any,
) -> None:
    """Compress a model on disk: quantize, prune or factorize its layers, calibrated on a small text."""
    from hesse.processes import is_main_process
    from hesse.reporting import check_page, compression_page, compression_summary, write_page

    whole_bits, mean_bits = _parse_bits(bits)
    given = {name: shared.pop(name) for name in METHOD_OPTIONS if name in shared}
    options = parse_settings(setting or ()).over(Options(bits=whole_bits, **given))
    patterns = tuple(ignore or ())
    planned = any(budget is not None for budget in (size, mean_bits, loss))
    if planned and recipe is not None:
        raise OptionError("--recipe says everything itself: leave out --size, --loss and a mean of --bits")
    chosen = None if planned else _recipe(recipe, method, options, patterns)
    if print_recipe and chosen is not None:
        sys.stdout.write(chosen.to_yaml())
        return
    if out is None and not print_recipe:
        raise OptionError("OUT is missing: give the folder to write, as in `hesse compress MODEL OUT`")
    if report is not None:
        check_page(report, overwrite, "--report", made=out)
    shared.update(target=target, allocation=allocation, size=size, mean_bits=mean_bits, loss=loss)
    if planned:
        shared.update(options=None if options == Options() else options, ignore=patterns)
        shared.update({} if method is None else {"method": method})
    main = is_main_process()
    with progress_bars(as_json or not main) as bars:
        if print_recipe or out is None:
            sys.stdout.write(hesse.plan(model, **shared, progress=bars).report.recipe.to_yaml())
            return
        result = hesse.compress(
            model,
            out,
            recipe=chosen,
            **shared,
            overwrite=overwrite,
            restart=restart,
            dry_run=dry_run,
            memory=memory,
            measure=report is not None,
            progress=bars,
        ).report
    if not main:
        return
    if report is not None and not isinstance(result, ForecastReport):
        write_page(report, compression_page(result, shlex.join(["hesse", *sys.argv[1:]])))
    print_report(result, compression_summary, as_json, report)


def _parse_bits(text: str | None) -> tuple[int | None, float | None]:
    """Return whole bits, or else bits with a point, which are a mean over layers."""
    if text is None:
        return None, None
    try:
        return (None, float(text)) if "." in text else (int(text), None)
    except ValueError:
        raise OptionError(
            f"--bits is {text!r}: give whole bits such as 4, or a mean to be planned such as 3.2"
        ) from None


def _recipe(path: Path | None, method: str | None, options: Options, ignore: tuple[str, ...]) -> "Recipe":
    from hesse.methods import DEFAULT_METHOD, find_method, load_recipe

    if path is None:
        return find_method(method or DEFAULT_METHOD, "compress").recipe(options, ignore)
    if options != Options() or ignore or method is not None:
        raise OptionError("--recipe says everything itself: leave out --method, its options and --ignore")
    return load_recipe(path)
