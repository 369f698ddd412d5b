"""The commands about other runtimes: export to them, and measure them."""

from pathlib import Path
from typing import Annotated

import typer

from hesse.cli.app import app, out_console, print_json, progress_bars
from hesse.cli.options import JsonOption, ModelArgument, ReferenceOption


@app.command(epilog="Example: `hesse export tiny-4bit tiny-4bit.gguf --to gguf`")
def export(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(help="The file (gguf) or folder (onnx, torchao) to write.")],
    to: Annotated[str, typer.Option(help="gguf, onnx or torchao.")] = "gguf",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write what llama.cpp, onnxruntime or torchao take, with the codes and scales of the checkpoint as they are."""
    import hesse
    from hesse.reporting.runtimes import export_summary

    with progress_bars(as_json) as bars:
        report = hesse.export(model, out, to=to, overwrite=overwrite, progress=bars)
    if as_json:
        print_json(report.to_dict())
    else:
        out_console.print(export_summary(report))


@app.command(epilog="Example: `hesse benchmark tiny-4bit --reference default`")
def benchmark(
    model: ModelArgument,
    reference: ReferenceOption = None,
    runtimes: Annotated[str, typer.Option(help="Runtimes to measure in, with commas.")] = (
        "transformers,llama.cpp,onnxruntime,torchao"
    ),
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 128,
    generate: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    threads: Annotated[int | None, typer.Option(help="Threads; as many as there are processors if absent.")] = None,
    repeats: Annotated[int, typer.Option(help="Processes for each measurement.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Load time, tokens a second and memory of a model in each runtime on this machine, beside the dense one."""
    import hesse
    from hesse.reporting.runtimes import benchmark_summary

    with progress_bars(as_json) as bars:
        result = hesse.benchmark(
            model,
            reference=reference,
            runtimes=[runtime.strip() for runtime in runtimes.split(",")],
            prompt=prompt,
            generate=generate,
            threads=threads,
            repeats=repeats,
            progress=bars,
        )
    if as_json:
        print_json(result.to_dict())
    else:
        out_console.print(benchmark_summary(result))
