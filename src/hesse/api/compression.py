"""Change a model, or prepare for it: compress, rotate, plan and estimate."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hesse.api.options import Data, calibration_of, find_device
from hesse.checkpoints.locate import locate
from hesse.jobs.compress import budget_request
from hesse.jobs.estimate import estimate_checkpoint
from hesse.methods import DEFAULT_METHOD, Options
from hesse.planning.budget import Budget, BudgetPlan, plan_budget
from hesse.progress import Progress, Silence
from hesse.version import __version__


def plan(
    model: str | Path,
    *,
    method: str = DEFAULT_METHOD,
    options: Options | None = None,
    ignore: Sequence[str] = (),
    data: Data = None,
    statistics: str | Path | None = None,
    samples: int = 128,
    length: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: str = "auto",
    format: str = "auto",
    size: str | int | None = None,
    mean_bits: float | None = None,
    loss: float | None = None,
    target: str | None = None,
    allocation: str | None = None,
    progress: Progress | None = None,
) -> BudgetPlan:
    """The recipe that shares one budget out among the layers at the least predicted loss; nothing is written.

    Exactly one of `size`, `mean_bits` and `loss` is given; with `loss` the smallest such recipe is found. `options`
    that are given hold for all layers. Arguments are those of `compress`; `target` is `transformers` if absent.

    Raises:
        HesseError: one of its kinds names what is wrong and what to do; a budget that cannot be met says what can.
    """
    return plan_budget(
        locate(model),
        budget_request(Budget(size, mean_bits, loss), method, options, ignore, target, allocation),
        calibration_of(data, samples, length, seed, batch_size),
        None if statistics is None else Path(statistics),
        format=format,
        device=find_device(device),
        progress=progress or Silence(),
    )


def estimate(
    model: str | Path,
    out: str | Path,
    *,
    curvatures: Sequence[str] = ("gram",),
    data: str | Path | None = None,
    samples: int = 128,
    length: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Estimate a model's curvature once, into a folder from which `compress` tries any number of schemes.

    The folder holds for each linear layer what `curvatures` names, E[ggᵀ] at its outputs, and fingerprints of model and
    data. "gram" is the second moment of the layer's inputs, which `compress` needs; "kronecker" its K-FAC factors, from
    which `compress` and `inspect` predict; "fisher" the diagonal of the Fisher, of whole sequences. Both are the true
    Fisher with sampled labels, in nats per token. Other arguments are those of `compress`.

    Returns:
        The folder's index: what was estimated, from what, and the seconds by phase.

    Raises:
        HesseError: one of its kinds names what is wrong and what to do; nothing is left at `out` then.
    """
    calibration = calibration_of(data, samples, length, seed, batch_size)
    return estimate_checkpoint(
        locate(model),
        Path(out),
        tuple(curvatures),
        calibration,
        device=find_device(device),
        overwrite=overwrite,
        progress=progress or Silence(),
        version=__version__,
    )
