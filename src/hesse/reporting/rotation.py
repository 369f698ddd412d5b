"""A rotation in the terminal."""

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType

from hesse.reporting.terminal import number, shown, unwrapped

if TYPE_CHECKING:
    from hesse.jobs.rotate import RotationReport


def rotation_summary(report: "RotationReport") -> RenderableType:
    """Return the notes, the measured divergence, and the next step."""
    lines = [shown(note) for note in report.notes]
    if report.loss is not None:
        loss = f"{report.loss.name}: {number(report.loss.measured, 3)} nats per token"
        lines.append(shown(f"{loss}, on {report.tokens:,} tokens"))
    lines.append(shown(f"{report.bytes_before:,} bytes before, {report.bytes_after:,} after"))
    lines.append(unwrapped(f"written to {report.out}", "bold"))
    return Group(*lines, unwrapped(f"Next: hesse compress {report.out} OUT"))
