"""Inspections in the terminal."""

import itertools
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from hesse.reporting.terminal import note_lines, number, shown, text_table

if TYPE_CHECKING:
    from hesse.inspection import Inspection

SHOWN = ("4 bits", "50 % zeros")  # the schemes in the table of layers


def inspection_summary(inspection: "Inspection") -> RenderableType:
    """Return the summary of an inspection: the loss, the layers, and the most accurate curvature."""
    return Group(
        _whole(inspection),
        _layers(inspection),
        _trust(inspection),
        Text(advice(inspection)),
        *note_lines(inspection.notes),
    )


def facts(inspection: "Inspection") -> list[tuple[str, str]]:
    """Return the figures of the whole model, as labels and values."""
    trace, error = inspection.trace
    verdict = "as far as was seen" if inspection.at_a_minimum else "no: there is negative curvature, on this data"
    return [
        ("samples, tokens", f"{inspection.samples}, {inspection.tokens:,}"),
        ("parameters looked at", f"{inspection.parameters:,}"),
        ("loss, nats per token", number(inspection.model_loss, 5)),
        ("norm of the gradient", number(inspection.gradient_norm)),
        ("Hessian's largest eigenvalues, ± residual", _listed(inspection.largest_eigenvalues)),
        ("Hessian's smallest eigenvalues, ± residual", _listed(inspection.smallest_eigenvalues)),
        ("at a minimum", verdict),
        ("Gauss-Newton trace, ± standard error", f"{number(trace)} ± {number(error, 2)}"),
    ]


def _listed(pairs: list[tuple[float, float]]) -> str:
    return ", ".join(f"{number(value)} ± {number(residual, 1)}" for value, residual in pairs)


def _whole(inspection: "Inspection") -> Table:
    columns, rows = ("", Column(justify="right")), facts(inspection)
    return text_table(shown(inspection.model), *columns, rows=rows, show_header=False, padding=0)


def _layers(inspection: "Inspection") -> Table:
    kind, prefix = predicts(inspection), common_prefix([layer.name for layer in inspection.layers])
    title = f"each layer of {prefix.rstrip('.')} alone, nats per token; predicted by {kind}"
    costs_of = (heading for s in SHOWN for heading in ("\n".join([*s.rsplit(" ", 1), "predicted"]), "measured"))
    headings = ("trace,\n± error", "mean\neigen-\nvalue", *costs_of)
    rows: list[list[str | Text]] = []
    for layer in inspection.layers:
        costs = [cost for scheme in SHOWN for cost in (layer.predicted[scheme][kind], layer.measured[scheme][0])]
        numbers = [number(value, 2) for value in (layer.mean_eigenvalue, *costs)]
        rows.append([shown(layer.name.removeprefix(prefix)), value_with_error(layer.trace), *numbers])
    return text_table(
        shown(title),
        Column("layer", no_wrap=True),
        *(Column(heading, justify="right", no_wrap=True) for heading in headings),
        rows=rows,
        padding=0,
        show_edge=False,
    )


def common_prefix(names: list[str]) -> str:
    """Return the common beginning of all dotted names, up to and including a dot."""
    parts = zip(*(name.split(".") for name in names), strict=False)
    shared = [same[0] for same in itertools.takewhile(lambda same: len(set(same)) == 1, parts)]
    return "".join(f"{part}." for part in shared)


def predicts(inspection: "Inspection") -> str:
    """Return the curvature whose predictions are shown: the first available one in nats."""
    kinds = list(next(iter(inspection.rank_correlations.values())))
    return next(kind for kind in ("eigen-kronecker", "kronecker", "fisher diagonal", *kinds) if kind in kinds)


def value_with_error(pair: tuple[float, float]) -> str:
    """Return a value with its standard error, as text."""
    value, error = pair
    return f"{number(value, 2)} ± {number(error, 1)}"


def _trust(inspection: "Inspection") -> Table:
    title = "rank correlation over layers of what each curvature predicts with what was measured"
    by_scheme = inspection.rank_correlations
    columns = [Column("curvature"), *(Column(scheme, justify="right") for scheme in by_scheme)]
    kinds = next(iter(by_scheme.values()))
    rows = [(kind, *(f"{correlations[kind]:.2f}" for correlations in by_scheme.values())) for kind in kinds]
    return text_table(title, *columns, rows=rows)


def advice(inspection: "Inspection") -> str:
    """Return a sentence that names the most accurate curvature."""
    means = {
        kind: sum(by_kind[kind] for by_kind in inspection.rank_correlations.values())
        for kind in next(iter(inspection.rank_correlations.values()))
    }
    best = max(means, key=means.__getitem__)
    count = len(inspection.rank_correlations)
    return f"To rank this model's layers, trust the {best} most (mean rank correlation {means[best] / count:.2f})."
