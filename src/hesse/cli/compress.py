"""The commands that change a model, or prepare for it: compress and estimate."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hesse.cli.app import app, out_console, print_forecast, print_json, print_line, progress_bars
from hesse.cli.options import (
    BatchOption,
    DataOption,
    DeviceOption,
    DryRunOption,
    IgnoreOption,
    JsonOption,
    LengthOption,
    ModelArgument,
    OutArgument,
    RestartOption,
    SamplesOption,
    SeedOption,
)
from hesse.errors import OptionError
from hesse.methods import DEFAULT_METHOD, Options, Recipe, find_method, load_recipe, methods_of, parse_settings
from hesse.reporting import check_page, compression_page, compression_summary, write_page
from hesse.result import ForecastReport


@app.command(epilog="Example: `hesse compress default tiny-4bit --bits 4 --group-size 64 --samples 64`")
def compress(
    model: ModelArgument,
    out: Annotated[Path | None, typer.Argument(help="The folder to write.")] = None,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(methods_of('compress'))}.")] = DEFAULT_METHOD,
    bits: Annotated[
        str | None, typer.Option(help="Bits a weight, 2 to 8; with a point, such as 3.2, a mean to be planned.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="Plan for a size: 40% of the dense weights, or 5MB.")] = None,
    loss: Annotated[float | None, typer.Option(help="Plan for a predicted loss, in nats per token.")] = None,
    target: Annotated[str | None, typer.Option(help="Only what transformers, vllm or any loader serves.")] = None,
    allocation: Annotated[
        str | None, typer.Option(help="Price a budget's choices by hawq or hawq-v2, without solving each.")
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="Columns that share a scale; -1 for one scale a row.")] = None,
    symmetric: Annotated[bool | None, typer.Option("--symmetric/--asymmetric", help="Grid around zero or not.")] = None,
    signed: Annotated[
        bool | None, typer.Option("--signed/--unsigned", help="Let a symmetric grid's scales be negative or not.")
    ] = None,
    sparsity: Annotated[str | None, typer.Option(help="Share of zeros such as 0.5, or N kept of M: 2:4.")] = None,
    scope: Annotated[
        str | None, typer.Option(help="Where a share of zeros is counted: layer, row, global or lamp.")
    ] = None,
    block: Annotated[int | None, typer.Option(help="Neighbours in a row that are zero together, such as 4.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the two thin factors.")] = None,
    act_order: Annotated[
        bool | None, typer.Option("--act-order/--no-act-order", help="Solve columns by falling E[x²].")
    ] = None,
    damping: Annotated[float | None, typer.Option(help="Share of the Gram's mean eigenvalue added to it.")] = None,
    input_bits: Annotated[
        int | None, typer.Option(help="Bits that a loader rounds each token's inputs to, 2 to 8; not at all if absent.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any other option that `hesse methods METHOD` lists, such as headroom=0.5; may be repeated.",
        ),
    ] = None,
    ignore: IgnoreOption = None,
    recipe: Annotated[Path | None, typer.Option(help="A YAML recipe in place of --method and its options.")] = None,
    print_recipe: Annotated[bool, typer.Option("--print-recipe", help="Print the recipe as YAML and stop.")] = False,
    data: DataOption = None,
    statistics: Annotated[
        Path | None, typer.Option(help="A folder that `hesse estimate` wrote, in place of calibration.")
    ] = None,
    samples: SamplesOption = 128,
    length: LengthOption = None,
    seed: SeedOption = 0,
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    format: Annotated[str, typer.Option(help="auto, pack-quantized, int-quantized, dense or low-rank.")] = "auto",
    report: Annotated[
        Path | None, typer.Option(help="Also measure each layer and text, and write an HTML page to this file.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model folder OUT, and a report.")] = False,
    restart: RestartOption = False,
    dry_run: DryRunOption = False,
    memory: Annotated[str | None, typer.Option(help="The most memory to take, such as 8GiB.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compress a model from disk to disk: quantise, prune or factorise it with a small calibration text."""
    mean_bits = _mean_bits(bits)
    options = Options(
        bits=_whole_bits(bits) if mean_bits is None else None,
        group_size=group_size,
        symmetric=symmetric,
        signed=signed,
        sparsity=sparsity,
        scope=scope,
        block=block,
        rank=rank,
        act_order=act_order,
        damping=damping,
        input_bits=input_bits,
    )
    options = parse_settings(setting or ()).over(options)
    planned = any(budget is not None for budget in (size, mean_bits, loss))
    if planned and recipe is not None:
        raise OptionError("--recipe says everything itself: leave out --size, --loss and a mean of --bits")
    chosen = None if planned else _recipe(recipe, method, options, tuple(ignore or ()))
    if print_recipe and chosen is not None:
        sys.stdout.write(chosen.to_yaml())
        return
    if out is None and not print_recipe:
        raise OptionError("OUT is missing: give the folder to write, as in `hesse compress MODEL OUT`")
    if report is not None:
        check_page(report, overwrite, "--report", made=out)
    import hesse
    from hesse.processes import is_main_process

    settings: dict[str, Any] = {
        "data": data,
        "statistics": statistics,
        "samples": samples,
        "length": length,
        "seed": seed,
        "batch_size": batch_size,
        "device": device,
        "format": format,
        "target": target,
        "allocation": allocation,
    }
    if planned:
        settings |= {"method": method, "options": options, "ignore": tuple(ignore or ())}
        settings |= {"size": size, "mean_bits": mean_bits, "loss": loss}
    leads = is_main_process()
    with progress_bars(as_json or not leads) as bars:
        if print_recipe or out is None:
            sys.stdout.write(hesse.plan(model, **settings, progress=bars).recipe.to_yaml())
            return
        settings |= {"overwrite": overwrite, "restart": restart, "dry_run": dry_run}
        settings |= {"memory": memory, "measure": report is not None}
        result = hesse.compress(model, out, recipe=chosen, **settings, progress=bars).report
    if not leads:
        return
    if isinstance(result, ForecastReport):
        print_forecast(result, as_json)
        return
    if report is not None:
        write_page(report, compression_page(result, shlex.join(["hesse", *sys.argv[1:]])))
    if as_json:
        print_json(result.to_dict())
        return
    out_console.print(compression_summary(result))
    if report is not None:
        print_line(f"The report: {report.absolute()}")


@app.command(epilog="Example: `hesse estimate default statistics --samples 64`")
def estimate(
    model: ModelArgument,
    out: OutArgument,
    data: DataOption = None,
    curvature: Annotated[str, typer.Option(help="What to estimate: gram, kronecker, fisher, with commas.")] = "gram",
    samples: SamplesOption = 128,
    length: LengthOption = None,
    seed: SeedOption = 0,
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the statistics in OUT.")] = False,
    restart: RestartOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Estimate a model's curvature once, for `hesse compress --statistics` to try any number of schemes with."""
    import hesse

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
    if isinstance(report, ForecastReport):
        print_forecast(report, as_json)
        return
    if as_json:
        print_json(report.to_dict())
        return
    held = ", ".join(f"{kind} of {len(layers)} layers" for kind, layers in report.curvatures.items())
    print_line(f"{held} from {report.tokens:,} tokens: {out.absolute()}")
    command = "compress {} OUT" if "gram" in report.curvatures else "inspect {}"
    print_line(f"Next: hesse {command.format(model)} --statistics {out}")


def _mean_bits(text: str | None) -> float | None:
    """Bits with a point, which are a mean over layers."""
    try:
        return float(text) if text is not None and "." in text else None
    except ValueError:
        return None


def _whole_bits(text: str | None) -> int | None:
    try:
        return None if text is None else int(text)
    except ValueError:
        raise OptionError(
            f"--bits is {text!r}: give whole bits such as 4, or a mean to be planned such as 3.2"
        ) from None


def _recipe(path: Path | None, method: str, options: Options, ignore: tuple[str, ...]) -> Recipe:
    if path is None:
        return find_method(method, "compress").recipe(options, ignore)
    if options != Options() or ignore or method != DEFAULT_METHOD:
        raise OptionError("--recipe says everything itself: leave out --method, its options and --ignore")
    return load_recipe(path)
