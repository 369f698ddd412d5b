"""The command repair."""

from typing import Annotated, Any

import typer

import hesse
from hesse.cli.options import (
    CALIBRATE,
    WRITE,
    CurvatureOption,
    IgnoreOption,
    ModelArgument,
    OutArgument,
    output_format,
    with_options,
)
from hesse.cli.terminal import run_and_print
from hesse.options import help_of


@with_options(output_format("adapter"), *CALIBRATE, *WRITE)
def repair(
    dense: ModelArgument,
    compressed: Annotated[str, typer.Argument(help="The compressed model, made by Hesse or by another program.")],
    out: OutArgument,
    rank: Annotated[int, typer.Option(help=help_of("rank"))] = 32,
    curvature: CurvatureOption = "gram",
    damping: Annotated[float, typer.Option(help=help_of("damping"))] = 0.01,
    ignore: IgnoreOption = None,
    **shared: Any,
) -> None:
    """Add to each layer of a compressed model the low rank that is nearest to its error, without training.

    The low rank minimizes the error in the layer's outputs with --curvature gram (EoRA), in the end loss with
    kronecker, and in the weights with identity (LoRC). --format adapter writes a LoRA for PEFT, to load on top of the
    compressed model; dense writes a whole model.
    """
    from hesse.reporting import repair_summary

    own: dict[str, Any] = {"rank": rank, "curvature": curvature, "damping": damping, "ignore": tuple(ignore or ())}
    run_and_print(hesse.repair, repair_summary, dense, compressed, out, **own, **shared)
