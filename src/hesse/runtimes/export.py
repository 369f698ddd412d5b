"""Export a checkpoint for another runtime, with its codes and scales unchanged where the target allows."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version as package_version
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.checkpoints.files import unfinished_file
from hesse.checkpoints.locate import locate
from hesse.checkpoints.output import check_output, temporary_folder
from hesse.checkpoints.writer import disk_reason
from hesse.errors import OptionError, OutputError, UnsupportedModelError, reason
from hesse.formats import open_checkpoint
from hesse.progress import Progress, Silence
from hesse.result import Result
from hesse.runtimes.export_report import ExportedLayer, ExportedTensors, ExportReport
from hesse.version import __version__

MALFORMED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
Writer = Callable[[Checkpoint, Path, str, Progress], ExportedTensors]


@dataclass(frozen=True)
class ExportTarget:
    """A file format of another runtime, to export to."""

    packages: tuple[str, ...]  # needed to write it
    install: str
    is_file: bool  # OUT is one file, not a folder
    writer: str  # "module:function", imported late: it needs the packages


EXPORT_TARGETS = {
    "gguf": ExportTarget(("gguf",), "pip install 'hesse[gguf]'", True, "hesse.runtimes.gguf_file:write_gguf"),
    "onnx": ExportTarget(("onnx",), "pip install 'hesse[onnx]'", False, "hesse.runtimes.onnx_folder:write_onnx"),
    "torchao": ExportTarget(
        ("torchao",), "pip install 'hesse[torchao]'", False, "hesse.runtimes.torchao_folder:write_torchao"
    ),
}


def export(
    model: str | Path,
    out: str | Path,
    *,
    to: str = "gguf",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Result[ExportReport]:
    """Write a model for another runtime, with the codes and scales of its layers.

    Args:
        model: a model folder, `default`, or a hub id; dense, or compressed by Hesse or llm-compressor.
        out: the file (gguf) or folder (onnx, torchao) to write; it must not exist unless `overwrite`.
        to: `gguf` for llama.cpp, `onnx` for onnxruntime, `torchao` for transformers with torchao.
        overwrite: replace an existing file or exported folder at `out`.
        progress: receives each phase and step.

    Returns:
        The storage type of each layer, and every difference from the checkpoint: the rounding error of scales, and
        layers whose codes no type of the target can hold.

    Raises:
        HesseError: the subclass and message say what is wrong and what to do; nothing is left at `out`.
    """
    report = export_checkpoint(
        locate(model),
        Path(out),
        to,
        overwrite=overwrite,
        progress=progress or Silence(),
        name=str(model),
        version=__version__,
    )
    return Result(report)


def export_checkpoint(
    model: Path, out: Path, target: str, *, overwrite: bool, progress: Progress, name: str, version: str
) -> ExportReport:
    """Export the model folder `model` to `out`, and read the files back; `name` is the model's name in the report.

    Raises:
        HesseError: the model, an option or the output is wrong; nothing is left at `out`.
    """
    started = time.perf_counter()
    chosen = find_target(target)
    checkpoint = open_checkpoint(model)
    writer: Writer = resolve_name(chosen.writer)
    if not chosen.is_file:
        check_output(out, model, overwrite)
    output = _new_file(out, overwrite) if chosen.is_file else temporary_folder(out, checkpoint.file_bytes)
    with output as path:
        try:
            written = writer(checkpoint, path, name, progress)
        except MALFORMED as error:  # a config or tokenizer has values of the wrong types
            raise UnsupportedModelError(f"{model} cannot be written as {target}: {reason(error)}") from error
        size = sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
    return ExportReport(
        verb="export",
        model=name,
        out=str(out),
        target=target,
        bytes_before=checkpoint.file_bytes,
        bytes_after=size,
        seconds={"total": time.perf_counter() - started},
        layers=written.layers,
        dense=written.dense,
        tensors_checked=written.tensors_checked,
        notes=[*written.notes, *_rounding_notes(written.layers), *_input_notes(checkpoint, target)],
        versions={"hesse": version} | {package: package_version(package) for package in chosen.packages},
    )


def find_target(name: str) -> ExportTarget:
    """Return the export target of that name.

    Raises:
        OptionError: there is no such target, or a package that it needs is not installed.
    """
    if name not in EXPORT_TARGETS:
        raise OptionError(f"there is no target {name!r} to export to; there are {', '.join(EXPORT_TARGETS)}")
    target = EXPORT_TARGETS[name]
    missing = [package for package in target.packages if find_spec(package) is None]
    if missing:
        raise OptionError(f"exporting to {name} needs {' and '.join(missing)}: {target.install}")
    return target


def _input_notes(checkpoint: Checkpoint, target: str) -> list[str]:
    """Return a sentence if loaders of the checkpoint would round inputs, which the target does not."""
    layers = [name.removesuffix(".weight") for name in checkpoint.names() if name.endswith(".weight")]
    count = sum(checkpoint.input_rounding(layer) is not None for layer in layers)
    return [f"{count} layers: inputs are not rounded in {target}, as transformers does for this model"] if count else []


def _rounding_notes(layers: list[ExportedLayer]) -> list[str]:
    """Return a sentence for each kind of difference between the exported layers and the checkpoint."""
    notes = []
    inexact = [layer for layer in layers if layer.scale_error]
    if inexact:
        worst = max(inexact, key=lambda layer: layer.scale_error)
        notes.append(
            f"{len(inexact)} layers: scales are rounded, by at most {worst.scale_error:.2g} of themselves "
            f"({worst.name})"
        )
    moved = [layer for layer in layers if layer.offset_error]
    if moved:
        worst = max(moved, key=lambda layer: layer.offset_error)
        notes.append(
            f"{len(moved)} layers: zero points times scales are rounded, by at most {worst.offset_error:.2g} steps of "
            f"their grids ({worst.name})"
        )
    unfit = [layer for layer in layers if not (layer.exact or layer.scale_error or layer.offset_error)]
    if unfit:
        notes.append(
            f"{len(unfit)} layers of {unfit[0].grid} are stored as {unfit[0].stored} values, because no type holds "
            f"their codes (first: {unfit[0].name})"
        )
    return notes


@contextmanager
def _new_file(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary file next to `out`; rename it to `out` at the end, or delete it after an error."""
    if out.is_symlink() or out.exists():
        if not overwrite:
            raise OutputError(f"OUT {out} exists: give another name, or --overwrite to replace it")
        if not out.is_file():
            raise OutputError(f"OUT {out} is not a file: give the name of a file to write")
    if not out.absolute().parent.is_dir():
        raise OutputError(f"the folder of {out} does not exist: make it first")
    try:
        with unfinished_file(out) as unfinished:
            yield unfinished
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {disk_reason(error)}") from None
