"""Other runtimes: export to them and measure them."""

from collections.abc import Sequence
from pathlib import Path

from hesse.api.options import at_least
from hesse.checkpoints.locate import locate
from hesse.progress import Progress, Silence
from hesse.runtimes.benchmark import benchmark_checkpoint
from hesse.runtimes.benchmark_result import Benchmark
from hesse.runtimes.export import export_checkpoint
from hesse.runtimes.export_report import ExportReport
from hesse.runtimes.programs import RUNTIMES
from hesse.version import __version__


def export(
    model: str | Path,
    out: str | Path,
    *,
    to: str = "gguf",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a model for another runtime, with the codes and scales of its layers as they are.

    Args:
        model: a model folder, `default`, or a hub id; dense, or as `compress` and llm-compressor write it.
        out: the file (gguf) or folder (onnx, torchao) to write; it must not exist unless `overwrite`.
        to: `gguf` for llama.cpp, `onnx` for onnxruntime, `torchao` for transformers with torchao.
        overwrite: whether a file or an exported folder at `out` may be replaced.
        progress: told how far the run is.

    Returns:
        How each layer is stored, and every departure from the checkpoint: scales that are rounded, by how much, and
        layers whose codes no type of the target holds.

    Raises:
        HesseError: one of its kinds names what is wrong and what to do; nothing is left at `out` then.
    """
    return export_checkpoint(
        locate(model),
        Path(out),
        to,
        overwrite=overwrite,
        progress=progress or Silence(),
        name=str(model),
        version=__version__,
    )


def benchmark(
    model: str | Path,
    *,
    reference: str | Path | None = None,
    runtimes: Sequence[str] = tuple(RUNTIMES),
    prompt: int = 128,
    generate: int = 64,
    threads: int | None = None,
    repeats: int = 3,
    progress: Progress | None = None,
) -> Benchmark:
    """Measure how fast a model loads, reads a prompt and decodes in each runtime on this machine, and its memory.

    Each measurement is a process of its own; models take turns. What a runtime needs is exported to a temporary folder
    first, and the export is not part of the time.

    Args:
        model: a model folder, `default`, or a hub id; dense or compressed.
        reference: the dense model to measure beside it.
        runtimes: of `transformers`, `llama.cpp`, `onnxruntime`, `torchao`; those not installed are listed as missing.
        prompt: tokens of the prompt.
        generate: tokens to decode, one by one.
        threads: of each runtime; None for as many as there are processors.
        repeats: processes for each measurement.
        progress: told how far the run is.

    Returns:
        Medians and spreads, and the divergence of each runtime from the same checkpoint in transformers.

    Raises:
        HesseError: one of its kinds names what is wrong and what to do.
    """
    for option, value in (
        ("--prompt", prompt),
        ("--generate", generate),
        ("--repeats", repeats),
        ("--threads", threads),
    ):
        at_least(option, value, 1)
    return benchmark_checkpoint(
        locate(model),
        None if reference is None else locate(reference),
        list(runtimes),
        prompt=prompt,
        generate=generate,
        threads=threads,
        repeats=repeats,
        progress=progress or Silence(),
        names=(str(model), None if reference is None else str(reference)),
        version=__version__,
    )
