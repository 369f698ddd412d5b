"""Dropped blocks in the terminal."""

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from hesse.reporting.terminal import fallback_lines, number, shown

if TYPE_CHECKING:
    from hesse.compression import DropReport


def blocks_summary(report: "DropReport") -> RenderableType:
    """The blocks in the order in which they went, and what the whole change takes and costs."""
    table = Table(box=box.SIMPLE_HEAD, title=shown(f"{report.model} without blocks"), title_justify="left")
    for heading in ("block", f"by {report.importance}", "loss without it and those above", "made of"):
        table.add_column(heading, justify="right")
    for drop in report.dropped:
        donor = "-" if drop.donor is None else f"{drop.donor}, error {100 * (drop.relative_error or 0):.3g} %"
        table.add_row(str(drop.block), number(drop.score), number(drop.measured), donor)
    error = "" if report.standard_error is None else f" ± {report.standard_error:.1g}"
    where = "held-out" if report.held_out else "scored"
    share = 100 * report.parameters_after / report.parameters_before
    return Group(
        table,
        *fallback_lines(report.notes, "blocks.json"),
        shown(f"{report.loss_name}, {report.samples} {where} samples: {number(report.measured)}{error}"),
        shown(f"parameters to store: {report.parameters_after:,} ({share:.1f} %); bytes: {report.bytes_after:,}"),
        shown(f"written to {report.out}", "bold"),
    )
