"""Models of fewer blocks or hidden units in the terminal."""

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hesse.reporting.terminal import fallback_lines, number, shown

if TYPE_CHECKING:
    from hesse.jobs.drop_report import DropReport
    from hesse.jobs.narrow import NarrowReport


def blocks_summary(report: "DropReport") -> RenderableType:
    """The blocks in the order in which they went, and what the whole change takes and costs."""
    table = Table(box=box.SIMPLE_HEAD, title=shown(f"{report.model} without blocks"), title_justify="left")
    for heading in ("block", f"by {report.importance}", "loss without it and those above", "made of"):
        table.add_column(heading, justify="right")
    for drop in report.dropped:
        donor = "-" if drop.donor is None else f"{drop.donor}, error {100 * (drop.relative_error or 0):.3g} %"
        table.add_row(str(drop.block), number(drop.score), number(drop.measured), donor)
    share = 100 * report.parameters_after / report.parameters_before
    return Group(
        table,
        *fallback_lines(report.notes, "blocks.json"),
        _measured(report, "scored"),
        shown(f"parameters to store: {report.parameters_after:,} ({share:.1f} %); bytes: {report.bytes_after:,}"),
        shown(f"written to {report.out}", "bold"),
    )


def narrow_summary(report: "NarrowReport") -> RenderableType:
    """How many hidden units are left, and what that takes and costs."""
    share = 100 * report.parameters_after / report.parameters_before
    return Group(
        shown(f"{report.width_after} of {report.width_before} hidden units a block"),
        *fallback_lines(report.notes, "narrow.json"),
        shown(f"{report.parameters_after:,} parameters ({share:.1f} %), {report.bytes_after:,} bytes"),
        _measured(report, "calibration"),
        shown(f"written to {report.out}", "bold"),
    )


def _measured(report: "DropReport | NarrowReport", otherwise: str) -> Text:
    """What the change cost, on samples that were held out, or on those that are called `otherwise`."""
    error = "" if report.standard_error is None else f" ± {report.standard_error:.1g}"
    where = "held-out" if report.held_out else otherwise
    return shown(f"{report.loss_name}, {report.samples} {where} samples: {number(report.measured)}{error}")
