"""A repair in the terminal."""

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hesse.reporting.terminal import fallback_lines, number, shown

if TYPE_CHECKING:
    from hesse.jobs.repair_report import RepairReport


def repair_summary(report: "RepairReport") -> RenderableType:
    """Losses before and after, what was added for it, and what departed from what was asked."""
    table = Table(box=box.SIMPLE_HEAD, title=shown(f"{report.compressed}, rank {report.rank} added"))
    table.title_justify = "left"
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="right" if heading else "left")
    after = report.bytes_compressed + report.bytes_added
    table.add_row("bytes", f"{report.bytes_compressed:,}", f"{after:,}")
    predicted = number(report.predicted_before), number(report.predicted_after)
    table.add_row("loss increase predicted, nats per token", *predicted)
    where = "held-out" if report.held_out else "calibration"
    errors = report.standard_error_before, report.standard_error_after
    measured = report.measured_before, report.measured_after
    table.add_row(
        f"{report.loss_name}, {report.samples} {where} samples",
        *(
            number(value) + ("" if error is None else f" ± {error:.1g}")
            for value, error in zip(measured, errors, strict=True)
        ),
    )
    parts: list[RenderableType] = [table, *fallback_lines(report.fallbacks, "repair.json")]
    parts.append(Text(f"{len(report.layers)} layers repaired in {report.seconds['total']:.1f} s"))
    parts.append(shown(f"written to {report.out}", "bold"))
    if report.format == "adapter":
        load = f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{report.compressed}"), "{report.out}")'
        parts.append(shown(f"It loads in PEFT: {load}"))
    return Group(*parts)
