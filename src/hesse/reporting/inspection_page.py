"""HTML page of an inspection."""

from typing import TYPE_CHECKING

from hesse.reporting.inspection import advice, facts, predicts, value_with_error
from hesse.reporting.page import render
from hesse.reporting.plots import BLUE, GREY, colors, figure, name_rows, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hesse.inspection import Inspection


def inspection_page(inspection: "Inspection") -> str:
    """Return the page; matplotlib draws its plots."""
    return render(
        "inspection.html",
        inspection=inspection,
        facts=facts(inspection),
        advice=advice(inspection),
        shown=predicts(inspection),
        value_with_error=value_with_error,
        schemes=list(inspection.rank_correlations),
        curvatures=list(next(iter(inspection.rank_correlations.values()))),
        spectrum=svg(_spectrum, inspection, "eigenvalues of the Hessian, and how many lie about there"),
        traces=svg(_traces, inspection, "the trace of each layer's block of the Fisher"),
        predictions=svg(_predictions, inspection, "what each curvature predicts against what was measured"),
    )


def _spectrum(inspection: "Inspection") -> "Figure":
    drawing, (axis,) = figure(8, 2.8)
    seen = [(value, count) for value, count in inspection.spectrum if count >= 1e-3]
    axis.vlines([value for value, _ in seen], 1e-3, [count for _, count in seen], colors=BLUE, linewidth=2)
    axis.axvline(0, color=GREY, linewidth=0.8)
    axis.set_xscale("symlog", linthresh=1e-2)
    axis.set(yscale="log", xlabel="eigenvalue of the Hessian", ylabel="eigenvalues about there")
    return drawing


def _traces(inspection: "Inspection") -> "Figure":
    layers = inspection.layers
    drawing, (axis,) = figure(8, 1 + 0.17 * len(layers))
    values, errors = zip(*(layer.trace for layer in layers), strict=True)
    axis.barh(range(len(layers)), values, xerr=errors, color=BLUE, ecolor=GREY, error_kw={"linewidth": 0.8})
    name_rows(axis, [layer.name for layer in layers], 7)
    axis.set_xlabel("trace of the layer's block of the Fisher, nats per token, ± standard error over samples")
    return drawing


def _predictions(inspection: "Inspection") -> "Figure":
    kinds = list(next(iter(inspection.rank_correlations.values())))
    drawing, axes = figure(13, 3.4, len(kinds))
    for axis, kind in zip(axes, kinds, strict=True):
        for scheme, color in zip(inspection.rank_correlations, colors(len(inspection.rank_correlations)), strict=True):
            pairs = [(layer.predicted[scheme][kind], layer.measured[scheme][0]) for layer in inspection.layers]
            shown = [(x, y) for x, y in pairs if x > 0 and y > 0]
            axis.scatter([x for x, _ in shown], [y for _, y in shown], s=9, color=color, label=scheme)
        axis.set(xscale="log", yscale="log", xlabel="predicted")
        axis.axline((1e-6, 1e-6), (1e-3, 1e-3), color=GREY, linewidth=0.8, zorder=0)  # as predicted
        axis.set_title(kind, fontsize=10)
    axes[0].set_ylabel("measured, nats per token")
    axes[0].legend(fontsize=7, loc="upper left")
    return drawing
