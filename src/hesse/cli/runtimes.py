"""The commands about other runtimes: export and benchmark."""

from pathlib import Path
from typing import Annotated

import typer

import hesse
from hesse.cli.options import JsonOption, ModelArgument, OverwriteOption, ReferenceOption
from hesse.cli.terminal import print_report, progress_bars


def export(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(help="The file (gguf) or folder (onnx, torchao) to write.")],
    to: Annotated[str, typer.Option(help="Form to write: gguf, onnx or torchao.")] = "gguf",
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a model for llama.cpp, onnxruntime or torchao, with the checkpoint's own codes and scales."""
    from hesse.reporting.runtimes import export_summary

    with progress_bars(as_json) as bars:
        report = hesse.export(model, out, to=to, overwrite=overwrite, progress=bars).report
    print_report(report, export_summary, as_json)


def benchmark(
    model: ModelArgument,
    reference: ReferenceOption = None,
    runtimes: Annotated[str, typer.Option(help="Runtimes to measure, with commas.")] = (
        "transformers,llama.cpp,onnxruntime,torchao"
    ),
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 128,
    generate: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    threads: Annotated[int | None, typer.Option(help="Threads per process.", show_default="all processors")] = None,
    repeats: Annotated[int, typer.Option(help="Processes per measurement.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Measure load time, speed and memory of a model and its dense original in each runtime on this machine."""
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
        ).report
    print_report(result, benchmark_summary, as_json)
