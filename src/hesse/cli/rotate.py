"""The command rotate."""

from typing import Annotated, Any

import typer

import hesse
from hesse.cli.options import CALIBRATE, WRITE, ModelArgument, OutArgument, with_options
from hesse.cli.terminal import run_and_print


@with_options(*CALIBRATE, *WRITE)
def rotate(
    model: ModelArgument,
    out: OutArgument,
    kind: Annotated[str, typer.Option(help="Rotation: hadamard (random) or kurtail (learned).")] = "hadamard",
    **shared: Any,
) -> None:
    """Rotate a model to remove outliers without changing its function, before it is rounded."""
    from hesse.reporting import rotation_summary

    run_and_print(hesse.rotate, rotation_summary, model, out, kind=kind, **shared)
