"""The commands about other runtimes: export and benchmark."""

from pathlib import Path
from typing import Annotated, Any

import typer

import hesse
from hesse.cli.options import AS_JSON, OVERWRITE, ModelArgument, ReferenceOption, with_options
from hesse.cli.terminal import run_and_print


@with_options(OVERWRITE, AS_JSON)
def export(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(help="The file (gguf) or folder (onnx, torchao) to write.")],
    to: Annotated[str, typer.Option(help="Form to write: gguf, onnx or torchao.")] = "gguf",
    **shared: Any,
) -> None:
    """Write a model for llama.cpp, onnxruntime or torchao, with the checkpoint's own codes and scales."""
    from hesse.reporting.runtimes import export_summary

    run_and_print(hesse.export, export_summary, model, out, to=to, **shared)


@with_options(AS_JSON)
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
    **shared: Any,
) -> None:
    """Measure load time, speed and memory of a model and its dense original in each runtime on this machine."""
    from hesse.reporting.runtimes import benchmark_summary

    run_and_print(
        hesse.benchmark,
        benchmark_summary,
        model,
        reference=reference,
        runtimes=[runtime.strip() for runtime in runtimes.split(",")],
        prompt=prompt,
        generate=generate,
        threads=threads,
        repeats=repeats,
        **shared,
    )
