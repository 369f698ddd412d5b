"""A dry run in the terminal."""

from rich.console import Group, RenderableType

from hesse.reporting.terminal import shown, size
from hesse.result import ForecastReport


def forecast_summary(report: ForecastReport) -> RenderableType:
    """Return the summary of a dry run: the resources that a run needs, and the basis of the estimates."""
    lines = [
        f"{report.out}: at most {size(report.out_bytes)} of weights, from {size(report.bytes_before or 0)}",
        f"disk: {size(report.disk_bytes)} free while it runs",
        f"memory: at most {size(report.memory_bytes)}, to {report.memory_phase}",
        f"time: about {_duration(report.seconds['total'])}; {report.basis}",
        *report.notes,
        "nothing was written",
    ]
    return Group(*(shown(line) for line in lines))


def _duration(seconds: float) -> str:
    """Return seconds as text, in minutes or hours if long."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
