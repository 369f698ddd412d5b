"""The commands that look: evaluate, inspect, methods and demo."""

from pathlib import Path
from typing import Annotated

import typer

from hesse.cli.app import app, out_console, print_json, print_line, progress_bars
from hesse.cli.options import (
    BatchOption,
    DataOption,
    DeviceOption,
    JsonOption,
    LengthOption,
    ModelArgument,
    ReferenceOption,
)
from hesse.methods import METHODS, Options, find_methods
from hesse.reporting import (
    check_page,
    cost_table,
    evaluation_table,
    inspection_page,
    inspection_summary,
    methods_table,
    options_table,
    write_page,
)
from hesse.result import ForecastReport


@app.command(epilog="Example: `hesse evaluate tiny-4bit --reference default`")
def evaluate(
    model: ModelArgument,
    reference: ReferenceOption = None,
    adapter: Annotated[Path | None, typer.Option(help="A LoRA folder, such as `hesse repair` writes, to add.")] = None,
    data: DataOption = None,
    samples: Annotated[int | None, typer.Option(help="Windows of text, from the first on; all if absent.")] = None,
    length: LengthOption = None,
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Loss, perplexity and size of a model, and its divergence from the dense one."""
    import hesse

    with progress_bars(as_json) as bars:
        result = hesse.evaluate(
            model,
            reference=reference,
            adapter=adapter,
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
    statistics: Annotated[Path | None, typer.Option(help="A folder of `hesse estimate`, to predict from.")] = None,
    samples: Annotated[int, typer.Option(help="Windows of text.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens a window.")] = 256,
    seed: Annotated[int, typer.Option(help="Of samples, sampled labels and random vectors.")] = 0,
    device: DeviceOption = "auto",
    out: Annotated[Path | None, typer.Option(help="Also write an HTML page with plots to this file.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file OUT.")] = False,
    as_json: JsonOption = False,
) -> None:
    """What the loss looks like around a model, layer by layer, and which curvature predicts it."""
    import hesse

    if out is not None:
        check_page(out, overwrite, "--out")
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
        )
    if out is not None:
        write_page(out, inspection_page(result))
    if as_json:
        print_json(result.to_dict())
        return
    out_console.print(inspection_summary(result))
    if out is not None:
        print_line(f"The page: {out.absolute()}")


@app.command(epilog="Example: `hesse methods pruning`")
def methods(
    names: Annotated[
        list[str] | None, typer.Argument(help="Families or methods to show; all by default.", metavar="[NAME]...")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Print the table of methods: curvature × constraint × solver, with source and needs; of one method its options."""
    families = find_methods(names or ())
    if as_json:
        rows = [method.to_dict() for methods_of_it in families.values() for method in methods_of_it]
        print_json(rows)
    else:
        out_console.print(methods_table(families))
        for method in (METHODS[name] for name in dict.fromkeys(names or ()) if name in METHODS):
            out_console.print(options_table(method))


@app.command(epilog="Example: `hesse demo`")
def demo(
    out: Annotated[Path, typer.Argument(help="The folder to write; replaced if it is a model folder.")] = Path(
        "default-4bit"
    ),
) -> None:
    """Compress the shipped model to 4 bits, and show what it cost on text that neither training nor calibration saw."""
    import hesse

    with progress_bars(False) as bars:
        options = Options(bits=4, group_size=64)
        report = hesse.compress("default", out, options=options, overwrite=True, progress=bars).report
        after = hesse.evaluate(out, reference="default", progress=bars)
        before = hesse.evaluate("default", progress=bars)
    if not isinstance(report, ForecastReport):
        out_console.print(cost_table(report, before, after))
    print_line(f"The compressed checkpoint: {out.absolute()}")
    print_line(
        "It loads in transformers: "
        f'AutoModelForCausalLM.from_pretrained("{out}")  (pip install transformers compressed-tensors)'
    )
    print_line("Next, your own model: hesse compress MODEL_FOLDER OUT --bits 4 --group-size 128 --data TEXT_FILE")
