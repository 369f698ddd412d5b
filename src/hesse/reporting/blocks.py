"""Models of fewer blocks or hidden units in the terminal."""

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from hesse.reporting.terminal import fallback_lines, number, shown
from hesse.result import REPORT_FILE

if TYPE_CHECKING:
    from hesse.jobs.drop_report import DropReport
    from hesse.jobs.narrow import NarrowReport


def blocks_summary(report: "DropReport") -> RenderableType:
    """Return the summary of removed blocks in order of removal, with the size and cost of the whole change."""
    headings = ("block", f"by {report.method}", "loss without it and those above", "made of")
    table = Table(
        *(Column(heading, justify="right") for heading in headings),
        box=box.SIMPLE_HEAD,
        title=shown(f"{report.model} without blocks"),
        title_justify="left",
    )
    for drop in report.dropped:
        donor = "-" if drop.donor is None else f"{drop.donor}, error {100 * (drop.relative_error or 0):.3g} %"
        table.add_row(str(drop.block), number(drop.score), number(drop.measured), donor)
    after = report.parameters_after or 0
    share = 100 * after / (report.parameters_before or 1)
    return Group(
        table,
        *fallback_lines(report.notes, REPORT_FILE),
        _measured(report, "scored"),
        shown(f"parameters to store: {after:,} ({share:.1f} %); bytes: {report.bytes_after or 0:,}"),
        shown(f"written to {report.out}", "bold"),
    )


def narrow_summary(report: "NarrowReport") -> RenderableType:
    """Return the summary of narrowed blocks: remaining hidden units, size and cost."""
    after = report.parameters_after or 0
    share = 100 * after / (report.parameters_before or 1)
    return Group(
        shown(f"{report.width_after} of {report.width_before} hidden units a block"),
        *fallback_lines(report.notes, REPORT_FILE),
        shown(f"{after:,} parameters ({share:.1f} %), {report.bytes_after or 0:,} bytes"),
        _measured(report, "calibration"),
        shown(f"written to {report.out}", "bold"),
    )


def _measured(report: "DropReport | NarrowReport", otherwise: str) -> Text:
    """Return the cost of the change on held-out samples, or on samples that are named `otherwise`."""
    loss = report.loss
    if loss is None or loss.measured is None:
        return shown("not measured")
    error = "" if loss.standard_error is None else f" ± {loss.standard_error:.1g}"
    where = "held-out" if loss.held_out else otherwise
    return shown(f"{loss.name}, {loss.samples} {where} samples: {number(loss.measured)}{error}")
