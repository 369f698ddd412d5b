"""Plots as SVG elements, drawn by matplotlib."""

import html
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from hesse.errors import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONGEST_NAME = 48
BLUE, ORANGE, GREY, BAND_GREY = "#31688e", "#c2571a", "#999999", "#e9edf1"
# Keep text as text. The salt makes files repeatable.
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hesse",
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
Plotted = TypeVar("Plotted")


def svg(draw: Callable[[Plotted], "Figure"], content: Plotted, title: str) -> str:
    """Return the figure that `draw` makes of `content` as an SVG element, described by `title`; text stays text."""
    import matplotlib  # imported late: optional

    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        draw(content).savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)


def figure(width: float, height: float, columns: int = 1) -> tuple["Figure", list[Any]]:
    """Return a figure of `width` by `height` inches, and its axes side by side."""
    from matplotlib.figure import Figure  # not pyplot: nothing is shown, and no window system is asked for

    made = Figure(figsize=(width, height), layout="constrained")
    axes = made.subplots(1, columns, squeeze=False, sharey=columns > 1)
    return made, list(axes[0])


def name_rows(axis: Any, names: Sequence[str], size: float) -> None:
    """Label the rows of `axis` from the top with names, shortened to their ends; names are never parsed as formulas."""
    axis.set_yticks(range(len(names)), [_short(printable(name)) for name in names], fontsize=size)
    for label in axis.get_yticklabels():
        label.set_parse_math(False)
    axis.set_ylim(len(names) - 0.4, -0.6)


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"


def colors(count: int) -> list[Any]:
    """Return colours that stay in order in black and white."""
    import matplotlib

    return [matplotlib.colormaps["viridis"](index / max(count - 1, 1) * 0.9) for index in range(count)]
