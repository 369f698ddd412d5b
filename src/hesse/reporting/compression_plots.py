"""Plots of a compression's page."""

import math
from typing import TYPE_CHECKING

from hesse.reporting.plots import BAND_GREY, BLUE, GREY, ORANGE, figure, name_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hesse.evaluation.measurements import LayerMeasurement, Measurements
    from hesse.jobs.report import CompressionReport

COSTLIEST = 30  # layers that are drawn by name


def scatter(content: "tuple[Measurements, str]") -> "Figure":
    """Plot measured against predicted cost, one point per layer, inside or outside of the band."""
    measured, unit = content
    drawing, (axis,) = figure(6, 4.2)
    known = [group for group in measured.layers if group.predicted and group.measured.value > 0]
    for outside, color, label in ((False, BLUE, "a layer alone"), (True, ORANGE, "outside of the band")):
        shown = [group for group in known if group.outside == outside]
        if shown:
            axis.errorbar(
                [group.predicted for group in shown],
                [group.measured.value for group in shown],
                yerr=_errors(shown),
                fmt="o",
                color=color,
                ecolor=GREY,
                markersize=4,
                elinewidth=0.8,
                label=label,
            )
    axis.set(xscale="log", yscale="log")
    ends = axis.get_xlim()
    low, high = measured.layer_band
    axis.fill_between(
        ends, [low * x for x in ends], [high * x for x in ends], color=BAND_GREY, zorder=0, label="the band"
    )
    axis.plot(ends, ends, color=GREY, linewidth=0.8, zorder=1)
    axis.set(xlim=ends, xlabel="predicted", ylabel=f"measured, {unit}")
    axis.legend(fontsize=8, loc="upper left")
    return drawing


def along_the_change(measured: "Measurements") -> "Figure":
    """Plot measured over predicted cost at shares of the change."""
    drawing, (axis,) = figure(6, 4.2)
    points = [point for point in measured.line if point.predicted and math.isfinite(point.measured.value)]
    shares = [point.share for point in points]
    axis.axhspan(*measured.band, color=BAND_GREY, zorder=0, label="the band")
    axis.axhline(1, color=GREY, linewidth=0.8, zorder=1)
    axis.axvline(1, color=ORANGE, linewidth=1, linestyle="--", zorder=1, label="the change made")
    axis.errorbar(
        shares,
        [point.measured.value / point.predicted for point in points],
        yerr=[2 * point.measured.standard_error / point.predicted for point in points],
        fmt="o-",
        color=BLUE,
        ecolor=GREY,
        markersize=4,
        elinewidth=0.8,
    )
    axis.set(xlim=(0, None), ylim=(0, None), xlabel="share of the change", ylabel="measured / predicted")
    axis.legend(fontsize=8, loc="lower right")
    return drawing


def by_layer(content: "tuple[Measurements, str, str]") -> "Figure":
    """Plot the predicted and measured cost of the costliest layers, by name."""
    measured, prefix, unit = content
    shown = sorted(measured.layers, key=lambda group: -group.measured.value)[:COSTLIEST]
    drawing, (axis,) = figure(6.4, 1 + 0.22 * len(shown))
    for place, group in enumerate(shown):
        ends = [group.measured.value, group.measured.value if group.predicted is None else group.predicted]
        axis.plot(ends, [place, place], color=GREY, linewidth=1, zorder=1)
    places = range(len(shown))
    axis.scatter([group.measured.value for group in shown], places, s=22, color=BLUE, label="measured", zorder=2)
    known = [(group.predicted, place) for place, group in enumerate(shown) if group.predicted is not None]
    axis.scatter(
        [value for value, _ in known],
        [place for _, place in known],
        s=22,
        facecolors="white",
        edgecolors=ORANGE,
        label="predicted",
        zorder=2,
    )
    name_rows(axis, [group.name.removeprefix(prefix) for group in shown], 8)
    left = min(0.0, *(group.measured.value for group in shown))
    axis.set(xlim=(left, None), xlabel=f"cost of the layer alone, {unit}")
    axis.legend(fontsize=8, loc="lower right")
    return drawing


def alternatives(report: "CompressionReport") -> "Figure":
    """Plot size against predicted cost: the plans, the chosen plan, and its measured cost."""
    drawing, (axis,) = figure(6.4, 3.4)
    for kind, style, label in (("front", "o-", "planned, predicted"), ("uniform", "x", "one scheme, predicted")):
        others = [plan for plan in report.front or [] if plan["kind"] == kind and plan["predicted"] > 0]
        if others:
            others.sort(key=lambda plan: plan["bytes"])
            sizes, costs = [plan["bytes"] / 1e6 for plan in others], [plan["predicted"] for plan in others]
            axis.plot(sizes, costs, style, color=GREY, markersize=4, linewidth=0.8, label=label)
    after, check = report.bytes_after / 1e6, report.loss
    chosen = [plan for plan in report.front or [] if plan["kind"] == "chosen"]
    predicted = chosen[0]["predicted"] if chosen else report.loss.predicted
    if predicted is not None and predicted > 0:
        axis.plot(
            [after], [predicted], "o", markersize=8, markerfacecolor="white", color=ORANGE, label="chosen, predicted"
        )
    if check.measured is not None and check.measured > 0:
        axis.plot([after], [check.measured], "o", markersize=6, color=BLUE, label="chosen, measured")
    axis.axvline(report.bytes_before / 1e6, color=GREY, linestyle="--", linewidth=0.8, label="the dense model: no cost")
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    decade = min(low, high / 10) / 1.5, max(high, low * 10) * 1.5  # at least: small differences look small
    axis.set(ylim=decade, xlim=(0, None), xlabel="size on disk, MB", ylabel="cost")
    axis.legend(fontsize=8, loc="upper right", bbox_to_anchor=(0.97, 1))
    return drawing


def _errors(groups: "list[LayerMeasurement]") -> list[list[float]]:
    """Return error bars of one standard error, shortened to stay above zero on a logarithmic axis."""
    below = [min(group.measured.standard_error, 0.9 * group.measured.value) for group in groups]
    return [below, [group.measured.standard_error for group in groups]]
