"""Pruned checkpoints in the terminal."""

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from hesse.jobs.blocks_report import BlocksReport
from hesse.reporting.terminal import note_lines, number, shown, unwrapped
from hesse.result import REPORT_FILE

if TYPE_CHECKING:
    from hesse.jobs.prune_hidden import HiddenReport


def prune_summary(report: "BlocksReport | HiddenReport") -> RenderableType:
    """Return what was removed from a checkpoint, and what the change saves and costs."""
    return _blocks(report) if isinstance(report, BlocksReport) else _hidden(report)


def _blocks(report: BlocksReport) -> RenderableType:
    """The blocks in the order of removal, and what the whole change saves and costs."""
    headings = ("block", f"by {report.score}", "loss without it and those above", "made of")
    table = Table(
        *(Column(heading, justify="right") for heading in headings),
        box=box.SIMPLE_HEAD,
        title=shown(f"{report.model} without blocks"),
        title_justify="left",
    )
    for drop in report.removed:
        donor = "-" if drop.donor is None else f"{drop.donor}, error {100 * (drop.relative_error or 0):.3g} %"
        table.add_row(str(drop.block), number(drop.score), number(drop.measured), donor)
    after = report.parameters_after or 0
    share = 100 * after / (report.parameters_before or 1)
    return Group(
        table,
        *note_lines(report.notes, REPORT_FILE),
        _measured(report, "scored"),
        shown(f"parameters to store: {after:,} ({share:.1f} %); bytes: {report.bytes_after or 0:,}"),
        unwrapped(f"written to {report.out}", "bold"),
    )


def _hidden(report: "HiddenReport") -> RenderableType:
    """The number of hidden units that are left, and what that saves and costs."""
    after = report.parameters_after or 0
    share = 100 * after / (report.parameters_before or 1)
    return Group(
        shown(f"{report.width_after} of {report.width_before} hidden units a block"),
        *note_lines(report.notes, REPORT_FILE),
        shown(f"{after:,} parameters ({share:.1f} %), {report.bytes_after or 0:,} bytes"),
        _measured(report, "calibration"),
        unwrapped(f"written to {report.out}", "bold"),
    )


def _measured(report: "BlocksReport | HiddenReport", otherwise: str) -> Text:
    """The measured loss, on samples that were held out, or on those that are called `otherwise`."""
    loss = report.loss
    if loss is None or loss.measured is None:
        return shown("not measured")
    error = "" if loss.standard_error is None else f" ± {loss.standard_error:.1g}"
    where = "held-out" if loss.held_out else otherwise
    return shown(f"{loss.name}, {loss.samples} {where} samples: {number(loss.measured)}{error}")
