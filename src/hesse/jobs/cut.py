"""`hesse.cut`: a model of any size from one ranking of all singular directions."""

from collections.abc import Sequence
from pathlib import Path

from hesse.checkpoints.locate import locate
from hesse.data.selection import Calibration
from hesse.jobs.compress import compress_folder
from hesse.jobs.options import run_options
from hesse.jobs.report import CompressionReport
from hesse.planning.singular_directions import cut_recipe
from hesse.progress import Progress
from hesse.result import ForecastReport, Result


def cut(
    model: str | Path,
    statistics: str | Path,
    out: str | Path,
    *,
    size: str | int,
    ignore: Sequence[str] = (),
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Result[CompressionReport | ForecastReport]:
    """Cut a model of a given size from one ranking of the singular directions of all layers, without calibration.

    Args:
        model: a dense model: a folder, `default`, or a hub id.
        statistics: the folder that `estimate` wrote with curvatures "gram" and "kronecker"; it serves all sizes.
        out: the folder to write; it must not exist unless `overwrite`.
        size: of the linear layers that are not ignored: a share such as "60%" of their dense bytes, or bytes.
        ignore: patterns of layers to leave unchanged.
        device: `auto`, `cpu`, or `cuda`.
        overwrite: replace a model folder at `out`.
        progress: receives each phase and step.

    Raises:
        HesseError: the subclass and message say what is wrong and what to do; nothing is left at `out`.
    """
    run = run_options(device, overwrite=overwrite, progress=progress)
    recipe = cut_recipe(locate(model), Path(statistics), size, tuple(ignore), run.device, run.progress)
    return compress_folder(model, Path(out), recipe, Calibration(), run, Path(statistics), "auto", None, False)
