"""A rotation in the terminal."""

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType

from hesse.reporting.terminal import number, shown

if TYPE_CHECKING:
    from hesse.jobs.rotate import RotationReport


def rotation_summary(report: "RotationReport") -> RenderableType:
    """Return the notes, the measured divergence, and the next step."""
    lines = list(report.notes)
    if report.loss is not None:
        lines.append(
            f"{report.loss.name}: {number(report.loss.measured, 3)} nats per token, on {report.tokens:,} tokens"
        )
    lines.append(f"{report.bytes_before:,} bytes before, {report.bytes_after:,} after")
    lines.append(f"Next: hesse compress {report.out} OUT")
    return Group(*(shown(line) for line in lines), shown(f"written to {report.out}", "bold"))
