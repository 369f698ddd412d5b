"""An inspection as one HTML page with its plots inside, which needs no network to be read."""

import io
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hesse.errors import OptionError, OutputError
from hesse.reporting.inspection import advice, facts, predicts, with_error
from hesse.reporting.terminal import number
from hesse.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hesse.inspection import Inspection

INSTALL = "a page needs matplotlib and jinja2: pip install 'hesse[report]', or leave out --out"


def check_page(path: Path, overwrite: bool) -> None:
    """Refuse, before anything is computed, a page that cannot be drawn or must not be written.

    Raises:
        OptionError: the packages that draw it are not installed.
        OutputError: the file exists, or its folder does not.
    """
    if any(find_spec(name) is None for name in ("jinja2", "matplotlib")):
        raise OptionError(INSTALL)
    if path.exists() and not (overwrite and path.is_file()):
        raise OutputError(f"{path} exists: give another name, or --overwrite to replace a file")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"the folder of {path} does not exist: make it first")


def write_page(path: Path, page: str) -> None:
    """Write `page` to `path`, which appears only when it is whole.

    Raises:
        OutputError: the disk is full or cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_text(page, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}") from None
    finally:
        unfinished.unlink(missing_ok=True)


def inspection_page(inspection: "Inspection") -> str:
    """The page, drawn by matplotlib."""
    import jinja2  # imported late: optional

    source = files("hesse.reporting").joinpath("templates").joinpath("inspection.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters.update(number=number, with_error=with_error)
    return environment.from_string(source).render(
        inspection=inspection,
        facts=facts(inspection),
        advice=advice(inspection),
        shown=predicts(inspection),
        schemes=list(inspection.rank_correlations),
        curvatures=list(next(iter(inspection.rank_correlations.values()))),
        spectrum=_svg(_spectrum(inspection)),
        traces=_svg(_traces(inspection)),
        predictions=_svg(_predictions(inspection)),
        version=__version__,
    )


def _figure(width: float, height: float, columns: int = 1) -> tuple["Figure", list[Any]]:
    from matplotlib.figure import Figure  # not pyplot: nothing is shown, and no window system is asked for

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, sharey=columns > 1)
    return figure, list(axes[0])


def _svg(figure: "Figure") -> str:
    """The figure as an SVG element, with its text as text."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _spectrum(inspection: "Inspection") -> "Figure":
    figure, (axis,) = _figure(8, 2.8)
    seen = [(value, count) for value, count in inspection.spectrum if count >= 1e-3]
    axis.vlines([value for value, _ in seen], 1e-3, [count for _, count in seen], colors="#31688e", linewidth=2)
    axis.axvline(0, color="#999999", linewidth=0.8)
    axis.set_xscale("symlog", linthresh=1e-2)
    axis.set_yscale("log")
    axis.set_xlabel("eigenvalue of the Hessian")
    axis.set_ylabel("eigenvalues about there")
    return figure


def _traces(inspection: "Inspection") -> "Figure":
    layers = inspection.layers
    figure, (axis,) = _figure(8, 1 + 0.17 * len(layers))
    values, errors = zip(*(layer.trace for layer in layers), strict=True)
    axis.barh(range(len(layers)), values, xerr=errors, color="#31688e", ecolor="#999999", error_kw={"linewidth": 0.8})
    axis.set_yticks(range(len(layers)), [layer.name for layer in layers], fontsize=7)
    axis.invert_yaxis()
    axis.set_ylim(len(layers) - 0.4, -0.6)
    axis.set_xlabel("trace of the layer's block of the Fisher, nats per token, ± standard error over samples")
    return figure


def _predictions(inspection: "Inspection") -> "Figure":
    kinds = list(next(iter(inspection.rank_correlations.values())))
    figure, axes = _figure(13, 3.4, len(kinds))
    for axis, kind in zip(axes, kinds, strict=True):
        for scheme, color in zip(inspection.rank_correlations, _colors(len(inspection.rank_correlations)), strict=True):
            pairs = [(layer.predicted[scheme][kind], layer.measured[scheme][0]) for layer in inspection.layers]
            shown = [(x, y) for x, y in pairs if x > 0 and y > 0]
            axis.scatter([x for x, _ in shown], [y for _, y in shown], s=9, color=color, label=scheme)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.axline((1e-6, 1e-6), (1e-3, 1e-3), color="#999999", linewidth=0.8, zorder=0)  # as predicted
        axis.set_title(kind, fontsize=10)
        axis.set_xlabel("predicted")
    axes[0].set_ylabel("measured, nats per token")
    axes[0].legend(fontsize=7, loc="upper left")
    return figure


def _colors(count: int) -> list[Any]:
    import matplotlib

    return [matplotlib.colormaps["viridis"](index / max(count - 1, 1) * 0.9) for index in range(count)]
