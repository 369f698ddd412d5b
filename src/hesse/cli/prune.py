"""The command that removes parts of a model: prune."""

from typing import Annotated, Any

import typer

import hesse
from hesse.cli.options import (
    CALIBRATE,
    METHOD,
    SMALLER,
    WRITE,
    LossOption,
    ModelArgument,
    OutArgument,
    samples,
    with_options,
)
from hesse.cli.terminal import run_and_print
from hesse.options import help_of

SAMPLES = samples(None, "16 for blocks, 128 for hidden")


@with_options(*(SAMPLES if option.name == "samples" else option for option in CALIBRATE), *WRITE)
def prune(
    model: ModelArgument,
    out: OutArgument,
    what: Annotated[str, typer.Option(help="Parts to remove: blocks, or hidden units of feed-forward layers.")],
    keep: Annotated[
        float | None, typer.Option(help="Share of the parts that stays, such as 0.75.", rich_help_panel=SMALLER)
    ] = None,
    loss: LossOption = None,
    method: Annotated[
        str | None,
        typer.Option(help="A row of `hesse methods`.", show_default="loss for blocks, modegpt-mlp for hidden"),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help=help_of("rank"), show_default="32 in flexigpt", rich_help_panel=METHOD)
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(
            help="Score that chooses blocks for flexigpt: loss, cosine or quadratic.",
            rich_help_panel=METHOD,
            show_default="loss",
        ),
    ] = None,
    **shared: Any,
) -> None:
    """Remove blocks, or hidden units of all blocks, and write a smaller model that transformers loads.

    Blocks are chosen by --method loss (measured, one at a time), cosine or quadratic, or made of others by flexigpt.
    """
    from hesse.reporting import prune_summary

    given: dict[str, Any] = {"keep": keep, "loss": loss, "rank": rank, "score": score}
    shared.update({name: value for name, value in given.items() if value is not None})
    run_and_print(hesse.prune, prune_summary, model, out, what=what, method=method, **shared)
