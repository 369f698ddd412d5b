"""Repairs in the terminal."""

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from hesse.reporting.terminal import note_lines, number, shown, unwrapped
from hesse.result import REPORT_FILE

if TYPE_CHECKING:
    from hesse.jobs.repair_report import RepairReport


def repair_summary(report: "RepairReport") -> RenderableType:
    """Return the summary of a repair: losses before and after, added bytes, and departures from the options."""
    table = Table(
        "",
        Column("before", justify="right"),
        Column("after", justify="right"),
        box=box.SIMPLE_HEAD,
        title=shown(f"{report.compressed}, rank {report.rank} added"),
        title_justify="left",
    )
    before, after = report.loss_before, report.loss
    table.add_row("bytes", f"{report.bytes_before:,}", f"{report.bytes_before + report.bytes_added:,}")
    table.add_row("loss increase predicted, nats per token", number(before.predicted), number(after.predicted))
    where = "held-out" if after.held_out else "calibration"
    table.add_row(
        f"{after.name}, {after.samples} {where} samples",
        *(
            number(loss.measured) + ("" if loss.standard_error is None else f" ± {loss.standard_error:.1g}")
            for loss in (before, after)
        ),
    )
    parts: list[RenderableType] = [table, *note_lines(report.notes, REPORT_FILE)]
    parts.append(Text(f"{len(report.layers)} layers repaired in {report.seconds['total']:.1f} s"))
    parts.append(unwrapped(f"written to {report.out}", "bold"))
    if report.format == "adapter":
        load = f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{report.compressed}"), "{report.out}")'
        parts.append(unwrapped(f"It loads in PEFT: {load}"))
    return Group(*parts)
