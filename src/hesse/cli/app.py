"""The commands: parse, call, print."""

import json
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hesse.cli.progress import Bars
from hesse.errors import HesseError, OptionError
from hesse.methods import DEFAULT_METHOD, METHODS, Options, Recipe, find_method, load_recipe
from hesse.reporting import (
    check_page,
    compression_page,
    compression_summary,
    cost_table,
    evaluation_table,
    inspection_page,
    inspection_summary,
    methods_table,
    write_page,
)
from hesse.version import __version__

app = typer.Typer(
    name="hesse",
    help="Compress a trained network with second-order information, and say what it cost.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
out_console = Console()
error_console = Console(stderr=True)

ModelArgument = Annotated[str, typer.Argument(help="A model folder, `default`, or a hub id such as owner/name.")]
DataOption = Annotated[
    str | None,
    typer.Option(
        help="Text: .txt, .jsonl with `text` or `input_ids`, .parquet, or a datasets id. The shipped text if absent."
    ),
]
LengthOption = Annotated[
    int | None, typer.Option(help="Tokens a sample; 2048, or as many as the model has positions for, if absent.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
BatchOption = Annotated[int | None, typer.Option(help="Samples that go through the model together.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else.")]


class _Interrupted(Exception):
    """Ctrl-C, or a signal to end, after everything has been tidied up."""


def _print_version(wanted: bool) -> None:
    if wanted:
        out_console.print(f"hesse {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: `hesse compress default tiny-4bit --bits 4 --group-size 64 --samples 64`")
def compress(
    model: ModelArgument,
    out: Annotated[Path | None, typer.Argument(help="The folder to write.")] = None,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")] = DEFAULT_METHOD,
    bits: Annotated[
        str | None, typer.Option(help="Bits a weight, 2 to 8; with a point, such as 3.2, a mean to be planned.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="Plan for a size: 40% of the dense weights, or 5MB.")] = None,
    loss: Annotated[float | None, typer.Option(help="Plan for a predicted loss, in nats per token.")] = None,
    target: Annotated[str | None, typer.Option(help="Only what transformers, vllm or any loader serves.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Columns that share a scale; -1 for one scale a row.")] = None,
    symmetric: Annotated[bool | None, typer.Option("--symmetric/--asymmetric", help="Grid around zero or not.")] = None,
    sparsity: Annotated[str | None, typer.Option(help="Share of zeros such as 0.5, or N kept of M: 2:4.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the two thin factors.")] = None,
    act_order: Annotated[
        bool | None, typer.Option("--act-order/--no-act-order", help="Solve columns by falling E[x²].")
    ] = None,
    damping: Annotated[float | None, typer.Option(help="Share of the Gram's mean eigenvalue added to it.")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Pattern of layers to leave alone; may be repeated.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="A YAML recipe in place of --method and its options.")] = None,
    print_recipe: Annotated[bool, typer.Option("--print-recipe", help="Print the recipe as YAML and stop.")] = False,
    data: DataOption = None,
    curvature: Annotated[
        Path | None, typer.Option(help="A folder that `hesse estimate` wrote, in place of calibration.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 128,
    length: LengthOption = None,
    seed: Annotated[int, typer.Option(help="Of the choice of samples and of sampled labels.")] = 0,
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    format: Annotated[str, typer.Option(help="auto, pack-quantized, dense or low-rank.")] = "auto",
    report: Annotated[
        Path | None, typer.Option(help="Also measure each layer and text, and write an HTML page to this file.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model folder OUT, and a report.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compress a model from disk to disk: quantise, prune or factorise it with a small calibration text."""
    mean_bits = _mean_bits(bits)
    options = Options(
        bits=_whole_bits(bits) if mean_bits is None else None,
        group_size=group_size,
        symmetric=symmetric,
        sparsity=sparsity,
        rank=rank,
        act_order=act_order,
        damping=damping,
    )
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
    from hesse import api

    settings: dict[str, Any] = {
        "data": data,
        "curvature": curvature,
        "samples": samples,
        "length": length,
        "seed": seed,
        "batch_size": batch_size,
        "device": device,
        "format": format,
        "target": target,
    }
    if planned:
        settings |= {"method": method, "options": options, "ignore": tuple(ignore or ())}
        settings |= {"size": size, "mean_bits": mean_bits, "loss": loss}
    with progress_bars(as_json) as bars:
        if print_recipe or out is None:
            sys.stdout.write(api.plan(model, **settings, progress=bars).recipe.to_yaml())
            return
        measured = report is not None
        result = api.compress(
            model, out, recipe=chosen, **settings, overwrite=overwrite, measure=measured, progress=bars
        )
    if report is not None:
        write_page(report, compression_page(result, shlex.join(["hesse", *sys.argv[1:]])))
    if as_json:
        print_json(result.to_dict())
        return
    out_console.print(compression_summary(result))
    if report is not None:
        out_console.print(f"The report: {report.absolute()}", soft_wrap=True, highlight=False)


@app.command(epilog="Example: `hesse estimate default statistics --samples 64`")
def estimate(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    data: DataOption = None,
    curvature: Annotated[str, typer.Option(help="What to estimate: gram, kronecker, fisher, with commas.")] = "gram",
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 128,
    length: LengthOption = None,
    seed: Annotated[int, typer.Option(help="Of the choice of samples and of sampled labels.")] = 0,
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the statistics in OUT.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Estimate a model's curvature once, for `hesse compress --curvature` to try any number of schemes with."""
    from hesse import api

    with progress_bars(as_json) as bars:
        content = api.estimate(
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
            progress=bars,
        )
    if as_json:
        print_json(content)
        return
    held = ", ".join(f"{kind} of {len(layers)} layers" for kind, layers in content["curvatures"].items())
    out_console.print(f"{held} from {content['tokens']:,} tokens: {out.absolute()}", soft_wrap=True, highlight=False)
    command = "compress {} OUT" if "gram" in content["curvatures"] else "inspect {}"
    out_console.print(f"Next: hesse {command.format(model)} --curvature {out}", soft_wrap=True, highlight=False)


@app.command(epilog="Example: `hesse evaluate tiny-4bit --reference default`")
def evaluate(
    model: ModelArgument,
    reference: Annotated[str | None, typer.Option(help="The dense model to compare with.")] = None,
    data: DataOption = None,
    samples: Annotated[int | None, typer.Option(help="Windows of text, from the first on; all if absent.")] = None,
    length: LengthOption = None,
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Loss, perplexity and size of a model, and its divergence from the dense one."""
    from hesse import api

    with progress_bars(as_json) as bars:
        result = api.evaluate(
            model,
            reference=reference,
            data=data,
            samples=samples,
            length=length,
            batch_size=batch_size,
            device=device,
            progress=bars,
        )
    if as_json:
        print_json(result.to_dict())
    else:
        out_console.print(evaluation_table(result, model))


@app.command(epilog="Example: `hesse inspect default --out report.html`")
def inspect(
    model: ModelArgument,
    data: DataOption = None,
    curvature: Annotated[Path | None, typer.Option(help="A folder of `hesse estimate`, to predict from.")] = None,
    samples: Annotated[int, typer.Option(help="Windows of text.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens a window.")] = 256,
    seed: Annotated[int, typer.Option(help="Of samples, sampled labels and random vectors.")] = 0,
    device: DeviceOption = "auto",
    out: Annotated[Path | None, typer.Option(help="Also write an HTML page with plots to this file.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file OUT.")] = False,
    as_json: JsonOption = False,
) -> None:
    """What the loss looks like around a model, layer by layer, and which curvature predicts it."""
    from hesse import api

    if out is not None:
        check_page(out, overwrite, "--out")
    with progress_bars(as_json) as bars:
        result = api.inspect(
            model,
            data=data,
            curvature=curvature,
            samples=samples,
            length=length,
            seed=seed,
            device=device,
            progress=bars,
        )
    if out is not None:
        write_page(out, inspection_page(result))
    if as_json:
        print_json(result.to_dict())
        return
    out_console.print(inspection_summary(result))
    if out is not None:
        out_console.print(f"The page: {out.absolute()}", soft_wrap=True, highlight=False)


@app.command(epilog="Example: `hesse methods`")
def methods(as_json: JsonOption = False) -> None:
    """The table of methods: curvature × constraint × solver, with source and needs."""
    if as_json:
        rows = [
            {
                "method": m.name,
                "curvature": m.curvature,
                "constraint": list(m.constraints),
                "optional": list(m.optional),
                "solver": m.solver,
                "needs": m.needs,
                "source": m.source,
            }
            for m in METHODS.values()
        ]
        print_json(rows)
    else:
        out_console.print(methods_table())


@app.command(epilog="Example: `hesse demo`")
def demo(
    out: Annotated[Path, typer.Argument(help="The folder to write; replaced if it is a model folder.")] = Path(
        "default-4bit"
    ),
) -> None:
    """Compress the shipped model to 4 bits, and show what it cost on text that neither training nor calibration saw."""
    from hesse import api

    with progress_bars(False) as bars:
        report = api.compress("default", out, options=Options(bits=4, group_size=64), overwrite=True, progress=bars)
        after = api.evaluate(out, reference="default", progress=bars)
        before = api.evaluate("default", progress=bars)
    out_console.print(cost_table(report, before, after))
    out_console.print(f"The compressed checkpoint: {out.absolute()}", soft_wrap=True, highlight=False)
    out_console.print(
        "It loads in transformers: "
        f'AutoModelForCausalLM.from_pretrained("{out}")  (pip install transformers compressed-tensors)',
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    out_console.print(
        "Next, your own model: hesse compress MODEL_FOLDER OUT --bits 4 --group-size 128 --data TEXT_FILE",
        soft_wrap=True,
        highlight=False,
    )


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
        return find_method(method).recipe(options, ignore)
    if options != Options() or ignore or method != DEFAULT_METHOD:
        raise OptionError("--recipe says everything itself: leave out --method, its options and --ignore")
    return load_recipe(path)


@contextmanager
def progress_bars(quiet: bool) -> Iterator[Bars]:
    try:
        with Bars(Console(stderr=True, quiet=quiet)) as bars:
            yield bars
    except KeyboardInterrupt:
        raise _Interrupted from None


def print_json(content: Any) -> None:
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


def _terminate(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line; errors of ours are one line, and the exit code is not 0."""
    signal.signal(signal.SIGTERM, _terminate)  # so that a killed run also tidies up
    try:
        app()
    except HesseError as error:
        error_console.print(f"Error: {error}", style="red", soft_wrap=True, markup=False, highlight=False)
        sys.exit(2 if isinstance(error, OptionError) else 1)
    except _Interrupted:
        error_console.print("Interrupted: nothing was written.", style="red")
        sys.exit(130)
