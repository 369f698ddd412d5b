"""Estimated statistics in the terminal."""

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType

from hesse.reporting.terminal import shown, unwrapped

if TYPE_CHECKING:
    from hesse.jobs.estimate import EstimateReport


def estimate_summary(report: "EstimateReport") -> RenderableType:
    """Return what was estimated, and the command that uses it."""
    kinds = ", ".join(f"{kind} of {len(layers)} layers" for kind, layers in report.curvatures.items())
    command = f"compress {report.model} OUT" if "gram" in report.curvatures else f"inspect {report.model}"
    return Group(
        shown(f"{kinds} from {report.tokens:,} tokens"),
        unwrapped(f"written to {report.out}", "bold"),
        unwrapped(f"Next: hesse {command} --statistics {report.out}"),
    )
