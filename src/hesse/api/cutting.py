"""`hesse.cut`: a model of any size from one ranking of all singular directions."""

from collections.abc import Sequence
from pathlib import Path

from hesse.api.options import calibration_of, find_device
from hesse.checkpoints.locate import locate
from hesse.checkpoints.output import check_output
from hesse.jobs.compress import compress_checkpoint
from hesse.jobs.report import CompressionReport
from hesse.planning.singular_directions import cut_recipe
from hesse.progress import Progress, Silence
from hesse.version import __version__


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
) -> CompressionReport:
    """Cut a model of a given size from one ranking of the singular directions of all layers, without calibration.

    Args:
        model: a dense model: a folder, `default`, or a hub id.
        statistics: the folder that `estimate` wrote of it with curvatures "gram" and "kronecker"; one for all sizes.
        out: the folder to write; it must not exist unless `overwrite`.
        size: of the linear layers that are not ignored: a share such as "60%" of their dense bytes, or bytes.
        ignore: patterns of layer names to leave as they are.
        device: `auto`, `cpu`, or `cuda`.
        overwrite: whether a model folder at `out` may be replaced.
        progress: told how far the run is.

    Raises:
        HesseError: one of its kinds names what is wrong and what to do; nothing is left at `out` then.
    """
    source, found, progress = locate(model), find_device(device), progress or Silence()
    check_output(Path(out), source, overwrite)
    recipe = cut_recipe(source, Path(statistics), size, tuple(ignore), found, progress)
    return compress_checkpoint(
        source,
        Path(out),
        recipe,
        calibration_of(None, 128, None, 0, None),
        Path(statistics),
        format="auto",
        device=found,
        overwrite=overwrite,
        restart=False,
        memory=None,
        measured=False,
        progress=progress,
        name=str(model),
        version=__version__,
    )
